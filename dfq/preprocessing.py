"""How a photograph becomes an input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from dfq.errors import UsageError

_INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")
_MAX_SIDE = 2**14
_LARGEST = torch.finfo(torch.float32).max
_CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Preprocessing:
    """How a photograph becomes an input: resize, centre crop, normalise. Raises UsageError for what cannot be meant."""

    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.9
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        sides = self.image_size
        if len(sides) != 2 or not all(type(side) is int and 1 <= side <= _MAX_SIDE for side in sides):
            raise UsageError(f"image_size must be two whole numbers from 1 to {_MAX_SIDE}, not {sides}")
        if len(self.mean) != 3 or not all(abs(value) <= _LARGEST for value in self.mean):
            raise UsageError(f"mean must be three finite numbers, not {self.mean}")
        if len(self.std) != 3 or not all(0.0 < value <= _LARGEST for value in self.std):
            raise UsageError(f"std must be three positive numbers, not {self.std}")
        if not 0.0 < self.crop_pct <= 1.0:
            raise UsageError(f"crop_pct must lie above 0 and at most at 1, not {self.crop_pct}")
        if max(sides) / self.crop_pct > _MAX_SIDE:
            raise UsageError(f"crop_pct {self.crop_pct} would have images enlarged to more than {_MAX_SIDE} pixels")
        for name, value, known in (
            ("interpolation", self.interpolation, _INTERPOLATIONS),
            ("crop_mode", self.crop_mode, _CROP_MODES),
        ):
            if value not in known:
                raise UsageError(f"unknown {name} {value!r}: choose from {', '.join(known)}")

    def to_dict(self) -> dict[str, Any]:
        """For JSON, and `Preprocessing.from_dict`."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Preprocessing:
        """What `to_dict` gave."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in content.items()
        }
        return cls(**values)

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """PIL image -> [3, H, W], normalised (timm's evaluation transform)."""
        transform: Callable[[Image.Image], Tensor] = create_transform(
            input_size=(3, *self.image_size),
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        return transform

    def describe(self) -> str:
        """One line for people."""
        height, width = self.image_size
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return (
            f"{height}x{width}, {self.interpolation}, crop {self.crop_pct:g} ({self.crop_mode}), "
            f"mean ({mean}), std ({std})"
        )
