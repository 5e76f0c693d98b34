"""Quantized modules opened for tuning: weights, scales, biases and norms with gradients straight through roundings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfq.ptq.fitting import joined_tokens
from dfq.ptq.modules import AttentionSlots, QuantizedLayer
from dfq.ptq.rounding import AdaptiveRounding
from dfq.ptq.sites import POSITION_EMBEDDING
from dfq.recipe_values import Rounding
from quantizers import PerAxis, PerGroup, UniformQuantizer


@dataclass(frozen=True)
class Tuned:
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


@contextmanager
def tunable(module: nn.Module, exact: Mapping[QuantizedLayer, Tensor], rounding: Rounding = "ste") -> Iterator[Tuned]:
    """Open a quantized module for tuning; on leaving, its quantizers and integers are those of what was found.

    After an exception they are those from before; what is in floating point stays as far as it was tuned.

    exact: the weights of layers before they were rounded, of those where they are known: tuning starts there, as far
    as the integers allow. rounding: of weights, `ste` or `adaround`. Other quantizers than uniform ones stay.
    """
    # Before the grids take their slots, which have parameters too. Learned tokens and the position embedding stay: they
    # lie on grids of their own.
    fixed = {id(tensor) for tensor in (getattr(module, POSITION_EMBEDDING, None), *joined_tokens(module))}
    others = [parameter for parameter in module.parameters() if id(parameter) not in fixed]
    layers: list[tuple[QuantizedLayer, _StraightThrough | AdaptiveRounding]] = []
    grids: list[_LearnedGrid] = []
    replaced: list[tuple[nn.Module, str, UniformQuantizer]] = []
    slots = ("input", "output", "q", "k", "v", "scores", "softmax")
    for part in list(module.modules()):
        if isinstance(part, QuantizedLayer) and isinstance(part.weight_quantizer, UniformQuantizer):
            grid = _LearnedGrid(part.weight_quantizer)
            # Where the exact weight rounds to another integer than the compensated one, just inside that one's cell.
            half = 0.499 * grid.step(part.weight)
            start = part.weight + (exact.get(part, part.weight) - part.weight).clamp(-half, half)
            if rounding == "adaround":
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
    before = [layer.weight for layer, _ in layers]
    try:
        yield Tuned(layers, [grid.log_scale for grid in grids], others)
        with torch.no_grad():
            for grid in grids:
                grid.hand_over()
            for layer, weight in layers:
                assert layer.weight_quantizer is not None
                layer.set_integers(layer.weight_quantizer, layer.weight_quantizer.quantize(weight.hard()))
    except BaseException:
        for (layer, _), as_found in zip(layers, before, strict=True):
            layer.weight = as_found
        raise
    finally:
        for part, slot, quantizer in replaced:
            setattr(part, slot, quantizer)
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
        granularity = self.quantizer[0].granularity
        if isinstance(granularity, PerGroup):
            scale, zero_point = self.log_scale.exp()[:, None], self.zero_point[:, None]
            return granularity.from_groups(self._rounded(granularity.to_groups(x), scale, zero_point, [1]), x)
        axes = None
        if isinstance(granularity, PerAxis):
            own = granularity.axis % x.dim()
            axes = [axis for axis in range(x.dim()) if axis != own]
        return self._rounded(x, self.step(x), granularity.broadcast(self.zero_point, x), axes)

    def _rounded(self, x: Tensor, scale: Tensor, zero_point: Tensor, axes: list[int] | None) -> Tensor:
        quantizer = self.quantizer[0]
        lowest, highest = quantizer.qmin - zero_point, quantizer.qmax - zero_point
        rounded: Tensor = LearnedRounding.apply(x.float(), scale, lowest, highest, axes)
        return rounded

    def hand_over(self) -> None:
        """Give the quantizer the scale that was learned."""
        quantizer = self.quantizer[0]
        quantizer.load_tensors(quantizer.tensors() | {"scale": self.log_scale.detach().exp()})


class LearnedRounding(torch.autograd.Function):
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
