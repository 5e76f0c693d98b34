"""Jitter and flip, and where a kept patch goes under them (SMI, arXiv 2510.27186, appendix).

One draw serves the whole batch. A moved image is the same pixels in other places, so a patch that is still in play
has to be looked up where the augmentation put it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.tokens import PatchGrid


@dataclass(frozen=True)
class Move:
    """A circular roll by (`down`, `right`) pixels, then a horizontal flip if `flip`."""

    down: int = 0
    right: int = 0
    flip: bool = False

    def images(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W] -> moved, same shape."""
        if self.down or self.right:
            images = images.roll((self.down, self.right), dims=(-2, -1))
        return images.flip(-1) if self.flip else images

    def patches(self, grid: PatchGrid) -> Tensor:
        """Where each patch of the unmoved image lies after the move: LongTensor [N].

        A roll that is not a whole number of patches is rounded to the nearest one (a half away from zero), so a
        looked-up patch may be off by at most half a patch.
        """
        index = torch.arange(grid.num_patches)
        row = (index // grid.columns + _round_half_away(self.down / grid.height)) % grid.rows
        column = (index % grid.columns + _round_half_away(self.right / grid.width)) % grid.columns
        if self.flip:
            column = grid.columns - 1 - column
        return row * grid.columns + column


def _round_half_away(value: float) -> int:
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


STILL = Move()


@dataclass(frozen=True)
class RollAndFlip:
    """Independent rolls of up to `fraction` of the image's height and width, and a flip with p = 0.5."""

    fraction: float = 1 / 8

    def draw(self, count: int, image_size: tuple[int, int], generator: torch.Generator) -> list[Move]:
        """`count` moves from a CPU `generator`, drawn at once so that the loop never waits for randomness."""
        limits = [round(side * self.fraction) for side in image_size]
        down, right = (torch.randint(-limit, limit + 1, (count,), generator=generator).tolist() for limit in limits)
        flips = (torch.rand(count, generator=generator) < 0.5).tolist()
        return [Move(*draw) for draw in zip(down, right, flips, strict=True)]
