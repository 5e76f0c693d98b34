from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from calibration.calibration_set import CalibrationSet
from calibration.errors import DfqError
from calibration.sources import real_images
from calibration.tokens import PatchGrid

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
GRID = PatchGrid(2, 2, 2, 2)


def transform(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def folder_of(root: Path, count: int = 12) -> Path:
    """Images of one colour each, (index, 2 index, 3 index), in two classes."""
    for index in range(count):
        path = root / f"class {index % 2}" / f"{index:02d}.{('png', 'BMP')[index % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (index, 2 * index, 3 * index)).save(path)
    (root / "labels.csv").write_text("not an image")
    return root


def draw(root: Path, num_images: int = 5, seed: int = 0) -> CalibrationSet:
    return real_images(root, GRID, transform, mean=MEAN, std=STD, num_images=num_images, seed=seed)


def test_real_images_are_whole_and_without_labels(tmp_path: Path) -> None:
    drawn = draw(folder_of(tmp_path))
    assert len(drawn) == 5
    assert drawn.labels is None
    assert drawn.confidence is None
    assert not drawn.is_sparse
    assert drawn.grid == GRID
    assert drawn.run["method"] == "real"
    assert drawn.run["seed"] == 0
    # The pixels are those of the files named.
    for image, name in zip(drawn.images, drawn.run["files"], strict=True):
        index = int(Path(name).stem)
        assert (tmp_path / name).is_file()
        assert image.unique(dim=-1).unique(dim=-2)[:, 0, 0].tolist() == [index, 2 * index, 3 * index]
        assert image.shape == (3, 4, 4)


def test_the_seed_draws(tmp_path: Path) -> None:
    folder_of(tmp_path)
    first, again = draw(tmp_path, seed=7), draw(tmp_path, seed=7)
    assert torch.equal(first.images, again.images)
    assert first.run == again.run
    files = [tuple(draw(tmp_path, seed=seed).run["files"]) for seed in range(20)]
    assert len(set(files)) > 10
    assert all(len(set(names)) == 5 for names in files)
    assert len({name for names in files for name in names}) == 12


def test_the_order_in_which_the_folder_is_listed_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = draw(folder_of(tmp_path))
    listed = sorted(tmp_path.rglob("*"))
    for order in (listed, listed[::-1]):
        monkeypatch.setattr(Path, "rglob", lambda path, pattern, order=order: iter(order))
        assert torch.equal(draw(tmp_path).images, first.images)


def test_as_many_as_there_are(tmp_path: Path) -> None:
    drawn = draw(folder_of(tmp_path), 12)
    assert sorted(drawn.images[:, 0, 0, 0].tolist()) == list(range(12))


def test_gray_pictures_have_three_channels(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 77).save(tmp_path / "gray.png")
    assert draw(tmp_path, 1).images.unique().tolist() == [77]


def test_a_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "file.png").write_text("")
    for path in (tmp_path / "missing", tmp_path / "file.png"):
        with pytest.raises(DfqError, match=f"^there is no folder {path} to take calibration images from$"):
            draw(path)


def test_too_few_images(tmp_path: Path) -> None:
    with pytest.raises(DfqError, match=rf"^{tmp_path} holds 12 images \(\.bmp, .*\), and 13 are wanted: lower --num"):
        draw(folder_of(tmp_path), 13)


@pytest.mark.parametrize("num_images", [0, -3])
def test_no_images_wanted(tmp_path: Path, num_images: int) -> None:
    with pytest.raises(DfqError, match=f"^num_images must be at least 1, not {num_images}$"):
        draw(folder_of(tmp_path), num_images)


@pytest.mark.parametrize("damage", ["no image", "truncated", "empty"])
def test_an_unreadable_image_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "broken.png"
    Image.effect_noise((64, 64), 50).save(path)
    content = {"no image": b"GIF?" * 9, "truncated": path.read_bytes()[:600], "empty": b""}[damage]
    path.write_bytes(content)
    with pytest.raises(DfqError, match=f"^cannot read the image {path}: "):
        draw(tmp_path, 1)


def test_an_image_too_large_to_be_honest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(DfqError, match=f"^cannot read the image {tmp_path / 'bomb.png'}: .*decompression bomb"):
        draw(tmp_path, 1)


def test_a_transform_to_another_size_than_the_model_takes(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "wide.png")
    with pytest.raises(DfqError, match=r"makes .*wide\.png \(3, 4, 6\), the model takes \(3, 4, 4\)$"):
        draw(tmp_path, 1)
