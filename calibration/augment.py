"""Jitter and flip, and where a kept patch goes under them (SMI, arXiv 2510.27186, appendix).

One draw serves the whole batch. A moved image is the same pixels in other places, so a patch that is still in play
has to be looked up where the augmentation put it.
"""

from __future__ import annotations

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

    def undo(self, images: Tensor) -> Tensor:
        """The inverse of `images`, and so its gradient: it only changes places."""
        images = images.flip(-1) if self.flip else images
        return images.roll((-self.down, -self.right), dims=(-2, -1)) if self.down or self.right else images

    def patches(self, grid: PatchGrid) -> Tensor:
        """Where each patch of the unmoved image lies after the move: LongTensor [N]. See `patch_places`."""
        return patch_places([self], grid)[0]


def patch_places(moves: list[Move], grid: PatchGrid) -> Tensor:
    """Where each patch of the unmoved image lies after each move: LongTensor [moves, N].

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
    """Independent rolls of up to `fraction` of the image's height and width, and a flip with p = 0.5."""

    fraction: float = 1 / 8

    def draw(self, count: int, image_size: tuple[int, int], generator: torch.Generator) -> list[Move]:
        """`count` moves from a CPU `generator`, drawn at once so that the loop never waits for randomness."""
        limits = [round(side * self.fraction) for side in image_size]
        down, right = (torch.randint(-limit, limit + 1, (count,), generator=generator).tolist() for limit in limits)
        flips = (torch.rand(count, generator=generator) < 0.5).tolist()
        return [Move(*draw) for draw in zip(down, right, flips, strict=True)]
