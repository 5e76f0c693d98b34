"""A few channels of an activation quantized apart from the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantizers.base import Quantizer
from quantizers.granularity import PerAxis, PerTensor
from quantizers.uniform import UniformQuantizer

if TYPE_CHECKING:
    from typing import Self

APART_BITS = 8


def outlier_channels(values: Tensor, ratio: float) -> Tensor:
    """The indices of channels whose largest magnitude is more than `ratio` times the median channel's.

    values: [..., C]; channels that are zero throughout are not counted. "Massive activations" (Sun et al., COLM 2024)
    show in one or two channels of a few tokens.
    """
    largest = values.flatten(0, -2).abs().amax(0)
    used = largest[largest > 0]
    if not len(used):
        return torch.empty(0, dtype=torch.int64, device=values.device)
    return (largest > ratio * used.median()).nonzero()[:, 0]


class OutlierQuantizer(Quantizer):
    """Channels (last axis) with outliers on 8-bit grids of their own, all others under one common quantizer.

    A matrix product over the channels is then the sum of two: over the common ones, and over those few. Integers have
    the dtype of the common quantizer; those of the channels apart have 8 bits, whatever `bits` says.

    Attributes:
        main: the quantizer of the other channels; its granularity is not per channel.
        apart: the uniform quantizer of the channels apart, one scale each, symmetric where `main` is signed.
        channels: int64 `[K]`, the channels apart, ascending.

    Args:
        main: fitted or not.
        channels: see above; None until `load_tensors`.

    Raises:
        ValueError: for a main quantizer with a range per axis or channels apart itself, or channels that are none, not
            int64, negative or not ascending.
    """

    channels: Tensor | None

    def __init__(self, main: Quantizer, channels: Tensor | None = None) -> None:
        super().__init__(main.bits)
        if isinstance(main, OutlierQuantizer) or not isinstance(getattr(main, "granularity", PerTensor()), PerTensor):
            raise ValueError("channels can be kept apart only from a quantizer with one range for all others")
        if channels is not None:
            _require_channels(channels)
        self.main = main
        self.apart = UniformQuantizer(APART_BITS, symmetric=main.signed, granularity=PerAxis(-1))
        self.register_buffer("channels", None if channels is None else channels.detach().clone())

    @property
    def signed(self) -> bool:
        """That of the main quantizer."""
        return self.main.signed

    @property
    def fitted(self) -> bool:
        """Whether both parts are."""
        return self.channels is not None and self.main.fitted and self.apart.fitted

    def describe(self) -> dict[str, Any]:
        """See `Quantizer.describe`."""
        return {"type": "outliers", "main": self.main.describe()}

    def tensors(self) -> dict[str, Tensor]:
        """`channels`, and the tensors of both parts as `main_...` and `apart_...`."""
        channels = self._channels_or_raise()
        parts = {"main": self.main, "apart": self.apart}
        named = {f"{part}_{name}": value for part, q in parts.items() for name, value in q.tensors().items()}
        return {"channels": channels} | named

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Become fitted with what `tensors()` gave.

        Raises ValueError for other names, channels that are not as in the constructor, or what the parts refuse.
        """
        unknown = [name for name in tensors if name != "channels" and not name.startswith(("main_", "apart_"))]
        if unknown or "channels" not in tensors:
            raise ValueError(
                "an OutlierQuantizer has the tensors channels, main_... and apart_..., not "
                f"{', '.join(sorted(tensors)) or 'none'}"
            )
        channels = tensors["channels"]
        _require_channels(channels)
        for part, quantizer in (("main_", self.main), ("apart_", self.apart)):
            quantizer.load_tensors({name[len(part) :]: t for name, t in tensors.items() if name.startswith(part)})
        if len(self.apart.tensors()["scale"]) != len(channels):
            raise ValueError(f"{len(channels)} channels apart need a scale each")
        self.channels = channels.detach().clone()
        return self

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"{0 if self.channels is None else len(self.channels)} channels apart at {APART_BITS} bits"

    def candidates(self, values: Tensor) -> list[dict[str, Tensor]]:
        """Those of the main quantizer; the channels apart stay as they are."""
        return self._with_apart(self.main.candidates(self._others(values)))

    def neighbours(self, spread: float) -> list[dict[str, Tensor]]:
        """Those of the main quantizer."""
        return self._with_apart(self.main.neighbours(spread))

    def _with_apart(self, candidates: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        fixed = {name: tensor for name, tensor in self.tensors().items() if not name.startswith("main_")}
        return [fixed | {f"main_{name}": tensor for name, tensor in one.items()} for one in candidates]

    def _fit(self, values: Tensor, importance: Tensor | None) -> None:
        self.apart.fit(values[..., self._channels_or_raise()])
        self.main.fit(self._others(values), None if importance is None else self._others(importance))

    def _others(self, values: Tensor) -> Tensor:
        """[..., C] -> [..., C - K]"""
        kept = torch.ones(values.shape[-1], dtype=torch.bool, device=values.device)
        kept[self._channels_or_raise()] = False
        return values[..., kept]

    def _quantize(self, values: Tensor) -> Tensor:
        channels = self._channels_or_raise()
        return self.main._quantize(values).index_copy_(-1, channels, self.apart._quantize(values[..., channels]))

    def _dequantize(self, q: Tensor) -> Tensor:
        channels = self._channels_or_raise()
        # Eight bits are too many for a main quantizer that looks its levels up.
        main = self.main._dequantize(q.index_fill(-1, channels, 0))
        return main.index_copy_(-1, channels, self.apart._dequantize(q[..., channels]))

    def _fake_quantize(self, values: Tensor) -> Tensor:
        channels = self._channels_or_raise()
        apart = self.apart._fake_quantize(values[..., channels])
        return self.main._fake_quantize(values).index_copy_(-1, channels, apart)

    def _inside(self, values: Tensor) -> Tensor:
        channels = self._channels_or_raise()
        return self.main._inside(values).index_copy_(-1, channels, self.apart._inside(values[..., channels]))

    def _channels_or_raise(self) -> Tensor:
        if self.channels is None:
            raise RuntimeError("OutlierQuantizer is not fitted; say which channels are apart")
        return self.channels


def _require_channels(channels: Tensor) -> None:
    if channels.dtype != torch.int64 or channels.dim() != 1 or channels.numel() == 0:
        raise ValueError(
            f"channels must be int64, of shape [K] with K at least 1, not {channels.dtype} of shape "
            f"{list(channels.shape)}"
        )
    if bool((channels < 0).any()) or bool((channels.diff() <= 0).any()):
        raise ValueError(f"channels must be ascending and not negative, not {channels.tolist()}")
