"""Levels that are the powers of a base: the quantizer of probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from quantizers.base import Quantizer, require_integer, require_tensor_names

if TYPE_CHECKING:
    from typing import Self

# AdaLog's r, a prime; a searched base is 2^(q / r).
DENOMINATOR = 37
NUMERATORS = range(1, 16 * DENOMINATOR + 1)

_OCTAVES_PER_STEP = {"2": 1.0, "sqrt2": 0.5}
# Octaves from the smallest level above zero to the largest: the candidates of a searched base.
_SPANS = [4 * 8 ** (step / 5) for step in range(6)]
_SCALES = [2 ** (-step / 1.5) for step in range(3)]  # in units of the largest value
_SPREADS = (0.2, 0.1, 0.05, 0.02)


class LogQuantizer(Quantizer):
    """Logarithmic quantization of values that are not negative (others are taken for zero).

    `q = clip(round(-log_b(x / s)), 0, 2^bits - 2)`, `x^ = s * b^-q`; the last integer, `2^bits - 1`, is kept for zero.
    Integers are uint8, 0 the largest value. base="2": FQ-ViT (IJCAI 2022, LIS); "sqrt2": RepQ-ViT (ICCV 2023, section
    3.4); "search": `b = 2^(q / 37)` with the integer q searched, AdaLog (ECCV 2024). Base and scale are searched by
    squared error.

    Two deviations. The published "out of range becomes 0" needs one level more than fits the bits: here zero is one of
    the 2^bits. And what lies below the smallest level becomes that level down to about half of it (half a step more
    than the whole steps of an octave), where the published formula makes it zero from half a step on: at 4 bits that
    saves a tenth of the squared error.

    Attributes:
        scale: fp32 `[1]`, the largest level; None until fitted.
        numerator: int32 `[1]`, q of the searched base, 1 to 592; None until fitted, absent for the other bases.

    Args:
        bits: 2 to 8.
        base: "2", "sqrt2" or "search".
        shift: added before quantizing and subtracted after dequantizing, so that values down to `-shift` can be taken:
            after GELU 0.17 (AdaLog, which folds it into the bias of the next layer). Then `-shift` is exact, not zero.

    Raises:
        ValueError: for bits out of range, another base, or a shift that is negative or not finite.
    """

    scale: Tensor | None
    numerator: Tensor | None
    _rate: Tensor | None
    _table: Tensor | None

    def __init__(self, bits: int, *, base: Literal["2", "sqrt2", "search"], shift: float = 0.0) -> None:
        super().__init__(bits)
        if base not in (*_OCTAVES_PER_STEP, "search"):
            raise ValueError(f"base must be '2', 'sqrt2' or 'search', not {base!r}")
        if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 <= shift < float("inf"):
            raise ValueError(f"shift must be a number that is finite and not negative, not {shift!r}")
        self.base = base
        self.shift = float(shift)
        self.register_buffer("scale", None)
        if base == "search":
            self.register_buffer("numerator", None)
        self.register_buffer("_rate", None)
        self.register_buffer("_table", None)

    @property
    def signed(self) -> bool:
        """Never."""
        return False

    def describe(self) -> dict[str, Any]:
        """See `Quantizer.describe`."""
        return {"type": "log", "bits": self.bits, "base": self.base, "shift": self.shift}

    def tensors(self) -> dict[str, Tensor]:
        """`scale` fp32 `[1]`, and of a searched base `numerator` int32 `[1]`."""
        self._require_fitted()
        assert self.scale is not None  # for the type checker: fitted says so
        if self.base != "search":
            return {"scale": self.scale}
        assert self.numerator is not None
        return {"scale": self.scale, "numerator": self.numerator}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Become fitted with given parameters.

        Raises ValueError for other names, a scale that is not one positive finite number, or a numerator that is not
        one integer in 1..592.
        """
        searched = self.base == "search"
        names = ("scale", "numerator") if searched else ("scale",)
        require_tensor_names(tensors, names, f"a LogQuantizer with base {self.base!r}")
        scale = tensors["scale"]
        if not scale.is_floating_point() or list(scale.shape) != [1]:
            raise ValueError(f"scale must be floating, of shape [1], not {scale.dtype} of shape {list(scale.shape)}")
        scale = scale.detach().to(torch.float32, copy=True)
        if not 0 < float(scale) < float("inf"):
            raise ValueError("scale must be positive and finite; these tensors are damaged or not a quantizer's")
        if searched:
            numerator = tensors["numerator"]
            require_integer(numerator, "numerator")
            if int(numerator) not in NUMERATORS:
                raise ValueError(f"numerator must lie in [1, {NUMERATORS[-1]}], not {int(numerator)}")
            self.numerator = numerator.detach().to(scale.device, torch.int32, copy=True)
            octaves_per_step = int(numerator) / DENOMINATOR
        else:
            octaves_per_step = _OCTAVES_PER_STEP[self.base]
        self.scale = scale
        self._rate = scale.new_tensor(-1 / octaves_per_step)
        self._table = (_values(self.bits, float(scale), octaves_per_step) - self.shift).to(scale)
        return self

    def candidates(self, values: Tensor) -> list[dict[str, Tensor]]:
        """Scales from the largest value down to 0.4 of it; of a searched base, levels that span 4 to 32 octaves."""
        largest = (values + self.shift).amax().clamp(min=0)
        largest = torch.where(largest > 0, largest.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
        scales = [(largest * factor).reshape(1) for factor in _SCALES]
        if self.base != "search":
            return [{"scale": scale} for scale in scales]
        numerators = sorted({max(1, round(DENOMINATOR * span / (self.qmax - 1))) for span in _SPANS})
        return [_as_tensors(scale, numerator) for numerator in numerators for scale in scales]

    def neighbours(self, spread: float) -> list[dict[str, Tensor]]:
        """Scale and numerator that differ by the share `spread`, the numerator at least by one."""
        scale = self.tensors()["scale"]
        scales = [scale, scale * (1 - spread), scale * (1 + spread)]
        if self.base != "search":
            return [{"scale": each} for each in scales[1:]]
        numerator = int(self.tensors()["numerator"])
        away = max(1, round(numerator * spread))
        numerators = [n for n in (numerator, numerator - away, numerator + away) if n in NUMERATORS]
        return [_as_tensors(each, n) for n in numerators for each in scales][1:]

    def extra_repr(self) -> str:
        """For `print(model)`."""
        shift = f", shift={self.shift}" if self.shift else ""
        return f"{self.bits} bits, base={self.base!r}{shift}, fitted={self.fitted}"

    def _fit(self, values: Tensor, importance: Tensor | None) -> None:
        self._load_best(self.candidates(values), values, importance)
        for spread in _SPREADS:
            self._load_best([self.tensors(), *self.neighbours(spread)], values, importance)

    def _quantize(self, values: Tensor) -> Tensor:
        table, _, _ = self._parameters_or_raise()
        index = self._index(values)
        zero = table[index.long()] == table[-2]
        return index.clamp_(max=self.qmax - 1).masked_fill_(zero, self.qmax).to(self.dtype)

    def _dequantize(self, q: Tensor) -> Tensor:
        table, _, _ = self._parameters_or_raise()
        index = q.to(torch.int32).masked_fill_(q >= self.qmax, len(table) - 2)
        return table.index_select(0, index.flatten()).view(q.shape)

    def _fake_quantize(self, values: Tensor) -> Tensor:
        table, _, _ = self._parameters_or_raise()
        # Not exp2 of the integers: on CPU its last bit depends on where in memory a value lies.
        return table.index_select(0, self._index(values).flatten()).view(values.shape)

    def _inside(self, values: Tensor) -> Tensor:
        _, scale, rate = self._parameters_or_raise()
        # Up to half a step above the largest level: the same as by the logarithms, without forming them again.
        highest = scale * torch.exp2(-0.5 / rate)
        return (values >= -self.shift) & (values <= highest - self.shift)

    def _index(self, values: Tensor) -> Tensor:
        """Where in the table each value is, int32."""
        table, _, _ = self._parameters_or_raise()
        last = len(table) - 1
        return self._logarithms(values).clamp_(0, last - 1).nan_to_num_(nan=last).to(torch.int32)

    def _logarithms(self, values: Tensor) -> Tensor:
        """`round(-log_b(x / s))`, not clipped; infinity for zero and below."""
        _, scale, rate = self._parameters_or_raise()
        shifted = values + self.shift if self.shift else values
        return (shifted / scale).relu_().log2_().mul_(rate).round_()

    def _parameters_or_raise(self) -> tuple[Tensor, Tensor, Tensor]:
        self._require_fitted()
        assert self._table is not None
        assert self.scale is not None
        assert self._rate is not None
        return self._table, self.scale, self._rate


def _values(bits: int, scale: float, octaves_per_step: float) -> Tensor:
    """What each rounded logarithm stands for, fp64: the levels, the smallest for one octave more, zeros, NaN.

    As long for one base as for another; the last zero is the second to last.
    """
    levels = scale * torch.exp2(-octaves_per_step * torch.arange(2**bits - 1, dtype=torch.float64))
    octave = int(1 / octaves_per_step)
    zeros = levels.new_zeros(DENOMINATOR - octave + 1)
    return torch.cat([levels, levels[-1:].expand(octave), zeros, levels.new_tensor([torch.nan])])


def _as_tensors(scale: Tensor, numerator: int) -> dict[str, Tensor]:
    return {"scale": scale, "numerator": torch.tensor([numerator], dtype=torch.int32, device=scale.device)}
