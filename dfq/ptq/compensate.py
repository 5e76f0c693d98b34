"""Closed-form compensation: what rounding one column of weights loses, the columns still to be rounded make up for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantizers import Quantizer

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
        trials = {d: quantizer.dequantize(_round_columns(weight, quantizer, seen, d)) for d in dampings}
        damping = min(dampings, key=lambda d: _output_error(trials[d] - weight, held_out))
    return _round_columns(weight, quantizer, moment.values(), damping), damping


def _output_error(difference: Tensor, moment: Tensor) -> float:
    return float(((difference @ moment) * difference).sum())


def _round_columns(weight: Tensor, quantizer: Quantizer, moment: Tensor, damping: float) -> Tensor:
    """GPTQ (ICLR 2023): column after column, each error spread over the columns still to come.

    weight: [out, in]; moment: [in, in]; damping: what is added to the moment's diagonal, as a share of its mean.
    Columns with the largest diagonal go first (`act-order`).
    """
    out, columns = weight.shape
    mean = moment.diagonal().mean().double().clamp(min=torch.finfo(torch.float32).tiny)
    # Channels that are never used leave a zero on the diagonal; something has to stand there whatever the damping.
    hessian = moment.double() + torch.eye(columns, device=weight.device) * (max(damping, 1e-6) * mean)
    order = hessian.diagonal().argsort(descending=True)
    hessian = hessian[order][:, order]
    # U upper triangular with U^T U = H^-1: row i holds what column i's error does to those after it.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    remaining = weight.float()[:, order]
    integers = torch.empty_like(weight, dtype=quantizer.dtype)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = torch.empty(out, stop - start, device=weight.device)
        for i in range(start, stop):
            codes = quantizer.quantize(remaining[:, i : i + 1])
            integers[:, order[i]] = codes[:, 0]
            errors[:, i - start] = (remaining[:, i] - quantizer.dequantize(codes)[:, 0]) / factor[i, i]
            remaining[:, i:stop] -= errors[:, i - start, None] * factor[i, i:stop]
        remaining[:, stop:] -= errors @ factor[start:stop, stop:]
    return integers
