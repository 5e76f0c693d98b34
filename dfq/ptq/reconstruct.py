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
from dfq.ptq.gradients import stage_importance
from dfq.ptq.modules import QuantizedLayer
from dfq.ptq.rounding import regulariser
from dfq.ptq.stages import Stage, stages, suffix
from dfq.ptq.tuning import Tuned, tunable
from dfq.recipe import Reconstruction


def exact_weights(stage: Stage) -> dict[QuantizedLayer, Tensor]:
    """The weights of a stage's layers as they are: to be taken before they are rounded."""
    layers = () if stage.module is None else stage.module.modules()
    return {layer: layer.weight for layer in layers if isinstance(layer, QuantizedLayer)}


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
        if settings.feature > 0:
            stem = stages(network)[0]
            self._features = [suffix(network, stem, run(batch)).feature for batch in batches]

    @torch.no_grad()
    def tune(
        self,
        stage: Stage,
        exact: Mapping[QuantizedLayer, Tensor],
        full: Sequence[Any],
        targets: Sequence[Tensor],
        run: Callable[[Any], Tensor],
    ) -> None:
        """Tune the weights, scales, biases and norms of a stage; its integers and scales are replaced in place.

        Minimises the squared error of the stage's output, each token relative to its size, and, weighted, of the
        features at the end of the network (GLF-Q), straight through the roundings (STE for values, LSQ, ICLR 2020, for
        scales); weights, if the settings say so, by AdaRound. What enters is what the quantized stages before give,
        some elements of it in full precision (QDrop, ICLR 2022).

        exact: the weights of the stage's layers before they were rounded; full: what enters the stage in full
        precision, batch by batch; targets: what it gives then; run: the stage.
        """
        if stage.module is not None:
            with tunable(stage.module, exact, self._settings.rounding) as tuned, torch.enable_grad():
                self._descend(stage, tuned, full, targets)
        self.entering = [run(batch) for batch in self.entering]

    def _descend(self, stage: Stage, tuned: Tuned, full: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        settings, device = self._settings, targets[0].device
        precision = resolve_precision("auto", device)
        importance = stage_importance(stage, self._gradients, settings.gradient)
        # Of the stage's own: what comes of it must not hang on whether those before it were tuned in this run.
        generator = torch.Generator().manual_seed(zlib.crc32(stage.name.encode()))

        def losses(batch: int, chosen: Tensor, entering: Tensor) -> list[Tensor]:
            """Of a batch's chosen images: the error of the stage and, if asked for, of the features at the end."""
            with low_precision(device, precision):
                found = stage.run(entering)
                ending = suffix(self._network, stage, found) if self._features else None
            target = targets[batch][chosen]
            error = (found.float() - target).square().sum(-1) / target.square().sum(-1).clamp(min=_TINY)
            parts = [(error if importance is None else error * importance[batch][chosen]).mean()]
            if ending is not None:
                parts.append((ending.feature.float() - self._features[batch][chosen]).square().mean())
            return parts

        optimizer, schedule = _optimizer(tuned, settings)
        weights: list[Tensor] = []
        for step in range(settings.iterations):
            batch, chosen = _draw(targets, settings.batch_size, generator)
            entering = self.entering[batch][chosen]
            dropped = torch.rand(entering.shape, generator=generator).to(device) < settings.drop
            drawn = batch, chosen, torch.where(dropped, full[batch][chosen], entering)
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
