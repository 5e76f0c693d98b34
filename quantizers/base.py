"""What every quantizer does: fit, quantize, dequantize, and the two in one with a gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantizers.ranges import chunk_elements

if TYPE_CHECKING:
    from typing import Self

MIN_BITS, MAX_BITS = 2, 8


class Quantizer(nn.Module, ABC):
    """Real numbers to integers of `bits` bits and back.

    Life cycle: made unfitted; `fit(x)` finds the parameters, as often as wanted; then `quantize`, `dequantize` and
    `forward` use them. A quantizer used before it is fitted raises RuntimeError. The parameters are buffers: they move
    with the module, but stay fp32 under `.half()` and the like.

    Raises ValueError unless `bits` is an integer from 2 to 8.
    """

    bits: int

    def __init__(self, bits: int) -> None:
        super().__init__()
        require_bits(bits)
        self.bits = bits

    @property
    @abstractmethod
    def signed(self) -> bool:
        """Whether the integers are int8 `[-2^(b-1), 2^(b-1) - 1]`; otherwise they are uint8 `[0, 2^b - 1]`."""

    @property
    def qmin(self) -> int:
        """The smallest integer."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The largest integer."""
        return self.qmin + self.num_levels - 1

    @property
    def num_levels(self) -> int:
        """How many integers there are."""
        return int(2**self.bits)

    @property
    def dtype(self) -> torch.dtype:
        """Of the integers: int8 if signed, else uint8."""
        return torch.int8 if self.signed else torch.uint8

    @property
    def fitted(self) -> bool:
        """Whether the parameters have been found (or loaded)."""
        return all(buffer is not None for buffer in self._buffers.values())

    @torch.no_grad()
    def fit(self, x: Tensor, importance: Tensor | None = None) -> Self:
        """Find the parameters from values like those to be quantized.

        Args:
            x: floating, of any shape the granularity can group.
            importance: how much the squared error of each value counts, non-negative, broadcastable to `x`; None for
                all alike. Only searches by error look at it.

        Raises:
            ValueError: if `x` is empty, not floating, or holds NaN or infinity (also as fp32); if `importance` is not
                finite, negative somewhere, or does not broadcast to `x`.
        """
        _require_floating(x)
        if x.numel() == 0:
            raise ValueError(f"a quantizer cannot be fitted on an empty tensor (shape {list(x.shape)})")
        values = x.detach().float()
        if not bool(values.isfinite().all()):
            raise ValueError(
                f"a quantizer cannot be fitted on NaN or infinity, found in {int((~values.isfinite()).sum())} of "
                f"{x.numel()} values; look for the layer that made them"
            )
        self._fit(values, None if importance is None else _checked_importance(importance, values))
        return self

    @torch.no_grad()
    def quantize(self, x: Tensor) -> Tensor:
        """The integers (`self.dtype`) of floating `x`, in its shape. What NaN becomes is undefined."""
        self._require_fitted()
        _require_floating(x)
        return self._quantize(x.float())

    @torch.no_grad()
    def dequantize(self, q: Tensor) -> Tensor:
        """The fp32 values that integers stand for. Raises ValueError unless `q` has the quantizer's dtype."""
        self._require_fitted()
        if q.dtype != self.dtype:
            raise ValueError(f"this quantizer's integers are {self.dtype}, not {q.dtype}; pass what its quantize gave")
        return self._dequantize(q)

    def forward(self, x: Tensor) -> Tensor:
        """Fake quantization: exactly `dequantize(quantize(x))`, in the dtype of `x`, NaN kept.

        The gradient is straight-through: identity where `x` is inside the representable range (rounds to an integer in
        `[qmin, qmax]`), zero where it was clipped.
        """
        self._require_fitted()
        _require_floating(x)
        differentiable = x.requires_grad and torch.is_grad_enabled()
        with torch.no_grad():
            values = x.detach().float()
            result = self._fake_quantize(values).to(x.dtype)
            if not differentiable:
                return result
            inside = self._inside(values)
        straight_through: Tensor = _StraightThrough.apply(x, result, inside)
        return straight_through

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything but the fitted tensors, JSON-able; `build` takes it back."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The fitted tensors by short name; `build` and `load_tensors` take them back."""

    @abstractmethod
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Become fitted with given parameters (copied). Raises ValueError for names or values that cannot be right."""

    @abstractmethod
    def candidates(self, values: Tensor) -> list[dict[str, Tensor]]:
        """Parameters that any search may try for values like these, coarsely spread over all that make sense.

        values: fp32, finite, not empty. Each entry is what `load_tensors` takes, its tensors `[G]`; so an entry that
        takes one group's parameters from one candidate and another's from another is one too.
        """

    @abstractmethod
    def neighbours(self, spread: float) -> list[dict[str, Tensor]]:
        """Like `candidates`, but around the present parameters, which are changed by about the share `spread`."""

    @abstractmethod
    def _fit(self, values: Tensor, importance: Tensor | None) -> None:
        """Find the parameters from fp32, finite, non-empty `values`, and an importance of their shape."""

    @abstractmethod
    def _quantize(self, values: Tensor) -> Tensor:
        """fp32 to integers."""

    @abstractmethod
    def _dequantize(self, q: Tensor) -> Tensor:
        """Integers to fp32."""

    @abstractmethod
    def _fake_quantize(self, values: Tensor) -> Tensor:
        """fp32 to fp32, equal to `_dequantize(_quantize(values))`, without the integers; must not write to `values`."""

    @abstractmethod
    def _inside(self, values: Tensor) -> Tensor:
        """Bool: where fp32 `values` are not clipped."""

    def _load_best(self, candidates: Sequence[Mapping[str, Tensor]], values: Tensor, importance: Tensor | None) -> None:
        """Load the candidate with the least squared error on `values` as a whole; of equals, the first."""
        width = chunk_elements(values.device)
        parts = self._chunks(values, width)
        weights = [None] * len(parts) if importance is None else self._chunks(importance, width)
        errors = values.new_zeros(len(candidates), dtype=torch.float64)
        for error, candidate in zip(errors, candidates, strict=True):
            self.load_tensors(candidate)
            for part, weight in zip(parts, weights, strict=True):
                squares = self._fake_quantize(part).sub_(part).square_()
                error += (squares if weight is None else squares.mul_(weight)).sum()
        self.load_tensors(candidates[int(errors.argmin())])

    def _chunks(self, tensor: Tensor, elements: int) -> Sequence[Tensor]:
        """`tensor` in parts of about so many elements, each of which can be quantized by itself."""
        return torch.split(tensor.flatten(), elements)

    def _require_fitted(self) -> None:
        if not self.fitted:
            raise RuntimeError(f"{type(self).__name__} is not fitted; call fit(x) before using it")

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # nn.Module's .half() and .to(dtype) would round the scales of every quantizer in a model.
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class _StraightThrough(torch.autograd.Function):
    """Gives `result` for `x`; passes the gradient to `x` where `inside`.

    `x + (result - x).detach()` would do, were it not for its rounding: its value is not quite on the grid.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, result: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(inside)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None


