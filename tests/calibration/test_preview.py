from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from calibration.calibration_set import CalibrationSet
from calibration.errors import DfqError
from calibration.preview import write_preview

GAP, BLANK, PAPER = 4, (220, 229, 241), 255
FONT = ImageFont.load_default(12)
assert isinstance(FONT, ImageFont.FreeTypeFont)
# Over and under the base line, and the gap.
LINE = sum(FONT.getmetrics()) + GAP


def a_set(count: int, side: int = 56, mask: torch.Tensor | None = None, *, labelled: bool = False) -> CalibrationSet:
    """Image i is of the colour (i, 2 i, 3 i): 2x2 patches; its label, where it has one, is i + 1."""
    colours = torch.arange(count).view(-1, 1) * torch.tensor([1, 2, 3])
    return CalibrationSet(
        images=colours.to(torch.uint8)[..., None, None].expand(-1, -1, side, side).contiguous(),
        mask=torch.ones(count, 2, 2, dtype=torch.bool) if mask is None else mask,
        labels=torch.arange(1, count + 1) if labelled else None,
        confidence=torch.full((count,), 0.934) if labelled else None,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )


def picture(calibration: CalibrationSet, path: Path, class_names: list[str] | None = None) -> np.ndarray:
    write_preview(calibration, path, class_names)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.mode == "RGB"
        return np.asarray(image)


def caption(sheet: np.ndarray, index: int, side: int = 112) -> np.ndarray:
    """The strip under tile `index` of the first row, where the tiles are of `side` pixels."""
    left = GAP + index * (side + GAP)
    return sheet[GAP + side : GAP + side + LINE, left : left + side]


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (5, 1, 5), (8, 1, 8), (11, 2, 8), (40, 4, 8)])
@pytest.mark.parametrize("labelled", [False, True])
def test_eight_to_a_row_and_thirty_two_at_most(
    tmp_path: Path, count: int, rows: int, columns: int, labelled: bool
) -> None:
    sheet = picture(a_set(count, labelled=labelled), tmp_path / "preview.png")
    line = LINE if labelled else 0
    step_x, step_y = 112 + GAP, 112 + line + GAP
    assert sheet.shape == (rows * step_y + GAP, columns * step_x + GAP, 3)
    around = np.ones(sheet.shape[:2], dtype=bool)
    for index in range(rows * columns):
        top, left = GAP + index // columns * step_y, GAP + index % columns * step_x
        tile = sheet[top : top + 112, left : left + 112]
        assert (tile == ((index, 2 * index, 3 * index) if index < count else PAPER)).all()
        assert (sheet[top + 112 : top + 112 + line, left : left + 112] < 128).any() == (labelled and index < count)
        around[top : top + 112 + line, left : left + 112] = False
    assert (sheet[around] == PAPER).all()


def test_patches_that_are_no_part_of_the_image_are_blank(tmp_path: Path) -> None:
    mask = torch.tensor([[[True, False], [False, True]], [[False, False], [True, False]]])
    sheet = picture(a_set(2, mask=mask, labelled=True), tmp_path / "preview.png")
    for index in range(2):
        tile = sheet[GAP : GAP + 112, GAP + index * 116 : GAP + index * 116 + 112]
        for row in range(2):
            for column in range(2):
                patch = tile[row * 56 : row * 56 + 56, column * 56 : column * 56 + 56]
                inside = bool(mask[index, row, column])
                assert (patch == ((index, 2 * index, 3 * index) if inside else BLANK)).all()


@pytest.mark.parametrize(("side", "shown"), [(32, 4 * 32), (64, 2 * 64), (224, 224), (600, 600)])
def test_small_images_are_enlarged_by_whole_pixels(tmp_path: Path, side: int, shown: int) -> None:
    # 112 / 32 = 3.5 is rounded to even.
    assert picture(a_set(1, side), tmp_path / "preview.png").shape == (shown + 8, shown + 8, 3)


def test_the_pixels_are_in_their_places(tmp_path: Path) -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 112, 112), dtype=np.uint8))
    calibration = CalibrationSet(pixels, torch.ones(1, 7, 7, dtype=torch.bool), None, None, (0.5,) * 3, (0.5,) * 3)
    sheet = picture(calibration, tmp_path / "preview.png")
    assert (sheet[GAP:-GAP, GAP:-GAP] == pixels[0].permute(1, 2, 0).numpy()).all()


def test_images_of_one_channel_are_shown_in_gray(tmp_path: Path) -> None:
    mask = torch.tensor([[[True, False], [False, True]]])
    calibration = CalibrationSet(torch.full((1, 1, 112, 112), 77, dtype=torch.uint8), mask, None, None, (0.5,), (0.5,))
    sheet = picture(calibration, tmp_path / "preview.png")
    assert (sheet[GAP : GAP + 56, GAP : GAP + 56] == 77).all()
    assert (sheet[GAP : GAP + 56, GAP + 56 : GAP + 112] == BLANK).all()


