"""Quantizers of the two operands of a matrix product, found by the error of the product.

PTQ4ViT (ECCV 2022), section 3.3: of all candidates the one is taken whose error in the layer's *output* is least, every
output counting by its squared gradient ("Hessian-guided"); both operands are searched in turn, the other one quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from dfq.ptq.modules import QuantizedConv2d
from quantizers import PerAxis, Quantizer
from quantizers.ranges import chunk_elements

# By which share parameters are changed around the best coarse candidate, then around what that leads to, and so on.
_SPREADS = (0.2, 0.1, 0.05, 0.02)


@torch.no_grad()
def search_product(
    left: Tensor,
    right: Tensor,
    left_quantizer: Quantizer | None,
    right_quantizer: Quantizer | None,
    weight: Tensor | None = None,
    rounds: int = 1,
    *,
    transpose_right: bool = True,
) -> None:
    """Leave both quantizers with the best parameters found for `O = left @ right^T`.

    Minimises `sum(weight * (O^ - O)^2)`, O^ of the quantized operands, over the quantizers' candidates and then around
    the best of them. What a quantizer was fitted with is itself a candidate, so the error never grows; an unfitted one
    is fitted first. Groups that have outputs of their own (output channels of a weight, heads) take the best candidate
    each; groups that share all outputs (input channels) take the same one.

        linear          left x [N, in]                  right weights [out, in]
        convolution     left convolution_rows(x)        right weights [out, C * kh * kw]
        q k^T           left q [B, H, N, D]             right k [B, H, M, D]
        softmax(...) v  left probabilities [B, H, N, M] right v [B, H, M, D], transpose_right=False

    Args:
        left, right: fp32, finite. Twice their size and that of O is held: the caller bounds the rows. What only scales
            or shifts O can be left out.
        left_quantizer, right_quantizer: changed in place; None where the operand stays as it is.
        weight: how much the squared error of each output counts, of O's shape, not negative, such as `(dL/dO)^2`; None
            for all alike.
        rounds: how often both operands are searched; after the first round only around what was found.
        transpose_right: False for `O = left @ right`.

    Raises ValueError for shapes that do not fit each other, or less than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    product = _Product.of(left, right, weight, transpose_right)
    for quantizer, operand in ((left_quantizer, left), (right_quantizer, right)):
        if quantizer is not None and not quantizer.fitted:
            quantizer.fit(operand)
    rows, columns = left.dim() - 2, left.dim() - 1  # of O, and likewise the axes of the operands
    left_groups = _output_axis(left_quantizer, left, {rows: rows})
    right_groups = _output_axis(right_quantizer, right, {rows if transpose_right else columns: columns})
    for turn in range(rounds):
        if left_quantizer is not None:
            errors = partial(product.errors, right=_quantized(right, right_quantizer), groups=left_groups)
            _search(left_quantizer, left, errors, coarsely=turn == 0)
        if right_quantizer is not None:
            errors = partial(product.errors, _quantized(left, left_quantizer), groups=right_groups)
            _search(right_quantizer, right, errors, coarsely=turn == 0)


def convolution_rows(x: Tensor, layer: QuantizedConv2d) -> Tensor:
    """What a convolution multiplies its weights by, as the rows of a linear layer.

    x: [B, C, H, W] -> [B * L, C * kh * kw], L the number of output pixels in row-major order; times
    `weight.flatten(1)^T` it is the output [B, out, H', W'] as [B * L, out]. Raises ValueError for grouped convolutions.
    """
    if layer.groups != 1:
        raise ValueError(f"a convolution of {layer.groups} groups is not one matrix product")
    if isinstance(layer.padding, str):
        raise ValueError(f"padding {layer.padding!r} is not supported; give it in pixels")
    kernel = layer.weight.shape[-2:]
    columns = F.unfold(x, kernel, dilation=layer.dilation, padding=layer.padding, stride=layer.stride)
    return columns.transpose(1, 2).flatten(0, 1)


