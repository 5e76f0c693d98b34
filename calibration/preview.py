"""A picture of a calibration set, for eyes."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from calibration.calibration_set import CalibrationSet
from calibration.files import replace_file

# Light neutral: no image has it as its own background, and kept patches stand out in print.
BACKGROUND = 236
COLUMNS = 8
MOST = 32
TILE = 112


def write_preview(calibration: CalibrationSet, path: Path) -> None:
    """The first images, eight to a row; patches that are no part of the image are left blank."""
    shown = calibration.images[:MOST]
    inside = calibration.grid.to_pixels(calibration.mask[:MOST])
    tiles = torch.where(inside, shown, torch.tensor(BACKGROUND, dtype=torch.uint8))
    height, width = tiles.shape[-2:]
    zoom = max(1, round(TILE / height))
    tiles = tiles.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1)
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    gap = 4
    step_y, step_x = height * zoom + gap, width * zoom + gap
    sheet = torch.full((3, rows * step_y + gap, columns * step_x + gap), 255, dtype=torch.uint8)
    for index, tile in enumerate(tiles):
        top, left = gap + index // columns * step_y, gap + index % columns * step_x
        sheet[:, top : top + height * zoom, left : left + width * zoom] = tile
    picture = Image.fromarray(sheet.permute(1, 2, 0).numpy())
    replace_file(path, lambda partial: picture.save(partial, format="PNG"))
