"""What stands behind the patches of sparse images."""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.background import with_leaves
from calibration.calibration_set import CalibrationSet

PIXELS, PATCHES = 32, 4


def a_set(mask: Tensor) -> CalibrationSet:
    """Images of one colour, which no dead leaves are; `mask`: [M, 4, 4]."""
    count = len(mask)
    return CalibrationSet(
        images=torch.full((count, 3, PIXELS, PIXELS), 77, dtype=torch.uint8),
        mask=mask,
        labels=torch.arange(count),
        confidence=torch.linspace(0, 1, count),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        run={"method": "test"},
        iterations=torch.arange(count),
    )


def test_patches_stay_and_leaves_fill_the_rest() -> None:
    mask = torch.zeros(3, PATCHES, PATCHES, dtype=torch.bool)
    mask[0, 1, 2] = mask[1, :, 0] = True
    mask[2] = True
    images = a_set(mask)
    whole = with_leaves(images)
    assert not whole.is_sparse
    # Patch (1, 2) is 8x8 pixels from row 8, column 16; column 0 of patches is 8 pixels wide.
    assert bool((whole.images[0, :, 8:16, 16:24] == 77).all())
    assert bool((whole.images[1, :, :, :8] == 77).all())
    assert bool((whole.images[2] == 77).all())
    first, second = whole.images[0, :, 16:], whole.images[1, :, 16:]
    for ground in (first, second[..., 8:]):
        assert ground.float().std() > 5
        assert len(ground.unique()) > 20
    assert not torch.equal(first[..., 8:], second[..., 8:])  # Leaves of its own for each.


def test_the_same_each_time_and_all_else_as_it_was() -> None:
    mask = torch.zeros(40, PATCHES, PATCHES, dtype=torch.bool)
    mask[:, :2, :2] = True
    images = a_set(mask)
    once, again = with_leaves(images), with_leaves(images)
    assert torch.equal(once.images, again.images)
    assert images.is_sparse
    assert bool((images.images == 77).all())
    for name in ("labels", "confidence", "iterations", "mean", "std", "run"):
        assert getattr(once, name) is getattr(images, name)
    rest = once.images[:, :, 16:].flatten(1)
    assert len(rest.unique(dim=0)) == 40


def test_whole_images_stay_as_they_are() -> None:
    images = a_set(torch.ones(2, PATCHES, PATCHES, dtype=torch.bool))
    assert with_leaves(images) is images
