from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from calibration.errors import DfqError
from calibration.tokens import PatchGrid
from calibration.trace import Trace, write_trace

GAP, PAPER = 4, 255
GROUND = np.array([220.0, 229.0, 241.0])
FONT = ImageFont.load_default(12)
assert isinstance(FONT, ImageFont.FreeTypeFont)
# Over and under the base line, and the gap.
LINE = sum(FONT.getmetrics()) + GAP
SIDE = 112
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
ALL = torch.arange(4)


def a_trace() -> Trace:
    """Of 2x2 patches, 56 pixels each: shown as large as they are."""
    return Trace(PatchGrid(2, 2, 56, 56), MEAN, STD)


def plain(*grays: int) -> torch.Tensor:
    """One image of each 8-bit gray, normalised: [len(grays), 3, 112, 112]."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (torch.tensor(grays).view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE) / 255 - mean) / std


def picture(trace: Trace, path: Path, labels: torch.Tensor | None = None, names: list[str] | None = None) -> np.ndarray:
    write_trace(trace, path, labels=labels, class_names=names)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.mode == "RGB"
        return np.asarray(image)


def tile(sheet: np.ndarray, row: int, column: int, *, captions: bool = False) -> np.ndarray:
    top = GAP + LINE + row * (SIDE + captions * LINE + GAP)
    left = GAP + column * (SIDE + GAP)
    return sheet[top : top + SIDE, left : left + SIDE]


class TestMoments:
    def test_geometric_steps_from_the_first_to_the_last(self) -> None:
        # 10 ((1 + 400) ** (i / 8) - 1): each is 2.115 times as far from -10 as the one before.
        assert Trace.moments(4000) == (0, 11, 35, 85, 190, 414, 886, 1886, 4000)

    def test_decisions_take_the_place_of_the_nearest_steps(self) -> None:
        # 50 that of 35 (60 / 45 = 1.33; 95 / 60 = 1.58), 100 of 85, 200 of 190, 300 of 414 (1.37; 310 / 200 = 1.55).
        assert Trace.moments(4000, (50, 100, 200, 300)) == (0, 11, 50, 100, 200, 300, 886, 1886, 4000)

    def test_more_decisions_than_steps_are_all_seen(self) -> None:
        decisions = tuple(range(100, 4000, 100))
        assert set(decisions) < set(Trace.moments(4000, decisions))

    def test_the_ends_are_never_given_up_and_what_is_decided_after_the_run_is_no_moment(self) -> None:
        assert Trace.moments(500, (1, 499, 500, 700)) == (0, 1, 6, 17, 34, 61, 107, 181, 302, 499, 500)

    @pytest.mark.parametrize(("iterations", "expected"), [(1, (0, 1)), (2, (0, 1, 2)), (5, (0, 1, 2, 3, 4, 5))])
    def test_short_runs_are_seen_whole(self, iterations: int, expected: tuple[int, ...]) -> None:
        assert Trace.moments(iterations) == expected
        assert Trace.moments(iterations, (0, 50)) == expected


class TestSnapshots:
    def test_pixels_and_masks_as_they_were_then(self) -> None:
        trace, images = a_trace(), plain(10, 200)
        trace.see(3, images, torch.tensor([[0, 3], [1, 2]]))
        images.zero_()  # as an optimiser goes on writing
        ((iteration, pixels, mask),) = trace.snapshots
        assert iteration == 3
        assert pixels.dtype == torch.uint8
        assert (pixels == torch.tensor([10, 200]).view(2, 1, 1, 1)).all()
        assert mask.tolist() == [[[True, False], [False, True]], [[False, True], [True, False]]]

    def test_six_images_are_kept(self) -> None:
        trace = a_trace()
        trace.see(0, plain(*range(9)), ALL.expand(9, -1))
        ((_, pixels, mask),) = trace.snapshots
        assert pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
        assert mask.shape == (6, 2, 2)
        assert pixels.untyped_storage().nbytes() == 6 * 3 * SIDE * SIDE

    def test_an_iteration_seen_again_is_replaced_and_the_order_is_theirs(self) -> None:
        trace = a_trace()
        for iteration, gray in [(0, 1), (20, 2), (7, 3), (20, 4)]:
            trace.see(iteration, plain(gray), ALL.view(1, 4))
        seen = [(iteration, int(pixels[0, 0, 0, 0])) for iteration, pixels, _ in trace.snapshots]
        assert seen == [(0, 1), (7, 3), (20, 4)]

    def test_pixels_that_require_gradients(self) -> None:
        trace = a_trace()
        trace.see(0, plain(9).requires_grad_(True), ALL.view(1, 4))
        assert not trace.snapshots[0][1].requires_grad


class TestPicture:
    @pytest.mark.parametrize(("images", "rows"), [(1, 1), (4, 4), (9, 6)])
    def test_a_row_for_each_image_and_a_column_for_each_moment(self, tmp_path: Path, images: int, rows: int) -> None:
        trace = a_trace()
        for column, iteration in enumerate([0, 10, 100]):
            grays = [20 * row + column for row in range(images)]
            trace.see(iteration, plain(*grays), ALL.expand(images, -1))
        for captions in (False, True):
            sheet = picture(trace, tmp_path / "trace.png", torch.arange(images) if captions else None)
            step = SIDE + captions * LINE + GAP
            assert sheet.shape == (GAP + LINE + rows * step, 3 * (SIDE + GAP) + GAP, 3)
            for row in range(rows):
                for column in range(3):
                    assert (tile(sheet, row, column, captions=captions) == 20 * row + column).all()

    def test_stopped_patches_are_dimmed_and_the_others_exact(self, tmp_path: Path) -> None:
        trace = a_trace()
        trace.see(0, plain(40), ALL.view(1, 4))
        trace.see(50, plain(40), torch.tensor([[1, 2]]))
        sheet = picture(trace, tmp_path / "trace.png")
        assert (tile(sheet, 0, 0) == 40).all()
        dimmed = np.round(0.8 * GROUND + 0.2 * 40)
        patches = tile(sheet, 0, 1).reshape(2, 56, 2, 56, 3).transpose(0, 2, 1, 3, 4)
        for index, patch in enumerate(patches.reshape(4, 56, 56, 3)):
            assert (patch == (40 if index in (1, 2) else dimmed)).all()

    def test_heads_stand_over_their_columns(self, tmp_path: Path) -> None:
        def heads(iterations: list[int], name: str) -> np.ndarray:
            trace = a_trace()
            for iteration in iterations:
                trace.see(iteration, plain(40), ALL.view(1, 4))
            return picture(trace, tmp_path / name)

        one, other = heads([0, 50, 100], "one.png"), heads([0, 57, 100], "other.png")
        rows, columns = np.nonzero((one != other).any(-1))
        assert rows.min() >= GAP
        assert rows.max() < GAP + LINE
        assert columns.min() >= GAP + 116
        assert columns.max() < GAP + 116 + 20
        # "iteration 0" is wider than a number.
        written = [np.nonzero((one[: GAP + LINE, at : at + SIDE] < 128).any(-1).any(0))[0].max() for at in (4, 120)]
        assert written[0] > 3 * written[1]

    def test_captions_stand_under_their_rows_and_may_be_as_long(self, tmp_path: Path) -> None:
        trace = a_trace()
        for iteration in (0, 1, 2):
            trace.see(iteration, plain(40, 80), ALL.expand(2, -1))
        labels = torch.tensor([1, 0, 1])  # of a batch of more images than are shown
        plain_names = picture(trace, tmp_path / "a.png", labels, ["tench", "goldfish"])
        long = picture(trace, tmp_path / "b.png", labels, ["tench", "a name of many words " * 40])
        rows, columns = np.nonzero((plain_names != long).any(-1))
        top = GAP + LINE + SIDE
        assert rows.min() >= top
        assert rows.max() < top + LINE
        assert GAP + 2 * (SIDE + GAP) < columns.max() < GAP + 3 * (SIDE + GAP) - GAP

    def test_a_run_that_stopped_early(self, tmp_path: Path) -> None:
        trace = a_trace()
        for iteration in [*(moment for moment in trace.moments(4000) if moment < 200), 230]:
            trace.see(iteration, plain(iteration), ALL.view(1, 4))
        sheet = picture(trace, tmp_path / "trace.png")
        assert sheet.shape[1] == 6 * (SIDE + GAP) + GAP
        for column, iteration in enumerate([0, 11, 35, 85, 190, 230]):
            assert (tile(sheet, 0, column) == iteration).all()

    def test_small_images_are_enlarged(self, tmp_path: Path) -> None:
        trace = Trace(PatchGrid(8, 8, 4, 4), MEAN, STD)
        trace.see(0, plain(40)[..., :32, :32], torch.arange(64).view(1, 64))
        assert picture(trace, tmp_path / "trace.png").shape == (GAP + LINE + 128 + GAP, 128 + 2 * GAP, 3)

    def test_without_images_there_is_no_picture(self, tmp_path: Path) -> None:
        trace = a_trace()
        with pytest.raises(ValueError, match="holds no images"):
            write_trace(trace, tmp_path / "trace.png")
        trace.see(0, plain(), ALL.expand(0, -1))
        with pytest.raises(ValueError, match="holds no images"):
            write_trace(trace, tmp_path / "trace.png")
        assert list(tmp_path.iterdir()) == []

    def test_where_it_cannot_be_written(self, tmp_path: Path) -> None:
        trace, path = a_trace(), tmp_path / "missing" / "trace.png"
        trace.see(0, plain(40), ALL.view(1, 4))
        with pytest.raises(DfqError, match=f"^cannot write {path}: No such file or directory$"):
            write_trace(trace, path)
