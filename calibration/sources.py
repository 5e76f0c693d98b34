"""Calibration images that somebody took: a folder of real images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from calibration.calibration_set import CalibrationSet, to_pixels
from calibration.errors import DfqError
from calibration.pictures import IMAGE_EXTENSIONS, images_below, read_image
from calibration.tokens import PatchGrid


def real_images(
    root: Path | str,
    grid: PatchGrid,
    transform: Callable[[Image.Image], Tensor],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    num_images: int,
    seed: int = 0,
) -> CalibrationSet:
    """`num_images` images drawn by `seed` from all that lie in or below `root`; their labels are not looked at.

    transform: PIL image -> [3, H, W], normalised: the model's own evaluation preprocessing.
    Raises DfqError where the folder is missing, holds too few images, or one cannot be read.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise DfqError(f"there is no folder {folder} to take calibration images from")
    paths = images_below(folder)
    if num_images < 1:
        raise DfqError(f"num_images must be at least 1, not {num_images}")
    if len(paths) < num_images:
        raise DfqError(
            f"{folder} holds {len(paths)} images ({', '.join(IMAGE_EXTENSIONS)}), and {num_images} are wanted: "
            "lower --num-images or give another folder"
        )
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [paths[index] for index in sorted(order[:num_images])]
    images = []
    for path in chosen:
        image = transform(read_image(path))
        if image.shape != (3, *grid.image_size):
            raise DfqError(f"the transform makes {path} {tuple(image.shape)}, the model takes {(3, *grid.image_size)}")
        images.append(to_pixels(image.unsqueeze(0), mean, std))
    return CalibrationSet(
        images=torch.cat(images),
        mask=torch.ones(num_images, grid.rows, grid.columns, dtype=torch.bool),
        labels=None,
        confidence=None,
        mean=mean,
        std=std,
        run={
            "method": "real",
            "folder": str(folder),
            "files": [path.relative_to(folder).as_posix() for path in chosen],
            "seed": seed,
            "mean": list(mean),
            "std": list(std),
        },
    )