def fisher_logit_gradient(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A random gradient of the logits whose covariance is the Fisher information of their softmax.

    logits: [B, C] -> [B, C], `v = sqrt(p) e - p (sqrt(p) . e)` with e ~ N(0, I), so that `E[v v^T] = diag(p) - p p^T`.
    Propagated back to any layer's output, the mean of its square over a few draws is the Fisher diagonal there, of
    labels drawn from the model's own prediction: the weight that `search_product` takes. (The gradient of
    KL(prediction || prediction), which PTQ4ViT's code propagates, is zero up to rounding.)
    """
    probabilities = logits.detach().float().softmax(-1)
    noise = torch.randn(logits.shape, generator=generator, device=generator.device).to(logits.device)
    scaled = probabilities.sqrt() * noise
    return (scaled - probabilities * scaled.sum(-1, keepdim=True)).to(logits.dtype)


@dataclass(frozen=True)
class _Product:
    """`left @ right^T` (or `left @ right`) in full precision, and how much an error in each output counts."""

    exact: Tensor
    weight: Tensor | None
    transpose_right: bool

    @classmethod
    def of(cls, left: Tensor, right: Tensor, weight: Tensor | None, transpose_right: bool) -> _Product:
        contracted = right.shape[-1 if transpose_right else -2] if right.dim() > 1 else None
        if left.dim() != right.dim() or left.shape[:-2] != right.shape[:-2] or left.shape[-1] != contracted:
            raise ValueError(
                f"operands of shapes {list(left.shape)} and {list(right.shape)} have no product "
                f"{'left @ right^T' if transpose_right else 'left @ right'}"
            )
        exact = left @ (right.mT if transpose_right else right)
        if weight is not None:
            if weight.shape != exact.shape:
                raise ValueError(f"the weight has shape {list(weight.shape)}, and the product {list(exact.shape)}")
            # Squared gradients times squared errors can vanish in fp32.
            weight = weight / weight.amax().clamp(min=torch.finfo(weight.dtype).tiny)
        return cls(exact, weight, transpose_right)

    def errors(self, left: Tensor, right: Tensor, groups: int | None) -> Tensor:
        """The weighted squared error of other operands, fp64: for each index of the axis `groups`, or [1] if None."""
        others = [axis for axis in range(self.exact.dim()) if axis != groups]
        size = self.exact.shape[groups] if groups is not None else 1
        total = self.exact.new_zeros(size, dtype=torch.float64)
        step = max(1, _chunk_elements(left.device) // self.exact[0].numel())
        for start in range(0, len(left), step):
            part = slice(start, start + step)
            against = right[part] if right.dim() > 2 else right
            squares = left[part] @ (against.mT if self.transpose_right else against)
            squares.sub_(self.exact[part]).square_()
            if self.weight is not None:
                squares.mul_(self.weight[part])
            total += squares.sum(others if groups is not None else None)
        return total


def _chunk_elements(device: torch.device) -> int:
    """How many outputs are compared at a time: more than a CPU's cache holds, for the matrix product's sake."""
    return max(2**20, chunk_elements(device))


def _output_axis(quantizer: Quantizer | None, operand: Tensor, rows: Mapping[int, int]) -> int | None:
    """The axis of O on which the groups of an operand's quantizer lie, None where they share outputs.

    rows: from the operand's axis that O keeps to that axis of O.
    """
    granularity = getattr(quantizer, "granularity", None)
    if not isinstance(granularity, PerAxis):
        return None
    axis = granularity.axis % operand.dim()
    output = rows.get(axis, axis if axis < operand.dim() - 2 else None)
    return output or None  # O is walked along axis 0: groups there are searched as one


def _quantized(operand: Tensor, quantizer: Quantizer | None) -> Tensor:
    return operand if quantizer is None else quantizer(operand)


def _search(quantizer: Quantizer, operand: Tensor, errors: Callable[[Tensor], Tensor], *, coarsely: bool) -> None:
    """Load what gives the least error, of the present parameters, if `coarsely` all candidates, and the neighbours."""
    if coarsely:
        _load_best(quantizer, operand, errors, quantizer.candidates(operand))
    for spread in _SPREADS:
        _load_best(quantizer, operand, errors, quantizer.neighbours(spread))


def _load_best(
    quantizer: Quantizer,
    operand: Tensor,
    errors: Callable[[Tensor], Tensor],
    candidates: Sequence[Mapping[str, Tensor]],
) -> None:
    """Load for each group the best of the present parameters and the candidates."""
    present = {name: tensor.clone() for name, tensor in quantizer.tensors().items()}
    # One after the other: what can be batched, groups and rows, fills the machine as it is.
    tried = [present, *candidates]
    found = torch.stack([errors(quantizer.load_tensors(candidate)(operand)) for candidate in tried])
    best = found.argmin(0, keepdim=True)  # [1, G], or [1, 1]: all groups together
    stacked = {name: torch.stack([candidate[name] for candidate in tried]) for name in present}
    quantizer.load_tensors(
        {name: values.gather(0, best.expand(1, values.shape[1])).squeeze(0) for name, values in stacked.items()}
    )
