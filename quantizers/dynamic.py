"""A grid of its own for every token, found when the token comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from quantizers.base import require_tensor_names
from quantizers.ranges import scale_and_zero_point
from quantizers.uniform import EvenQuantizer

if TYPE_CHECKING:
    from typing import Self

# Of a token's own min-max range.
_RATIOS = [1 - step / 20 for step in range(13)]


class DynamicQuantizer(EvenQuantizer):
    """Dynamic per-token quantization: as `UniformQuantizer`, with a scale s and a zero point z of each token's own.

    `q = clamp(round(x / s) + z, qmin, qmax)`, `x^ = s (q - z)`. A token is what lies along the last axis, the one that
    a matrix product sums over: so that its scale is a factor of everything the product gives for this token. Its range
    goes from the smallest to the largest of its values, and holds zero, both ends times one ratio for all tokens. That
    ratio is all that is fitted, so there is little for calibration images to get wrong. A token of zeros gets scale 1.

    Integers alone do not say what they stand for: `dequantize` raises TypeError, `grid` has what is missing. NaN or
    infinity in a token make all of it NaN.

    Attributes:
        ratio: fp32 `[1]`, above 0 and at most 1; None until fitted.

    Args:
        bits: 2 to 8.
        symmetric: signed integers with z = 0, otherwise affine unsigned ones.
        searched: whether `fit` finds the ratio with the least squared error, of 0.4, 0.45, ... 1; otherwise it is 1.

    Raises:
        ValueError: for bits out of range, or an argument of another kind.
    """

    ratio: Tensor | None

    def __init__(self, bits: int, *, symmetric: bool, searched: bool = True) -> None:
        super().__init__(bits)
        for name, value in (("symmetric", symmetric), ("searched", searched)):
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, not {value!r}")
        self.symmetric = symmetric
        self.searched = searched
        self.register_buffer("ratio", None)

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each token of floating `x` `[..., C]`: fp32 and int32, `[..., 1]`."""
        values, ratio = x.detach().float(), self._ratio_or_raise()
        low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        return scale_and_zero_point(low * ratio, high * ratio, self.bits, self.symmetric)

    def describe(self) -> dict[str, Any]:
        """See `Quantizer.describe`."""
        return {"type": "dynamic", "bits": self.bits, "symmetric": self.symmetric, "searched": self.searched}

    def tensors(self) -> dict[str, Tensor]:
        """`ratio` fp32 `[1]`."""
        return {"ratio": self._ratio_or_raise()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Become fitted with a given ratio. Raises ValueError unless it is one floating number in (0, 1]."""
        require_tensor_names(tensors, ("ratio",), "a DynamicQuantizer")
        ratio = tensors["ratio"]
        if not ratio.is_floating_point() or list(ratio.shape) != [1]:
            raise ValueError(f"ratio must be floating, of shape [1], not {ratio.dtype} of shape {list(ratio.shape)}")
        ratio = ratio.detach().to(torch.float32, copy=True)
        if not 0 < float(ratio) <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1, not {float(ratio)}")
        self.ratio = ratio
        return self

    def candidates(self, values: Tensor) -> list[dict[str, Tensor]]:
        """Ratios from 1 down to 0.4, or 1 alone if none is searched."""
        ratios = _RATIOS if self.searched else _RATIOS[:1]
        return [{"ratio": torch.tensor([ratio], device=values.device)} for ratio in ratios]

    def neighbours(self, spread: float) -> list[dict[str, Tensor]]:
        """Smaller and larger by the share `spread`, the latter at most 1; none if the ratio is not searched."""
        if not self.searched:
            return []
        ratio = self._ratio_or_raise()
        return [{"ratio": ratio * (1 - spread)}, {"ratio": (ratio * (1 + spread)).clamp(max=1)}]

    def extra_repr(self) -> str:
        """For `print(model)`."""
        kind = "symmetric" if self.symmetric else "affine"
        return f"{self.bits} bits, {kind}, each token its own range, fitted={self.fitted}"

    def _fit(self, values: Tensor, importance: Tensor | None) -> None:
        self._load_best(self.candidates(values), values, importance)

    def _chunks(self, tensor: Tensor, elements: int) -> Sequence[Tensor]:
        tokens = tensor.reshape(-1, tensor.shape[-1])
        return torch.split(tokens, max(1, elements // tokens.shape[1]))

    def _broadcast(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = self.grid(x)
        return scale, zero_point.float()

    def _dequantize(self, q: Tensor) -> NoReturn:
        raise TypeError("without the scale of their token integers stand for nothing: see DynamicQuantizer.grid")

    def _ratio_or_raise(self) -> Tensor:
        self._require_fitted()
        assert self.ratio is not None
        return self.ratio
