"""Evenly spaced levels: the quantizer of integer matrix multiplication."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantizers.base import Quantizer, require_tensor_names
from quantizers.granularity import Granularity, PerAxis, PerGroup, PerTensor
from quantizers.ranges import MinMax, RangeSearch, scale_and_zero_point

if TYPE_CHECKING:
    from typing import Self
# Of the min-max range, as candidates of searches that look at more than the values themselves.
_FACTORS = [0.8**step for step in range(14)]


class EvenQuantizer(Quantizer):
    """What all grids with even steps share: `q = clamp(round(x / s) + z, qmin, qmax)`, wherever s and z come from."""

    symmetric: bool

    @property
    def signed(self) -> bool:
        """True if symmetric."""
        return self.symmetric

    @abstractmethod
    def _broadcast(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, both fp32, shaped to broadcast against `x`, fp32 or integers."""

    def _quantize(self, values: Tensor) -> Tensor:
        scale, zero_point = self._broadcast(values)
        code = self._clipped(values, scale, zero_point)
        # Added after clipping, where both are small: to round(x / s) of a huge x it would be lost in fp32.
        return (code if self.symmetric else code.add_(zero_point)).to(self.dtype)

    def _fake_quantize(self, values: Tensor) -> Tensor:
        scale, zero_point = self._broadcast(values)
        return self._clipped(values, scale, zero_point).mul_(scale)

    def _inside(self, values: Tensor) -> Tensor:
        scale, zero_point = self._broadcast(values)
        code = (values / scale).round_()
        return (code >= self.qmin - zero_point) & (code <= self.qmax - zero_point)

    def _clipped(self, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """`q - z` as a new fp32 tensor."""
        code = (values / scale).round_()
        if self.symmetric:
            return code.clamp_(self.qmin, self.qmax)
        # Not clamp_(low, high): with tensor bounds it is not vectorised on CPU, 10x slower.
        torch.maximum(code, self.qmin - zero_point, out=code)
        return torch.minimum(code, self.qmax - zero_point, out=code)


class UniformQuantizer(EvenQuantizer):
    """`q = clamp(round(x / s) + z, qmin, qmax)`, `x^ = s (q - z)`; ties round to even.

    Symmetric: signed integers `[-2^(b-1), 2^(b-1) - 1]` with z = 0. Otherwise affine: unsigned integers `[0, 2^b - 1]`
    whose range always holds zero, so that zero is exact. A group of zeros gets scale 1.

    Attributes:
        scale: fp32 `[G]`, None until fitted; G is 1 per tensor, the size of the axis, or the number of groups.
        zero_point: int32 `[G]`, None until fitted.

    Args:
        bits: 2 to 8.
        symmetric: see above.
        granularity: which elements share a scale.
        search: how the range is found by `fit`.

    Raises:
        ValueError: for bits out of range, or an argument of another kind.
    """

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(
        self,
        bits: int,
        *,
        symmetric: bool,
        granularity: Granularity = PerTensor(),  # noqa: B008 (frozen)
        search: RangeSearch = MinMax(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(bits)
        if not isinstance(symmetric, bool):
            raise ValueError(f"symmetric must be True or False, not {symmetric!r}")
        if not isinstance(granularity, PerTensor | PerAxis | PerGroup):
            raise ValueError(f"granularity must be PerTensor(), PerAxis(axis) or PerGroup(size), not {granularity!r}")
        if isinstance(search, type) or not isinstance(search, RangeSearch):
            raise ValueError(f"search must be a range search such as MinMax() or range_search('mse'), not {search!r}")
        self.symmetric = symmetric
        self.granularity = granularity
        self.search = search
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    def describe(self) -> dict[str, Any]:
        """See `Quantizer.describe`."""
        return {
            "type": "uniform",
            "bits": self.bits,
            "symmetric": self.symmetric,
            "granularity": self.granularity.to_dict(),
            "search": self.search.to_dict(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """`scale` fp32 `[G]`, and if affine `zero_point` `[G]` of `self.dtype` (symmetric: it is always 0).

        Of groups, which are many, the scale is fp16 if that holds all of them.
        """
        scale, zero_point = self._parameters_or_raise()
        if isinstance(self.granularity, PerGroup) and torch.equal(scale.half().float(), scale):
            scale = scale.half()
        return self._named(scale, zero_point)

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Become fitted with the tensors that `tensors()` gave, or others of their kind.

        Raises ValueError for other names, a scale that is not floating `[G]`, positive and finite, or a zero point that
        is not integers `[G]` within `[qmin, qmax]`.
        """
        names = ("scale",) if self.symmetric else ("scale", "zero_point")
        require_tensor_names(tensors, names, f"{'a symmetric' if self.symmetric else 'an affine'} UniformQuantizer")
        scale = tensors["scale"]
        if not scale.is_floating_point() or scale.dim() != 1 or scale.numel() == 0:
            raise ValueError(
                f"scale must be floating, of shape [groups], not {scale.dtype} of shape {list(scale.shape)}"
            )
        if isinstance(self.granularity, PerTensor) and len(scale) != 1:
            raise ValueError(f"a quantizer per tensor has one scale, not {len(scale)}; is its granularity PerAxis?")
        scale = scale.detach().to(torch.float32, copy=True)
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError("every scale must be positive and finite; these tensors are damaged or not a quantizer's")
        if self.symmetric:
            zero_point = torch.zeros_like(scale, dtype=torch.int32)
        else:
            zero_point = tensors["zero_point"]
            kind = zero_point.dtype
            if kind.is_floating_point or kind.is_complex or kind == torch.bool or zero_point.shape != scale.shape:
                raise ValueError(
                    f"zero_point must be integers of the scale's shape {list(scale.shape)}, not {kind} of shape "
                    f"{list(zero_point.shape)}"
                )
            if not bool(((zero_point >= self.qmin) & (zero_point <= self.qmax)).all()):
                raise ValueError(f"every zero point must lie in [{self.qmin}, {self.qmax}] at {self.bits} bits")
            zero_point = zero_point.detach().to(scale.device, torch.int32, copy=True)
        self.scale, self.zero_point = self._kept(scale), zero_point
        return self

    def candidates(self, values: Tensor) -> list[dict[str, Tensor]]:
        """Each group's min-max range, both ends scaled by the same factor, from 1 to 1/20."""
        low, high = MinMax()(self.granularity.to_groups(values), self.bits, self.symmetric)
        return [self._grid(low * factor, high * factor) for factor in _FACTORS]

    def neighbours(self, spread: float) -> list[dict[str, Tensor]]:
        """Ranges with both ends moved, or one of them unless the other is zero or follows it by symmetry."""
        scale, zero_point = self._parameters_or_raise()
        high = (self.qmax - zero_point) * scale
        low = -high if self.symmetric else -zero_point * scale
        less, more = 1 - spread, 1 + spread
        factors = [(less, less), (more, more)]
        if not self.symmetric and bool(low.any()) and bool(high.any()):
            factors += [(1.0, less), (1.0, more), (less, 1.0), (more, 1.0)]
        return [self._grid(low * first, high * second) for first, second in factors]

    def extra_repr(self) -> str:
        """For `print(model)`."""
        kind = "symmetric" if self.symmetric else "affine"
        return f"{self.bits} bits, {kind}, {self.granularity}, {self.search}, fitted={self.fitted}"

    def _fit(self, values: Tensor, importance: Tensor | None) -> None:
        weights = None if importance is None else self.granularity.to_groups(importance)
        low, high = self.search(self.granularity.to_groups(values), self.bits, self.symmetric, weights)
        scale, self.zero_point = scale_and_zero_point(low, high, self.bits, self.symmetric)
        self.scale = self._kept(scale)

    def _kept(self, scale: Tensor) -> Tensor:
        """As it is kept: of groups rounded to fp16 where its normal numbers reach, within 0.05 %."""
        if not isinstance(self.granularity, PerGroup):
            return scale
        normal = (scale >= torch.finfo(torch.float16).tiny) & (scale <= torch.finfo(torch.float16).max)
        return torch.where(normal, scale.half().float(), scale)

    def _grid(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        return self._named(*scale_and_zero_point(low, high, self.bits, self.symmetric))

    def _named(self, scale: Tensor, zero_point: Tensor) -> dict[str, Tensor]:
        # To be kept, a zero point needs no more than the integers it is one of; int32 is for arithmetic.
        return {"scale": scale} if self.symmetric else {"scale": scale, "zero_point": zero_point.to(self.dtype)}

    def _dequantize(self, q: Tensor) -> Tensor:
        scale, zero_point = self._broadcast(q)
        code = q.to(torch.float32)
        return (code if self.symmetric else code.sub_(zero_point)).mul_(scale)

    def _broadcast(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = self._parameters_or_raise()
        return self.granularity.broadcast(scale, x), self.granularity.broadcast(zero_point.to(torch.float32), x)

    def _parameters_or_raise(self) -> tuple[Tensor, Tensor]:
        self._require_fitted()
        assert self.scale is not None
        assert self.zero_point is not None
        return self.scale, self.zero_point
