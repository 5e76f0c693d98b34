from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from calibration.calibration_set import CalibrationSet
from calibration.errors import DfqError
from calibration.preview import write_preview

GAP, BLANK, PAPER = 4, 236, 255


def a_set(count: int, side: int = 56, mask: torch.Tensor | None = None) -> CalibrationSet:
    """Image i is of the colour (i, 2 i, 3 i): 2x2 patches."""
    colours = torch.arange(count).view(-1, 1) * torch.tensor([1, 2, 3])
    return CalibrationSet(
        images=colours.to(torch.uint8)[..., None, None].expand(-1, -1, side, side).contiguous(),
        mask=torch.ones(count, 2, 2, dtype=torch.bool) if mask is None else mask,
        labels=None,
        confidence=None,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )


def picture(calibration: CalibrationSet, path: Path) -> np.ndarray:
    write_preview(calibration, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.mode == "RGB"
        return np.asarray(image)


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (5, 1, 5), (8, 1, 8), (11, 2, 8), (40, 4, 8)])
def test_eight_to_a_row_and_thirty_two_at_most(tmp_path: Path, count: int, rows: int, columns: int) -> None:
    sheet = picture(a_set(count), tmp_path / "preview.png")
    step = 2 * 56 + GAP
    assert sheet.shape == (rows * step + GAP, columns * step + GAP, 3)
    for index in range(rows * columns):
        top, left = GAP + index // columns * step, GAP + index % columns * step
        tile = sheet[top : top + 112, left : left + 112]
        colour = (index, 2 * index, 3 * index) if index < count else (PAPER,) * 3
        assert (tile == colour).all()
    assert (sheet[:GAP] == PAPER).all()
    assert (sheet[:, -GAP:] == PAPER).all()
    assert (sheet[step : step + GAP] == PAPER).all()


def test_patches_that_are_no_part_of_the_image_are_blank(tmp_path: Path) -> None:
    mask = torch.tensor([[[True, False], [False, True]], [[False, False], [True, False]]])
    sheet = picture(a_set(2, mask=mask), tmp_path / "preview.png")
    for index in range(2):
        tile = sheet[GAP : GAP + 112, GAP + index * 116 : GAP + index * 116 + 112]
        for row in range(2):
            for column in range(2):
                patch = tile[row * 56 : row * 56 + 56, column * 56 : column * 56 + 56]
                inside = bool(mask[index, row, column])
                assert (patch == ((index, 2 * index, 3 * index) if inside else (BLANK,) * 3)).all()


@pytest.mark.parametrize(("side", "shown"), [(32, 4 * 32), (224, 224), (600, 600)])
def test_small_images_are_enlarged_by_whole_pixels(tmp_path: Path, side: int, shown: int) -> None:
    # 112 / 32 = 3.5 is rounded to even.
    assert picture(a_set(1, side), tmp_path / "preview.png").shape == (shown + 8, shown + 8, 3)


def test_the_pixels_are_in_their_places(tmp_path: Path) -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 112, 112), dtype=np.uint8))
    calibration = CalibrationSet(pixels, torch.ones(1, 7, 7, dtype=torch.bool), None, None, (0.5,) * 3, (0.5,) * 3)
    sheet = picture(calibration, tmp_path / "preview.png")
    assert (sheet[GAP:-GAP, GAP:-GAP] == pixels[0].permute(1, 2, 0).numpy()).all()


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "preview.png"
    with pytest.raises(DfqError, match=f"^cannot write {path}: No such file or directory$"):
        write_preview(a_set(1), path)
