"""Block reconstruction: a quantized block tuned by gradients until it gives again what it gave in full precision."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from calibration.passes import low_precision, resolve_precision
from dfq.ptq.gradients import stage_importance
from dfq.ptq.modules import AttentionSlots, QuantizedLayer
from dfq.ptq.rounding import AdaptiveRounding, regulariser
from dfq.ptq.stages import Stage, stages, suffix
from dfq.recipe import Reconstruction
from quantizers import UniformQuantizer
from quantizers.granularity import PerAxis


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
            with _tunable(stage.module, exact, self._settings) as tuned, torch.enable_grad():
                self._descend(stage, tuned, full, targets)
        self.entering = [run(batch) for batch in self.entering]

    def _descend(self, stage: Stage, tuned: _Tuned, full: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
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


@dataclass(frozen=True)
class _Tuned:
    """What is tuned of a stage: the weights of layers, the logarithms of scales, and other parameters as they are."""

    layers: list[tuple[QuantizedLayer, _StraightThrough | AdaptiveRounding]]
    scales: list[nn.Parameter]
    others: list[nn.Parameter]

    def roundings(self) -> list[AdaptiveRounding]:
        """Of the layers where it is learned."""
        return [weight for _, weight in self.layers if isinstance(weight, AdaptiveRounding)]

    def apply(self, *, hard: bool = False) -> None:
        """Give every layer its weights as they are now, with a gradient; hard: as they would be left now."""
        for layer, weight in self.layers:
            layer.weight = weight.hard() if hard else weight.soft()


def _optimizer(tuned: _Tuned, settings: Reconstruction) -> tuple[torch.optim.Optimizer, LambdaLR]:
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


@contextmanager
def _tunable(module: nn.Module, exact: Mapping[QuantizedLayer, Tensor], settings: Reconstruction) -> Iterator[_Tuned]:
    """Open a quantized module for tuning; on leaving, its quantizers and integers are those of what was found."""
    # Before the grids take their slots, which have parameters too.
    others = list(module.parameters())
    layers: list[tuple[QuantizedLayer, _StraightThrough | AdaptiveRounding]] = []
    grids: list[_LearnedGrid] = []
    replaced: list[tuple[nn.Module, str, UniformQuantizer]] = []
    slots = ("input", "output", "q", "k", "v", "scores", "softmax")
    for part in list(module.modules()):
        if isinstance(part, QuantizedLayer) and isinstance(part.weight_quantizer, UniformQuantizer):
            grid = _LearnedGrid(part.weight_quantizer)
            # Where the exact weight rounds to another integer than the compensated one, just inside that one's cell.
            half = 0.499 * grid.step(part.weight)
            start = part.weight + (exact[part] - part.weight).clamp(-half, half)
            if settings.rounding == "adaround":
                layers.append((part, AdaptiveRounding(start, part.weight_quantizer)))
            else:
                layers.append((part, _StraightThrough(start, grid)))
                grids.append(grid)
        if isinstance(part, QuantizedLayer | AttentionSlots):
            for slot in slots:
                quantizer = getattr(part, slot, None)
                if isinstance(quantizer, UniformQuantizer):
                    grid = _LearnedGrid(quantizer)
                    grids.append(grid)
                    replaced.append((part, slot, quantizer))
                    setattr(part, slot, grid)
    for parameter in others:
        parameter.requires_grad_(True)
    yield _Tuned(layers, [grid.log_scale for grid in grids], others)
    with torch.no_grad():
        for grid in grids:
            grid.hand_over()
        for part, slot, quantizer in replaced:
            setattr(part, slot, quantizer)
        for layer, weight in layers:
            assert layer.weight_quantizer is not None
            layer.set_integers(layer.weight_quantizer, layer.weight_quantizer.quantize(weight.hard()))
    for parameter in others:
        parameter.requires_grad_(False)


class _StraightThrough:
    """The weights of a layer, rounded to the nearest integer of a grid that is tuned with them.

    parameter: the weights in units of the mean step, so that one rate serves layers of any size.
    """

    def __init__(self, weight: Tensor, grid: _LearnedGrid) -> None:
        self._unit = grid.step(weight).detach().mean()
        self.parameter = nn.Parameter(weight / self._unit)
        self._grid = grid

    def soft(self) -> Tensor:
        """The weights as they are now, with a gradient."""
        return self.hard()

    def hard(self) -> Tensor:
        """The weights on their grid, which they always are."""
        weight: Tensor = self._grid(self.parameter * self._unit)
        return weight


class _LearnedGrid(nn.Module):
    """A fitted uniform quantizer whose scale has a gradient; zero points stay."""

    def __init__(self, quantizer: UniformQuantizer) -> None:
        super().__init__()
        assert quantizer.scale is not None
        assert quantizer.zero_point is not None
        self.quantizer = [quantizer]  # Not a submodule: its slot's tenant is this one for a while.
        self.log_scale = nn.Parameter(quantizer.scale.log())
        self.zero_point = quantizer.zero_point.float()

    def step(self, x: Tensor) -> Tensor:
        """The scale, shaped to broadcast against x."""
        return self.quantizer[0].granularity.broadcast(self.log_scale.exp(), x)

    def forward(self, x: Tensor) -> Tensor:
        quantizer = self.quantizer[0]
        zero_point = quantizer.granularity.broadcast(self.zero_point, x)
        axes = None
        if isinstance(quantizer.granularity, PerAxis):
            own = quantizer.granularity.axis % x.dim()
            axes = [axis for axis in range(x.dim()) if axis != own]
        lowest, highest = quantizer.qmin - zero_point, quantizer.qmax - zero_point
        rounded: Tensor = _LearnedRounding.apply(x.float(), self.step(x), lowest, highest, axes)
        return rounded

    def hand_over(self) -> None:
        """Give the quantizer the scale that was learned."""
        quantizer = self.quantizer[0]
        quantizer.load_tensors(quantizer.tensors() | {"scale": self.log_scale.detach().exp()})


class _LearnedRounding(torch.autograd.Function):
    """`s * clamp(round(x / s))`, its gradient straight through where not clipped; that of s as in LSQ, section 2.1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor, axes: list[int] | None) -> Tensor:
        code = (x / scale).round_()
        clipped = torch.minimum(torch.maximum(code, lowest), highest)
        inside = clipped == code
        rounded = clipped.mul_(scale)
        ctx.save_for_backward(x, scale, rounded, inside)
        ctx.axes = axes
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        x, scale, rounded, inside = ctx.saved_tensors
        passed = gradients[0] * inside
        # d(x^)/ds is (x^ - x) / s where not clipped, x^ / s where clipped.
        share = (gradients[0] * rounded).addcmul_(passed, x, value=-1)
        total = share.sum() if ctx.axes is None else share.sum(ctx.axes, keepdim=True)
        return passed, (total / scale).reshape(scale.shape), None, None, None
