"""What stands where a sparse image has no patches, for networks that are to see it whole."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from calibration.calibration_set import CalibrationSet
from calibration.initial import dead_leaves

# Pictures of dead leaves drawn together.
_TOGETHER = 32


def leaves(count: int, image_size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Dead leaves as pictures: uint8 [count, 3, H, W]."""
    return (dead_leaves(count, image_size, generator) * 255).round().to(torch.uint8)


def with_leaves(images: CalibrationSet) -> CalibrationSet:
    """Sparse images with dead leaves behind their patches, so that all patches count; whole ones as they are.

    Every image has leaves of its own, those of one set the same each time.
    """
    if not images.is_sparse:
        return images
    generator = torch.Generator().manual_seed(0)
    pictures = images.images.clone()
    sparse = (~images.mask.flatten(1).all(1)).nonzero()[:, 0]
    for some in torch.split(sparse, _TOGETHER):
        ground = leaves(len(some), images.grid.image_size, generator)
        pictures[some] = torch.where(images.grid.to_pixels(images.mask[some]), pictures[some], ground)
    return replace(images, images=pictures, mask=torch.ones_like(images.mask))
