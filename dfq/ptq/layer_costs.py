"""What each layer costs at each of several widths: the table that mixed precision chooses from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from calibration import CalibrationSet
from dfq.errors import UsageError
from dfq.models import Model
from dfq.ptq.engine import kept_state
from dfq.ptq.modules import QuantizedLayer
from dfq.ptq.probe import Probe
from dfq.ptq.sensitivity import NUM_IMAGES, Sensitivity, make_probe, site_trials, summarize
from dfq.ptq.sites import plan_sites
from dfq.recipe import DEFAULT_RECIPE, Bits, Recipe
from quantizers import packed_length

WIDTHS = (4, 6, 8)


@dataclass(frozen=True)
class Layer:
    """A layer whose bits are to be chosen: by bits, the KL that they cost alone and the bytes of its integers, and of
    its means of positions where its input has so few.

    sites: what gets the bits: the weights, and where activations have fewer than 8 bits the input too, since an integer
    product takes both operands at one width.
    """

    name: str
    sites: tuple[str, ...]
    costs: dict[int, float]
    sizes: dict[int, int]


@dataclass(frozen=True)
class LayerCosts:
    """The layers of a model whose bits are to be chosen; other_kl, other_bytes: of all that is not."""

    probe: Probe
    sensitivity: Sensitivity
    layers: tuple[Layer, ...]
    other_kl: float
    other_bytes: int

    @property
    def largest_bytes(self) -> int:
        """Of the model with the most bits in every layer."""
        return self.other_bytes + sum(layer.sizes[max(WIDTHS)] for layer in self.layers)


def layer_costs(
    model: Model,
    bits: str = "w4a4",
    *,
    calibration: CalibrationSet | Path | str | None = None,
    recipe: Recipe | Path | str = DEFAULT_RECIPE,
    num_images: int = NUM_IMAGES,
    batch_size: int = 16,
    progress: bool = True,
) -> LayerCosts:
    """What every layer whose bits the recipe leaves to the run costs at 4, 6 and 8 bits; `sensitivity` is part of it.

    The arguments are those of `sensitivity`; bits: of everything else. Raises DfqError as it does, and UsageError where
    the recipe fixes the bits of every layer.
    """
    probe = make_probe(model, bits, calibration, recipe, num_images, batch_size)
    free = _free_layers(probe)
    if not free:
        raise UsageError(f"recipe {probe.recipe.name} fixes the bits of every layer: there is nothing to choose")
    alone = site_trials(probe)
    trials = {(name, width): tuple((site, width) for site in sites) for name, sites in free.items() for width in WIDTHS}
    # Each once: weights that are all there is of a layer to choose are among the sites too.
    costs = probe.costs(dict.fromkeys([*alone.values(), *trials.values()]), progress=progress)
    layers = tuple(
        Layer(
            name,
            sites,
            {width: costs[trials[name, width]].kl for width in WIDTHS},
            {
                width: packed_length(probe.weight(name).numel(), width) + _mean_bytes(probe, name, width, sites)
                for width in WIDTHS
            },
        )
        for name, sites in free.items()
    )
    chosen = {site for layer in layers for site in layer.sites}
    return LayerCosts(
        probe=probe,
        sensitivity=summarize(probe, costs),
        layers=layers,
        other_kl=sum(costs[trial].kl for name, trial in alone.items() if name not in chosen),
        other_bytes=_other_bytes(probe, free),
    )


def _free_layers(probe: Probe) -> dict[str, tuple[str, ...]]:
    """Layers whose bits follow those of the run, and the sites of each that get its bits."""
    # Found by trying: recipes fix bits in more than one way.
    low, high = (plan_sites(probe.module, probe.recipe, Bits(width, width)) for width in (min(WIDTHS), max(WIDTHS)))
    free = [p.site for p, other in zip(low, high, strict=True) if p.bits != other.bits]
    both = probe.bits.activations is not None and probe.bits.activations < max(WIDTHS)
    slots = ("input", "weight") if both else ("weight",)
    return {
        site.owner: tuple(other.name for other in free if other.owner == site.owner and other.slot in slots)
        for site in free
        if site.is_weight
    }


def _mean_bytes(probe: Probe, name: str, width: int, sites: Collection[str]) -> int:
    """Of the means of positions of a layer, which are there where its input has ranges per token."""
    if name not in probe.means or not probe.is_apart(name, width if f"{name}.input" in sites else None):
        return 0
    return sum(tensor.nbytes for tensor in probe.means[name].buffers())


def _other_bytes(probe: Probe, free: Collection[str]) -> int:
    """Of the quantized model (`QuantizedModel.weight_bytes`), all but what a free layer has in its `sizes`."""
    widths = {p.site.owner: p.bits for p in probe.planned if p.site.is_weight}
    state = kept_state(probe.module)
    kept = [tensor for name, tensor in state.items() if name.partition(".position_mean.")[0] not in free]
    for p in probe.planned:
        kept += probe.quantizer(p.site.name, p.bits).tensors().values()
    packed = 0
    for path, layer in probe.module.named_modules():
        if isinstance(layer, QuantizedLayer) and path not in free:
            if path in widths:
                packed += packed_length(layer.weight.numel(), widths[path])
            else:
                kept.append(layer.weight)
    return packed + sum(tensor.nbytes for tensor in kept)
