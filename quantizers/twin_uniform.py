"""Two uniform ranges whose scales differ by a power of two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from quantizers.base import Quantizer, require_integer, require_tensor_names

if TYPE_CHECKING:
    from typing import Self

GELU_MINIMUM = 0.16997  # -min(gelu(x)), at x = -0.7518

# m = 2^-i, i = 0..19: PTQ4ViT's candidates.
MAGNITUDE_EXPONENTS = range(0, 20)
# The positive range ends at 0.17 * 2^k (8 bits) or 0.085 * 2^k (2 bits): from 0.01 to beyond the largest of fp16.
SIGN_EXPONENTS = range(-4, 21)


class TwinUniformQuantizer(Quantizer):
    """Twin uniform quantization (PTQ4ViT, ECCV 2022).

    A power of two lies between the two scales, so that integer partial sums of both ranges combine by a shift. The
    exponent is searched by squared error; ties go to the one nearest zero. Below, `L = 2^(b-1) - 1`.

    split="magnitude", after softmax, for values in [0, 1] (others are clamped into it): small values, up to `m = 2^-i`
    with i in 0..19, have the scale `m / L`, large ones `1 / L`. Integers are uint8: the highest of the b bits flags the
    large range, the others are the magnitude.

    One deviation: a value above m that is nearer to m than to the next level of the large range becomes m. The paper's
    "large is x >= m" would round it to the nearest level of the large range, often 0: worse, and not monotonic. (The
    published code does neither; it adds two clamped halves, so that its large values come out too high by m.)

    split="sign", after GELU: negative values have the fixed scale `0.16997 / 2^(b-1)`, the others `2^k` times that,
    with k in -4..20. Integers are int8: negative ones use the negative scale, down to `-2^(b-1)`, the others the
    positive one, up to L.

    Attributes:
        exponent: int32 `[1]`, i or k; None until fitted.
        scale: fp32 `[2]`, of the small and the large, or the negative and the positive range; None until fitted.

    Args:
        bits: 2 to 8.
        split: "magnitude" or "sign".

    Raises:
        ValueError: for bits out of range or another split.
    """

    exponent: Tensor | None
    scale: Tensor | None
    _threshold: Tensor | None

    def __init__(self, bits: int, *, split: Literal["magnitude", "sign"]) -> None:
        super().__init__(bits)
        if split not in ("magnitude", "sign"):
            raise ValueError(f"split must be 'magnitude' (after softmax) or 'sign' (after GELU), not {split!r}")
        self.split = split
        self.register_buffer("exponent", None)
        self.register_buffer("scale", None)
        self.register_buffer("_threshold", None)

    @property
    def signed(self) -> bool:
        """True if split by sign."""
        return self.split == "sign"

    @property
    def exponents(self) -> range:
        """The exponents that are searched."""
        return SIGN_EXPONENTS if self.signed else MAGNITUDE_EXPONENTS

    def describe(self) -> dict[str, Any]:
        """See `Quantizer.describe`."""
        return {"type": "twin_uniform", "bits": self.bits, "split": self.split}

    def tensors(self) -> dict[str, Tensor]:
        """`exponent` int32 `[1]`; everything else follows from it."""
        self._require_fitted()
        assert self.exponent is not None  # for the type checker: fitted says so
        return {"exponent": self.exponent}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Become fitted with a given exponent. Raises ValueError unless it is one integer among `exponents`."""
        require_tensor_names(tensors, ("exponent",), "a TwinUniformQuantizer")
        exponent = tensors["exponent"]
        require_integer(exponent, "exponent")
        if int(exponent) not in self.exponents:
            raise ValueError(
                f"exponent must lie in [{self.exponents[0]}, {self.exponents[-1]}] for split {self.split!r}, "
                f"not {int(exponent)}"
            )
        self._set(int(exponent), exponent.device)
        return self

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{self.bits} bits, split={self.split!r}, fitted={self.fitted}"

    def candidates(self, values: Tensor) -> list[dict[str, Tensor]]:
        """All exponents, those nearest zero first."""
        return [_as_tensors(exponent, values.device) for exponent in sorted(self.exponents, key=abs)]

    def neighbours(self, spread: float) -> list[dict[str, Tensor]]:
        """The exponents beside the present one, whatever the spread."""
        exponent = self.tensors()["exponent"]
        beside = (int(exponent) - 1, int(exponent) + 1)
        return [_as_tensors(each, exponent.device) for each in beside if each in self.exponents]

    def _fit(self, values: Tensor, importance: Tensor | None) -> None:
        self._load_best(self.candidates(values), values, importance)

    def _grid(self, exponent: int) -> tuple[float, float, float]:
        """The first scale, the second, and the value from which the second one is used."""
        steps = 2 ** (self.bits - 1)
        if self.signed:
            negative = GELU_MINIMUM / steps
            return negative, negative * 2.0**exponent, 0.0
        top = steps - 1
        m = 2.0**-exponent
        next_level = (int(m * top) + 1) / top  # of the large range, above m
        return m / top, 1 / top, (m + next_level) / 2

    def _set(self, exponent: int, device: torch.device) -> None:
        first, second, threshold = self._grid(exponent)
        self.exponent = torch.tensor([exponent], dtype=torch.int32, device=device)
        self.scale = torch.tensor([first, second], dtype=torch.float32, device=device)
        self._threshold = torch.tensor(threshold, dtype=torch.float32, device=device)

    def _quantize(self, values: Tensor) -> Tensor:
        scale, threshold = self._parameters_or_raise()
        codes = self._clip((values / _scale_of(values, threshold, scale[0], scale[1])).round_())
        if not self.signed:
            codes.add_(_flag(values, threshold), alpha=2 ** (self.bits - 1))
        return codes.to(self.dtype)

    def _dequantize(self, q: Tensor) -> Tensor:
        scale, _ = self._parameters_or_raise()
        codes = q.to(torch.float32)
        flag_bit = 0 if self.signed else 2 ** (self.bits - 1)
        each = _scale_of(codes, flag_bit, scale[0], scale[1])
        return codes.sub_(_flag(codes, flag_bit), alpha=flag_bit).mul_(each)

    def _fake_quantize(self, values: Tensor) -> Tensor:
        scale, threshold = self._parameters_or_raise()
        each = _scale_of(values, threshold, scale[0], scale[1])
        return self._clip((values / each).round_()).mul_(each)

    def _inside(self, values: Tensor) -> Tensor:
        scale, threshold = self._parameters_or_raise()
        codes = (values / _scale_of(values, threshold, scale[0], scale[1])).round_()
        return codes == self._clip(codes.clone())

    def _clip(self, codes: Tensor) -> Tensor:
        """Rounded integers of either range clipped in place to what it holds, without the flag."""
        return codes.clamp_(-(2 ** (self.bits - 1)) if self.signed else 0, 2 ** (self.bits - 1) - 1)

    def _parameters_or_raise(self) -> tuple[Tensor, Tensor]:
        self._require_fitted()
        assert self.scale is not None
        assert self._threshold is not None
        return self.scale, self._threshold


def _as_tensors(exponent: int, device: torch.device) -> dict[str, Tensor]:
    return {"exponent": torch.tensor([exponent], dtype=torch.int32, device=device)}


def _flag(values: Tensor, threshold: Tensor | int) -> Tensor:
    """`values >= threshold` as fp32 0 and 1, broadcast."""
    # A bool result is not vectorised on CPU: 4x slower.
    return torch.ge(values, threshold, out=torch.empty(0, dtype=values.dtype, device=values.device))


def _scale_of(values: Tensor, threshold: Tensor | int, first: Tensor, second: Tensor) -> Tensor:
    """`where(values >= threshold, second, first)`; exact since the ratio is a power of two within 2^-20..2^20."""
    # torch.where takes 10x longer on CPU.
    return _flag(values, threshold).mul_(second / first - 1).add_(1).mul_(first)
