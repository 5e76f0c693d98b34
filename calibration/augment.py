"""Jitter and flip, and where a kept patch goes under them (SMI, arXiv 2510.27186, appendix).

One draw serves the whole batch. A moved image is the same pixels in other places, so a patch that is still in play
has to be looked up where the augmentation put it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from calibration.tokens import PatchGrid


@dataclass(frozen=True)
class Move:
    """A circular roll by (`down`, `right`) pixels, then a horizontal flip if `flip`, then a look through `window`.

    window: top, left, height and width, in pixels, of what is seen, in the size of the whole; None: all of it.
    """

    down: int = 0
    right: int = 0
    flip: bool = False
    window: tuple[int, int, int, int] | None = None

    def images(self, images: Tensor) -> Tensor:
        """images: [B, 3, H, W] -> moved, same shape."""
        if self.down or self.right:
            images = images.roll((self.down, self.right), dims=(-2, -1))
        if self.flip:
            images = images.flip(-1)
        if self.window is None:
            return images
        top, left, height, width = self.window
        seen = images[..., top : top + height, left : left + width]
        return F.interpolate(seen, images.shape[-2:], mode="bilinear", align_corners=False)

    def patches(self, grid: PatchGrid) -> Tensor:
        """Where each patch of the unmoved image lies, but for a window: LongTensor [N]. See `patch_places`."""
        return patch_places([self], grid)[0]


def patch_places(moves: list[Move], grid: PatchGrid) -> Tensor:
    """Where each patch of the unmoved image lies after each move, windows aside: LongTensor [moves, N].

    A roll that is not a whole number of patches is rounded to the nearest one (a half away from zero), so a
    looked-up patch may be off by at most half a patch.
    """
    draws = torch.tensor([(move.down, move.right, move.flip) for move in moves]).view(-1, 3, 1)
    row = torch.arange(grid.rows).repeat_interleave(grid.columns)
    column = torch.arange(grid.columns).repeat(grid.rows)
    row = (row + _nearest(draws[:, 0], grid.height)) % grid.rows
    column = (column + _nearest(draws[:, 1], grid.width)) % grid.columns
    column = torch.where(draws[:, 2].bool(), grid.columns - 1 - column, column)
    return row * grid.columns + column


def _nearest(pixels: Tensor, patch: int) -> Tensor:
    """pixels: integers -> whole patches, a half rounded away from zero; exact, in integers."""
    return pixels.sign() * ((2 * pixels.abs() + patch) // (2 * patch))


STILL = Move()


@dataclass(frozen=True)
class RollAndFlip:
    """Independent rolls of up to `fraction` of the image's height and width, and a flip with p = 0.5.

    smallest: side of the smallest window, in those of the image, 1 for none; it may lie anywhere.
    """

    fraction: float = 1 / 8
    smallest: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= 1:
            raise ValueError(f"the side of the smallest window must be above 0 and at most 1, not {self.smallest}")

    def draw(self, count: int, image_size: tuple[int, int], generator: torch.Generator) -> list[Move]:
        """`count` moves from a CPU `generator`, drawn at once so that the loop never waits for randomness."""
        limits = [round(side * self.fraction) for side in image_size]
        down, right = (torch.randint(-limit, limit + 1, (count,), generator=generator).tolist() for limit in limits)
        flips = (torch.rand(count, generator=generator) < 0.5).tolist()
        windows = self._windows(count, image_size, generator) if self.smallest < 1 else [None] * count
        return [Move(*draw) for draw in zip(down, right, flips, windows, strict=True)]

    def _windows(
        self, count: int, image_size: tuple[int, int], generator: torch.Generator
    ) -> list[tuple[int, int, int, int]]:
        whole = torch.tensor(image_size)
        sides = self.smallest + (1 - self.smallest) * torch.rand(count, 1, generator=generator)
        sizes = (whole * sides).round().clamp_min(1).long()
        corners = (torch.rand(count, 2, generator=generator) * (whole - sizes + 1)).long()
        return [
            (top, left, height, width)
            for (top, left), (height, width) in zip(corners.tolist(), sizes.tolist(), strict=True)
        ]
