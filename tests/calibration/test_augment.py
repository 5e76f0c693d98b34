from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calibration.augment import STILL, Move, RollAndFlip, patch_places
from calibration.tokens import PatchGrid

GRIDS = st.builds(PatchGrid, st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))


def numbered(grid: PatchGrid) -> Tensor:
    """An image whose pixels are the number of the patch they belong to: [1, 1, H, W]."""
    numbers = torch.arange(grid.num_patches).view(grid.rows, grid.columns)
    return numbers.repeat_interleave(grid.height, 0).repeat_interleave(grid.width, 1)[None, None]


def tile(image: Tensor, grid: PatchGrid, patch: int) -> Tensor:
    row, column = divmod(patch, grid.columns)
    return image[0, 0, row * grid.height : (row + 1) * grid.height, column * grid.width : (column + 1) * grid.width]


@given(GRIDS, st.integers(-7, 7), st.integers(-7, 7), st.booleans())
def test_whole_patches_are_where_the_image_was_moved_to(grid: PatchGrid, down: int, right: int, flip: bool) -> None:
    move = Move(down * grid.height, right * grid.width, flip)
    moved = move.images(numbered(grid))
    for patch, place in enumerate(move.patches(grid).tolist()):
        assert (tile(moved, grid, place) == patch).all()


@given(GRIDS, st.integers(-20, 20), st.integers(-20, 20), st.booleans())
def test_any_other_patch_is_off_by_at_most_half_a_patch(grid: PatchGrid, down: int, right: int, flip: bool) -> None:
    move = Move(down, right, flip)
    moved, places = move.images(numbered(grid)), move.patches(grid).tolist()
    assert sorted(places) == list(range(grid.num_patches))
    for patch, place in enumerate(places):
        share = (tile(moved, grid, place) == patch).float().mean()
        assert share >= 1 / 4  # half of its rows and half of its columns


@pytest.mark.parametrize(
    ("pixels", "patches"),
    [(0, 0), (3, 0), (4, 1), (11, 1), (12, 2), (-3, 0), (-4, 4), (-11, 4), (-12, 3), (8 * 5 + 3, 0)],
)
def test_half_a_patch_is_rounded_away_from_zero(pixels: int, patches: int) -> None:
    """A grid of 5 patches of 8 pixels; -1 is 4, -2 is 3."""
    assert Move(down=pixels).patches(PatchGrid(5, 1, 8, 1))[0] == patches
    assert Move(right=pixels).patches(PatchGrid(1, 5, 1, 8))[0] == patches


def test_pixels_by_hand() -> None:
    image = torch.tensor([[[[0, 1, 2], [3, 4, 5]]]])
    assert Move(right=1).images(image).tolist() == [[[[2, 0, 1], [5, 3, 4]]]]
    assert Move(down=1).images(image).tolist() == [[[[3, 4, 5], [0, 1, 2]]]]
    assert Move(down=-1, right=-1).images(image).tolist() == [[[[4, 5, 3], [1, 2, 0]]]]
    assert Move(right=1, flip=True).images(image).tolist() == [[[[1, 0, 2], [4, 3, 5]]]]


def test_still() -> None:
    image = torch.rand(2, 3, 4, 4)
    assert STILL.images(image) is image
    assert STILL.patches(PatchGrid(2, 2, 2, 2)).tolist() == [0, 1, 2, 3]


def test_a_draw_fills_its_range_in_every_direction() -> None:
    moves = RollAndFlip().draw(4000, (32, 48), torch.Generator().manual_seed(0))
    assert len(moves) == 4000
    # An eighth of 32 and of 48 pixels, both ends reached, all values about equally often.
    assert {move.down for move in moves} == set(range(-4, 5))
    assert {move.right for move in moves} == set(range(-6, 7))
    assert abs(sum(move.flip for move in moves) / 4000 - 0.5) < 0.04  # five standard deviations
    assert abs(sum(move.down * move.right for move in moves) / 4000) < 0.8  # independent


def test_the_published_range() -> None:
    moves = RollAndFlip().draw(2000, (224, 224), torch.Generator().manual_seed(0))
    assert {abs(move.down) for move in moves} == {abs(move.right) for move in moves} == set(range(29))


def test_a_draw_hangs_on_the_generator_alone() -> None:
    first, again, other = (RollAndFlip().draw(9, (32, 32), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first == again != other


def test_without_a_range_there_are_only_flips() -> None:
    moves = RollAndFlip(0.0).draw(50, (32, 32), torch.Generator().manual_seed(0))
    assert set(moves) == {Move(0, 0, False), Move(0, 0, True)}


def test_a_window_fills_the_image() -> None:
    image = torch.tensor([[[[0.0, 9, 9, 9], [9, 1, 3, 9], [9, 5, 7, 9], [9, 9, 9, 9]]]])
    seen = Move(window=(1, 1, 2, 2)).images(image)
    # Bilinear, by hand: a pixel of the window is two of the image, and in between they are mixed three to one.
    assert seen[0, 0, 0].tolist() == [1.0, 1.5, 2.5, 3.0]
    assert seen[0, 0, :, 0].tolist() == [1.0, 2.0, 4.0, 5.0]
    # First the roll and the flip, then the window.
    assert Move(down=1, window=(2, 1, 1, 1)).images(image).unique().tolist() == [1.0]
    assert Move(flip=True, window=(0, 3, 1, 1)).images(image).unique().tolist() == [0.0]


def test_windows_lie_anywhere_and_are_of_any_size() -> None:
    moves = RollAndFlip(smallest=0.5).draw(3000, (32, 64), torch.Generator().manual_seed(0))
    windows = [move.window for move in moves if move.window is not None]
    assert len(windows) == 3000
    assert {height for _, _, height, _ in windows} == set(range(16, 33))
    assert all(0 <= top <= 32 - height and 0 <= left <= 64 - width for top, left, height, width in windows)
    assert all(abs(width - 2 * height) <= 2 for _, _, height, width in windows)
    assert {top for top, _, height, _ in windows if height == 16} == set(range(17))
    # Rolls and flips are those without windows.
    plain = RollAndFlip().draw(3000, (32, 64), torch.Generator().manual_seed(0))
    assert [(move.down, move.right, move.flip) for move in moves] == [(m.down, m.right, m.flip) for m in plain]


def test_places_of_many_moves_at_once() -> None:
    grid, moves = PatchGrid(3, 4, 8, 4), [STILL, Move(13, -7), Move(-4, 2, True)]
    assert patch_places(moves, grid).tolist() == [move.patches(grid).tolist() for move in moves]
    assert patch_places(moves, grid)[0].tolist() == list(range(12))
