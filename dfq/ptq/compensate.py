"""Closed-form compensation: what rounding one column of weights loses, the columns still to be rounded make up for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantizers import PerAxis, PerGroup, Quantizer, UniformQuantizer

# Columns rounded before the others hear of it, in one product: only speed hangs on it.
_BLOCK = 64
# Every so many images are held out, where a damping is chosen by what it does to data it has not seen.
_HELD_OUT = 4


class SecondMoment:
    """Weighted second moment of a layer's inputs, `sum_t w_t x_t x_t^T`: the Hessian of its squared output error.

    A token's weight is its norm to the power `-2 * evenness`: 0 leaves the error to the few tokens with massive
    activations, 1 counts the relative error of every token alike; times its importance, where that is given.

    importance: [B, ...] of the tokens of each batch [B, ..., C] to come, in that order; None: all alike.
    """

    def __init__(self, evenness: float, importance: Sequence[Tensor] | None = None) -> None:
        self._evenness = evenness
        self._importance = None if importance is None else iter(importance)
        self._parts: dict[bool, tuple[Tensor, int]] = {}
        self._added = 0

    def add(self, x: Tensor) -> None:
        """x: [B, ..., C]; every fourth of B, counted over all that is added, is held out."""
        chosen = torch.arange(self._added, self._added + len(x), device=x.device) % _HELD_OUT == _HELD_OUT - 1
        self._added += len(x)
        squares = x.float().square().sum(-1, keepdim=True)
        scale = squares.clamp(min=torch.finfo(squares.dtype).tiny).pow(-self._evenness / 2)
        if self._importance is not None:
            scale = scale * next(self._importance).sqrt().unsqueeze(-1)
        weighted = x.float() * scale
        for held_out, rows in ((True, weighted[chosen]), (False, weighted[~chosen])):
            scaled = rows.flatten(0, -2)
            total, count = self._parts.get(held_out, (0.0, 0))
            self._parts[held_out] = (total + scaled.T @ scaled, count + len(scaled))

    def values(self) -> Tensor:
        """[C, C], per token."""
        return self._of(list(self._parts.values()))

    def split(self) -> tuple[Tensor, Tensor]:
        """The same of two parts: what was not held out, what was; with less than four images both are all there is."""
        if not all(count for _, count in self._parts.values()) or not self._parts:
            return self.values(), self.values()
        return self._of([self._parts[False]]), self._of([self._parts[True]])

    @staticmethod
    def _of(parts: Sequence[tuple[Tensor, int]]) -> Tensor:
        if not parts:
            raise RuntimeError("no activation passed this site")
        moment: Tensor = sum(total for total, _ in parts) / sum(count for _, count in parts)  # type: ignore[assignment]
        return moment


@torch.no_grad()
def round_compensated(
    weight: Tensor, quantizer: Quantizer, moment: SecondMoment, dampings: Sequence[float]
) -> tuple[Tensor, float]:
    """The integers of `weight` with the least output error that rounding column by column finds, and the damping used.

    weight: [out, in]; quantizer: fitted on it; dampings: candidates; the one whose integers have the least output
    error on held-out images is taken for all of them.
    """
    damping = dampings[0]
    if len(dampings) > 1:
        seen, held_out = moment.split()
        trials = zip(dampings, _round_columns(weight, quantizer, seen, dampings), strict=True)
        errors = {d: _output_error(quantizer.dequantize(integers) - weight, held_out) for d, integers in trials}
        damping = min(dampings, key=lambda d: errors[d])
    (integers,) = _round_columns(weight, quantizer, moment.values(), [damping])
    return integers, damping


def _output_error(difference: Tensor, moment: Tensor) -> float:
    return float(((difference @ moment) * difference).sum())


def _round_columns(weight: Tensor, quantizer: Quantizer, moment: Tensor, dampings: Sequence[float]) -> list[Tensor]:
    """GPTQ (ICLR 2023): column after column, each error spread over the columns still to come.

    weight: [out, in]; moment: [in, in]; dampings: what is added to the moment's diagonal, as a share of its mean; gives
    integers [out, in] for each. Columns with the largest diagonal go first (`act-order`), whatever the damping; so all
    are rounded side by side.
    """
    out, columns = weight.shape
    order = moment.diagonal().argsort(descending=True)
    factor = torch.stack([_spreading(moment[order][:, order], damping) for damping in dampings])
    remaining = weight.float()[:, order].repeat(len(dampings), 1, 1)
    integers = torch.empty_like(remaining, dtype=quantizer.dtype)
    grids = _by_column(quantizer, weight)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = remaining.new_empty(len(dampings), out, stop - start)
        for i in range(start, stop):
            # As a quantizer of weights takes them: [out, dampings].
            values = remaining[:, :, i].T
            grid = grids[int(order[i])]
            codes = grid.quantize(values)
            integers[:, :, order[i]] = codes.T
            error = (values - grid.dequantize(codes)).T / factor[:, i, i, None]
            errors[:, :, i - start] = error
            remaining[:, :, i:stop] -= error[:, :, None] * factor[:, None, i, i:stop]
        remaining[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
    return list(integers)


def _by_column(quantizer: Quantizer, weight: Tensor) -> list[Quantizer]:
    """For each column of weights [out, in] a quantizer that takes it alone, [out, ...]: of groups, each one's."""
    granularity = getattr(quantizer, "granularity", None)
    if not isinstance(quantizer, UniformQuantizer) or not isinstance(granularity, PerGroup):
        return [quantizer] * weight.shape[1]
    grids: list[Quantizer] = []
    parameters = {name: values.view(len(weight), -1) for name, values in quantizer.tensors().items()}
    for group in range(granularity.per_channel(weight)):
        grid = UniformQuantizer(quantizer.bits, symmetric=quantizer.symmetric, granularity=PerAxis(0))
        grid.load_tensors({name: values[:, group] for name, values in parameters.items()})
        grids += [grid] * min(granularity.size, weight.shape[1])
    return grids


def _spreading(moment: Tensor, damping: float) -> Tensor:
    """U [in, in], upper triangular with U^T U = H^-1: row i holds what column i's error does to those after it."""
    mean = moment.diagonal().mean().double().clamp(min=torch.finfo(torch.float32).tiny)
    # Channels that are never used leave a zero on the diagonal; something has to stand there whatever the damping.
    hessian = moment.double() + torch.eye(len(moment), device=moment.device) * (max(damping, 1e-6) * mean)
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    return factor.float()
