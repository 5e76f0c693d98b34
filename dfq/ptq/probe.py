"""A full-precision network in which some sites can be quantized for a while, to see how far that moves the logits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from calibration import CalibrationSet
from dfq.models import Model
from dfq.progress import progress_bar
from dfq.ptq.engine import as_shown, check_calibration, prepare
from dfq.ptq.fitting import fit_sites, joined_tokens, move_ranges, observe, place
from dfq.ptq.modules import PositionMean
from dfq.ptq.positions import linear, means_of_positions
from dfq.ptq.sites import PATCH_TOKENS, POSITION_EMBEDDING, PlannedSite
from dfq.ptq.stages import Stage, stages
from dfq.recipe import Bits, Recipe
from dfq.statistics import divergence, sqnr_db
from quantizers import Quantizer

Trial = tuple[tuple[str, int], ...]
"""Sites that are quantized together, with their bits: `(("blocks.0.attn.qkv.weight", 4), ...)`."""


@dataclass(frozen=True)
class Cost:
    """How far logits are from those of full precision on the same images.

    kl: KL(full precision || quantized) of the softmax, in nats, mean over the images; sqnr_db: power of the
    full-precision logits over that of the difference, infinite where there is none; changed: percent of the images
    whose likeliest class is another.
    """

    kl: float
    sqnr_db: float
    changed: float

    @classmethod
    def of(cls, reference: Tensor, logits: Tensor) -> Cost:
        """reference: of full precision; both [M, C]."""
        reference, logits = reference.cpu().double(), logits.cpu().double()
        kl = divergence(logits, reference).mean().item()
        changed = (reference.argmax(-1) != logits.argmax(-1)).double().mean().item()
        noise = (reference - logits).square().sum().item()
        # Of nearly equal logits rounding may bring the sum a trifle below zero.
        return cls(max(kl, 0.0), sqnr_db(reference.square().sum().item(), noise), 100 * changed)


class Probe:
    """An adapted copy of a model, the sites that a recipe quantizes in it, and images to quantize them on.

    Ranges per channel are moved into the layers around them, and means of positions kept apart at the bits at which the
    recipe has it so; ranges are fitted on full-precision activations, values rounded to nearest. Nothing makes up for
    the error.

    means: by the path of a linear, what is kept apart of its input where that has ranges per token.
    """

    @torch.no_grad()
    def __init__(self, model: Model, bits: Bits, recipe: Recipe, images: CalibrationSet, batch_size: int) -> None:
        self.module, planned = prepare(model, bits, recipe)
        check_calibration(model, images)
        self.model, self.bits, self.recipe, self.images = model.name, bits, recipe, as_shown(images, recipe)
        self._stages = stages(self.module)
        self._batches = self.images.batches(batch_size, model.device)
        self._quantizers: dict[tuple[str, int], Quantizer] = {}
        self.means: dict[str, PositionMean] = {}
        moved: dict[str, PlannedSite] = {}
        inputs: Sequence[Any] = self._batches
        for stage in self._stages:
            sites = [p for p in planned if stage.owns(p.site.name)]
            sites = move_ranges(self.module, stage, sites, recipe, inputs, stage.run)
            if stage.module is not None and not self.images.is_sparse:
                self.means |= means_of_positions(self.module, sites, inputs, stage.run)
            moved |= {p.site.name: p for p in sites}
            inputs = [stage.run(batch) for batch in inputs]
        self._reference = torch.cat(list(inputs))
        self.planned = [moved[p.site.name] for p in planned]
        self._entering = {
            p.site.owner: p for p in self.planned if p.site.slot == "input" and p.site.owner in self.means
        }
        for path in self.means:
            self._set_apart(path, self.is_apart(path))

    @torch.no_grad()
    def costs(self, trials: Collection[Trial], *, progress: bool = True) -> dict[Trial, Cost]:
        """What each trial costs, all else in full precision; the sites of one trial belong to one stage.

        The activations that enter a stage are computed once, and only what follows is run again for each trial there.
        """
        found: dict[Trial, Cost] = {}
        inputs: Sequence[Any] = self._batches
        with progress_bar(len(trials), "sensitivity", "trial", shown=progress) as bar:
            for index, stage in enumerate(self._stages):
                here = [trial for trial in trials if stage.owns(trial[0][0])]
                outputs = self._fit(stage, inputs, here)
                for trial in here:
                    with self._quantized(trial):
                        found[trial] = Cost.of(self._reference, self._logits(self._stages[index:], inputs))
                    bar.update()
                inputs = outputs
        return {trial: found[trial] for trial in trials}

    @torch.no_grad()
    def cost(self, trial: Trial) -> Cost:
        """What any sites cost together, at bits that each of them was tried at in `costs`."""
        with self._quantized(trial):
            return Cost.of(self._reference, self._logits(self._stages, self._batches))

    def quantizer(self, site: str, bits: int) -> Quantizer:
        """Of a site at bits that it was tried at."""
        return self._quantizers[site, bits]

    def weight(self, layer: str) -> Tensor:
        """The full-precision weights of a layer that has a site for them."""
        weight: Tensor = self.module.get_submodule(layer).weight
        return weight

    def is_apart(self, path: str, bits: int | None = None) -> bool:
        """Whether a linear that has one of `means` has it in a model in which its input gets so many bits.

        bits: None for those of the run, or of the recipe.
        """
        entering = self._entering[path]
        return entering.settings.is_dynamic(entering.bits if bits is None else bits)

    def _set_apart(self, path: str, apart: bool) -> None:
        linear(self.module, path).position_mean = self.means[path] if apart else None

    @contextmanager
    def _apart(self, states: Mapping[str, bool]) -> Iterator[None]:
        """While it is open, linears have their means or not, by path."""
        for path, apart in states.items():
            self._set_apart(path, apart)
        try:
            yield
        finally:
            for path in states:
                self._set_apart(path, self.is_apart(path))

    def _logits(self, following: Sequence[Stage], inputs: Sequence[Any]) -> Tensor:
        """inputs: of the first stage, batch by batch -> [M, C]."""
        logits = []
        for value in inputs:
            for stage in following:
                value = stage.run(value)
            logits.append(value)
        return torch.cat(logits)

    def _fit(self, stage: Stage, inputs: Sequence[Any], trials: Sequence[Trial]) -> list[Tensor]:
        """Run one stage, and fit a quantizer for each site and width in `trials`; gives what comes out of the stage."""
        widths: dict[str, set[int]] = defaultdict(set)
        for name, bits in chain.from_iterable(trials):
            widths[name].add(bits)
        sites = [p for p in self.planned if p.site.name in widths]
        here = [path for path in self.means if stage.owns(f"{path}.input")]
        usual = tuple(self.is_apart(path) for path in here)
        seen = {usual: observe(self.module, sites, None, inputs, stage.run)}
        for bits in sorted(set().union(*widths.values())):
            apart = tuple(
                self.is_apart(path, bits if bits in widths.get(f"{path}.input", ()) else None) for path in here
            )
            if apart not in seen:
                with self._apart(dict(zip(here, apart, strict=True))):
                    seen[apart] = observe(self.module, sites, None, inputs, stage.run)
            at_bits = [replace(p, bits=bits) for p in sites if bits in widths[p.site.name]]
            for name, quantizer in fit_sites(self.module, at_bits, seen[apart]).items():
                self._quantizers[name, bits] = quantizer
        return seen[usual].outputs

    def _parameters(self, site: str) -> list[nn.Parameter]:
        """Learned tensors that are quantized as an activation, or with one."""
        if site == POSITION_EMBEDDING:
            return [self.module.pos_embed]
        return joined_tokens(self.module) if site == PATCH_TOKENS else []

    @contextmanager
    def _quantized(self, trial: Trial) -> Iterator[None]:
        with ExitStack() as undo:
            for name, bits in trial:
                quantizer = self._quantizers[name, bits]
                owner, _, slot = name.rpartition(".")
                if slot == "input" and owner in self.means:
                    undo.enter_context(self._apart({owner: self.is_apart(owner, bits)}))
                for parameter in self._parameters(name):
                    undo.callback(parameter.copy_, parameter.clone())
                if owner:
                    module = self.module.get_submodule(owner)
                    before = getattr(module, slot)
                    undo.callback(setattr, module, slot, before)
                if slot == "weight":
                    module.weight = quantizer(before)
                else:
                    place(self.module, name, quantizer)
            yield
