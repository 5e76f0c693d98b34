"""Block reconstruction: a quantized block tuned by gradients until it gives again what it gave in full precision."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from calibration.passes import low_precision, resolve_precision
from dfq.ptq.fitting import layer_of
from dfq.ptq.gradients import stage_importance
from dfq.ptq.modules import QuantizedLayer
from dfq.ptq.rounding import regulariser
from dfq.ptq.stages import Stage, stages, suffix
from dfq.ptq.stretch import away
from dfq.ptq.tuning import Tuned, tunable
from dfq.recipe import Reconstruction


class Reconstructor:
    """Tunes quantized stages one after the other.

    entering: what the quantized stages before give to the next one, batch by batch; to be set where a run goes on.

    network: adapted, in full precision; settings: of the recipe; batches: what enters the stem; run: the stem;
    gradients: what `token_gradients` found, where tokens are to count by them.
    """

    def __init__(
        self,
        network: nn.Module,
        settings: Reconstruction,
        batches: Sequence[Any],
        run: Callable[[Any], Tensor],
        gradients: Mapping[str, Sequence[Tensor]],
    ) -> None:
        self._network = network
        self._settings = settings
        self._gradients = gradients
        self.entering: Sequence[Any] = batches
        self._features: list[Tensor] = []
        if settings.feature > 0 and settings.stretch == 0:
            stem = stages(network)[0]
            self._features = [suffix(network, stem, run(batch)).feature for batch in batches]

    @torch.no_grad()
    def tune(
        self,
        stage: Stage,
        original: nn.Module | None,
        full: Sequence[Any],
        targets: Sequence[Tensor],
    ) -> None:
        """Tune the weights, scales, biases and norms of a stage; its integers and scales are replaced in place.

        Minimises the squared error of the stage's output, each token relative to its size, and, weighted, of the
        features at the end of the network (GLF-Q), straight through the roundings (STE for values, LSQ, ICLR 2020, for
        scales); weights, if the settings say so, by AdaRound. What enters is what the quantized stages before give,
        some elements of it in full precision (QDrop, ICLR 2022); stretched, if the settings say so, and so are then
        its targets.

        original: a copy of the stage's module before anything of it was quantized; full: what enters the stage in full
        precision, batch by batch; targets: what it gives then.
        """
        if stage.module is not None and original is not None:
            exact = {
                layer: layer_of(original, path).weight
                for path, layer in stage.module.named_modules()
                if isinstance(layer, QuantizedLayer)
            }
            with tunable(stage.module, exact, self._settings.rounding) as tuned, torch.enable_grad():
                self._descend(stage, original, tuned, full, targets)
        self.entering = [stage.run(batch) for batch in self.entering]

    @torch.no_grad()
    def _feature(self, stage: Stage, given: Tensor) -> Tensor:
        """At the end of the network, in full precision, of what a stage gave."""
        return suffix(self._network, stage, given).feature

    def _descend(
        self, stage: Stage, original: nn.Module, tuned: Tuned, full: Sequence[Tensor], targets: Sequence[Tensor]
    ) -> None:
        settings, device = self._settings, targets[0].device
        precision = resolve_precision("auto", device)
        importance = stage_importance(stage, self._gradients, settings.gradient)
        # Of the stage's own: what comes of it must not hang on whether those before it were tuned in this run.
        generator = torch.Generator().manual_seed(zlib.crc32(stage.name.encode()))

        def losses(batch: int, chosen: Tensor, entering: Tensor, target: Tensor) -> list[Tensor]:
            """Of a batch's chosen images: the error of the stage and, if asked for, of the features at the end."""
            with low_precision(device, precision):
                found = stage.run(entering)
                ending = suffix(self._network, stage, found) if settings.feature > 0 else None
            error = (found.float() - target).square().sum(-1) / target.square().sum(-1).clamp(min=_TINY)
            if importance is not None:
                # The tokens of a Swin lie on a grid in between its blocks, and in a row within.
                error = error * importance[batch][chosen].view_as(error)
            parts = [error.mean()]
            if ending is not None:
                wanted = self._features[batch][chosen] if self._features else self._feature(stage, target)
                parts.append((ending.feature.float() - wanted).square().mean())
            return parts

        optimizer, schedule = _optimizer(tuned, settings)
        weights: list[Tensor] = []
        for step in range(settings.iterations):
            batch, chosen = _draw(targets, settings.batch_size, generator)
            entering, exact, target = self.entering[batch][chosen], full[batch][chosen], targets[batch][chosen]
            dropped = torch.rand(entering.shape, generator=generator).to(device) < settings.drop
            if settings.stretch > 0:
                moved = away(exact, full[batch].mean(0), settings.stretch, generator)
                entering, exact = entering + moved, exact + moved
                with torch.no_grad():
                    target = original(exact)
            drawn = batch, chosen, torch.where(dropped, exact, entering), target
            if not weights:
                # Each in units of what it is with all weights rounded: their sizes differ from block to block.
                with torch.no_grad():
                    tuned.apply(hard=True)
                    units = losses(*drawn)
                weights = [w / unit.clamp(min=_TINY) for w, unit in zip((1.0, settings.feature), units, strict=False)]
            tuned.apply()
            total = torch.stack([w * loss for w, loss in zip(weights, losses(*drawn), strict=True)]).sum()
            pull = regulariser(tuned.roundings(), step / settings.iterations)
            if pull is not None:
                total = total + pull
            optimizer.zero_grad()
            total.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


_TINY = torch.finfo(torch.float32).tiny


def _draw(targets: Sequence[Tensor], count: int, generator: torch.Generator) -> tuple[int, Tensor]:
    """A batch, and `count` of its images or all: batches may differ in their number of tokens."""
    sizes = torch.tensor([len(batch) for batch in targets], dtype=torch.float32)
    batch = int(torch.multinomial(sizes, 1, generator=generator))
    return batch, torch.randperm(len(targets[batch]), generator=generator)[:count].to(targets[batch].device)


def _optimizer(tuned: Tuned, settings: Reconstruction) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Adam, its rates along half a cosine; that of AdaRound stays, for its regulariser does the most at the end."""

    def cosine(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * step / settings.iterations))

    adaround = settings.rounding == "adaround"
    rate = settings.rounding_rate if adaround else settings.weight_rate
    optimizer = torch.optim.Adam(
        [
            {"params": [weight.parameter for _, weight in tuned.layers], "lr": rate},
            {"params": tuned.scales, "lr": settings.scale_rate},
            {"params": tuned.others, "lr": settings.bias_rate},
        ]
    )
    return optimizer, LambdaLR(optimizer, [(lambda _: 1.0) if adaround else cosine, cosine, cosine])
