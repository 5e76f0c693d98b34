"""The pool: images that came from the teacher, what it makes of them, and how each network is shown them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from calibration import CalibrationSet
from calibration.calibration_set import normalise
from calibration.passes import low_precision
from calibration.tokens import PatchGrid, keep_of_mask, token_gather
from dfq.models import Network

BATCH = 32
"""Images that pass a network at once where no gradient is taken."""


@dataclass(frozen=True)
class View:
    """A network, and how it is shown pictures: in its own normalisation, patches that are not kept in the mean colour.

    A VisionTransformer whose patches are those of the pictures is given the kept ones alone. To no network do the two
    come to the same: a token that is there is attended to, whatever its colour. dtype: of the passes.
    """

    network: Network
    dtype: torch.dtype

    def __call__(self, images: Tensor, mask: Tensor) -> Tensor:
        """images: uint8 [B, 3, H, W], mask: bool [B, rows, columns], as many patches kept in each -> logits [B, C]."""
        network = self.network
        module: Any = network.module
        images, mask = images.to(network.device), mask.to(network.device)
        pixels = normalise(images, network.preprocessing.mean, network.preprocessing.std)
        with ExitStack() as stack:
            stack.enter_context(low_precision(network.device, self.dtype))
            if not bool(mask.all()):
                grid = PatchGrid.tiling(images, mask)
                pixels = pixels * grid.to_pixels(mask)
                if isinstance(module, VisionTransformer) and PatchGrid.of(module) == grid:
                    stack.enter_context(token_gather(module)).keep = keep_of_mask(mask)
            return network(pixels).float()


def of_one_size(mask: Tensor) -> Iterator[Tensor]:
    """mask: bool [M, rows, columns] -> indices of the images that keep equally many patches, for each number."""
    counts = mask.flatten(1).sum(1)
    for count in sorted(set(counts.tolist())):
        yield (counts == count).nonzero()[:, 0]


class Pool:
    """Images as they come, and the teacher's logits for each, taken once.

    hold_out: of so many images the last one is never drawn, 0 for none.
    """

    def __init__(self, teacher: View, hold_out: int) -> None:
        self._teacher, self._hold_out = teacher, hold_out
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, part: CalibrationSet) -> None:
        """Take in images, and ask the teacher what it makes of them."""
        logits = torch.empty(len(part), self._teacher.network.num_classes)
        with torch.inference_mode():
            for alike in of_one_size(part.mask):
                for some in torch.split(alike, BATCH):
                    logits[some] = self._teacher(part.images[some], part.mask[some]).cpu()
        parts = [*self._parts, (part.images, part.mask, logits.clone())]
        self._parts = [tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))]  # type: ignore[list-item]

    @property
    def images(self) -> Tensor:
        """uint8 [M, 3, H, W]"""
        return self._parts[0][0]

    @property
    def mask(self) -> Tensor:
        """bool [M, rows, columns]"""
        return self._parts[0][1]

    @property
    def logits(self) -> Tensor:
        """[M, C], the teacher's"""
        return self._parts[0][2]

    def __len__(self) -> int:
        return len(self._parts[0][0]) if self._parts else 0

    @property
    def trained_on(self) -> Tensor:
        """Indices of the images that may be drawn."""
        return self._split()[0]

    @property
    def held_out(self) -> Tensor:
        """Indices of those that may not."""
        return self._split()[1]

    def _split(self) -> tuple[Tensor, Tensor]:
        places = torch.arange(len(self))
        if not self._hold_out:
            return places, places[:0]
        last = places % self._hold_out == self._hold_out - 1
        return places[~last], places[last]