class TestCaptions:
    NAMES = ("tench", "goldfish", "tabby cat")

    def test_name_and_confidence(self, tmp_path: Path) -> None:
        calibration = a_set(2, labelled=True)
        sheet = picture(calibration, tmp_path / "preview.png", list(self.NAMES))
        for index, text in enumerate(["goldfish  93 %", "tabby cat  93 %"]):
            expected = Image.new("RGB", (112, LINE), "white")
            ImageDraw.Draw(expected).text((0, 0), text, fill=(48, 48, 48), font=FONT)
            assert (caption(sheet, index) == np.asarray(expected)).all()

    def test_they_change_nothing_but_the_strips_under_the_tiles(self, tmp_path: Path) -> None:
        calibration = a_set(9, labelled=True)
        one = picture(calibration, tmp_path / "one.png", [f"name {i}" for i in range(20)])
        # Letters with more marks on top and below than a line has room for.
        other = picture(calibration, tmp_path / "other.png", ["Ả̧̂g\u0323" + "\u030a\u0301\u0323" * 20] * 20)
        differs = (one != other).any(-1)
        for row in range(2):
            top = GAP + row * (112 + LINE + GAP)
            assert differs[top + 112 : top + 112 + LINE].any()
            differs[top + 112 : top + 112 + LINE] = False
        assert not differs.any()

    def test_without_labels_there_are_none(self, tmp_path: Path) -> None:
        plain = replace(a_set(3, labelled=True), labels=None)
        sheet = picture(plain, tmp_path / "preview.png", list(self.NAMES))
        assert sheet.shape == (112 + 2 * GAP, 3 * 116 + GAP, 3)

    def test_without_confidence_it_is_the_name_alone(self, tmp_path: Path) -> None:
        calibration = a_set(1, labelled=True)
        with_it = caption(picture(calibration, tmp_path / "a.png", list(self.NAMES)), 0)
        alone = caption(picture(replace(calibration, confidence=None), tmp_path / "b.png", list(self.NAMES)), 0)
        end = round(FONT.getlength("goldfish")) + 1
        assert (alone[:, :end] == with_it[:, :end]).all()
        assert (alone[:, end:] == PAPER).all()
        assert (with_it[:, end:] < 128).any()

    @pytest.mark.parametrize("names", [None, [], ["only the first"], ["", " ", ""], ["0", "1", "2"]])
    def test_a_class_without_a_name_goes_by_its_number(self, tmp_path: Path, names: list[str] | None) -> None:
        sheet = picture(a_set(1, labelled=True), tmp_path / "a.png", names)
        assert (sheet == picture(a_set(1, labelled=True), tmp_path / "b.png", ["", "class 1"])).all()

    def test_a_class_named_by_a_number_is_called_a_class(self, tmp_path: Path) -> None:
        sheet = picture(a_set(1, labelled=True), tmp_path / "a.png", ["", " 10 "])
        assert (sheet == picture(a_set(1, labelled=True), tmp_path / "b.png", ["", "class 10"])).all()

    def test_a_label_below_zero_is_not_counted_from_the_end(self, tmp_path: Path) -> None:
        calibration = replace(a_set(1, labelled=True), labels=torch.tensor([-1]))
        sheet = picture(calibration, tmp_path / "a.png", list(self.NAMES))
        assert (sheet == picture(calibration, tmp_path / "b.png")).all()

    @pytest.mark.parametrize("side", [32, 76, 224, 448])
    def test_long_names_are_shortened_to_the_tile_and_keep_their_confidence(self, tmp_path: Path, side: int) -> None:
        calibration = a_set(2, side, labelled=True)
        sheet = picture(calibration, tmp_path / "a.png", ["soft-coated wheaten terrier " * 20] * 3)
        tile = (sheet.shape[1] - 3 * GAP) // 2
        bottom = GAP + tile
        first = sheet[bottom:, GAP : GAP + tile]
        assert (sheet[bottom:, GAP + tile : 2 * GAP + tile] == PAPER).all()
        # The end of the line is the confidence: another one gives another end and the same beginning.
        others = replace(calibration, confidence=torch.tensor([0.956, 0.956]))
        changed = picture(others, tmp_path / "b.png", ["soft-coated wheaten terrier " * 20] * 3)
        columns = (changed[bottom:, GAP : GAP + tile] != first).any(-1).any(0).nonzero()[0]
        assert len(columns)
        assert columns.min() > tile / 2
        # And it stands free of the next tile's.
        assert (first[:, -4:] == PAPER).all()

    @pytest.mark.parametrize(
        "name", ["猫", "חתול", "قطة", "😀 cat", "a\nb\tc", "nul\0", "\ud800", "ŠŽČ", "x" * 100_000]
    )
    def test_any_name_can_be_written(self, tmp_path: Path, name: str) -> None:
        sheet = picture(a_set(1, labelled=True), tmp_path / "preview.png", [name] * 2)
        assert sheet.shape == (GAP + 112 + LINE + GAP, 120, 3)
        assert (caption(sheet, 0) < 128).any()

    def test_a_tile_too_narrow_for_a_word(self, tmp_path: Path) -> None:
        narrow = CalibrationSet(
            images=torch.zeros(2, 3, 112, 8, dtype=torch.uint8),
            mask=torch.ones(2, 14, 1, dtype=torch.bool),
            labels=torch.tensor([0, 1]),
            confidence=torch.tensor([0.5, 0.5]),
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
        )
        sheet = picture(narrow, tmp_path / "preview.png", list(self.NAMES))
        assert sheet.shape == (GAP + 112 + LINE + GAP, 2 * 12 + GAP, 3)
        assert (sheet[:, 12:16] == PAPER).all()

    def test_a_pillow_that_cannot_write_shows_the_pictures_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load_default(size: float | None = None) -> None:
            raise ImportError("The _imagingft C module is not installed")

        with_text = a_set(3, labelled=True)
        monkeypatch.setattr(ImageFont, "load_default", load_default)
        sheet = picture(with_text, tmp_path / "a.png", list(self.NAMES))
        assert (sheet == picture(replace(with_text, labels=None), tmp_path / "b.png")).all()


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "preview.png"
    with pytest.raises(DfqError, match=f"^cannot write {path}: No such file or directory$"):
        write_preview(a_set(1), path)