def require_bits(bits: int) -> None:
    """Raise ValueError unless `bits` is an integer from 2 to 8."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be an integer from {MIN_BITS} to {MAX_BITS}, not {bits!r}")


def require_tensor_names(tensors: Mapping[str, Tensor], names: tuple[str, ...], owner: str) -> None:
    """Raise ValueError unless `tensors` are exactly those called `names`."""
    if set(tensors) != set(names):
        raise ValueError(f"{owner} has the tensors {', '.join(names)}, not {', '.join(sorted(tensors)) or 'none'}")


def require_integer(tensor: Tensor, name: str) -> None:
    """Raise ValueError unless `tensor` is one integer, `[1]`."""
    kind = tensor.dtype
    if kind.is_floating_point or kind.is_complex or kind == torch.bool or list(tensor.shape) != [1]:
        raise ValueError(f"{name} must be one integer of shape [1], not {kind} of shape {list(tensor.shape)}")


def _require_floating(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(
            f"a quantizer takes floating values, not {x.dtype}; convert them first, for example by .float()"
        )


def _checked_importance(importance: Tensor, values: Tensor) -> Tensor:
    """`importance` in fp32, expanded to the shape of `values`."""
    weights = importance.detach().float()
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError("the importance of a value must be finite and not negative")
    try:
        return weights.expand_as(values)
    except RuntimeError as error:
        raise ValueError(
            f"an importance of shape {list(weights.shape)} does not broadcast to values of shape {list(values.shape)}"
        ) from error
