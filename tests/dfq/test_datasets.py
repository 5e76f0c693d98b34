"""Which label an image gets, and what is said when a folder or a file cannot be used."""

from __future__ import annotations

import io
import logging
import os
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from calibration.pictures import ImageFileError
from dfq import reference
from dfq.datasets import (
    ImageFolder,
    image_folder,
    imagenet_wordnet_ids,
    reference_digits,
    timm_dataset,
)
from dfq.errors import DfqError


def to_tensor(picture: Image.Image) -> Tensor:
    assert picture.mode == "RGB"
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float()


class RawPixels:
    """Preprocessing that leaves the pixel values as they are, 0 to 255, and takes only RGB."""

    def transform(self) -> Callable[[Image.Image], Tensor]:
        return to_tensor

    def describe(self) -> str:
        return "raw"


@dataclass
class Fake:
    num_classes: int
    class_names: tuple[str, ...] | None = None

    @property
    def preprocessing(self) -> RawPixels:
        return RawPixels()


def make(root: Path, names: Iterable[str]) -> Path:
    """A folder with one class folder for each name, each with one image."""
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(root / name / "image.png")
    return root


def labels(dataset: ImageFolder) -> dict[str, int]:
    return {path.parent.name: label for path, label in dataset.samples}


def refusal(root: Path, model: Fake) -> str:
    with pytest.raises(DfqError) as caught:
        image_folder(root, model)
    message = str(caught.value)
    assert "\n" not in message
    return message


WORDNET = Fake(3, ("n01440764", "n01443537", "n01484850"))


def test_class_names_give_the_labels_also_when_classes_are_absent(tmp_path: Path) -> None:
    make(tmp_path, ["n01484850", "n01443537"])
    assert labels(image_folder(tmp_path, WORDNET)) == {"n01443537": 1, "n01484850": 2}


def test_class_names_come_before_sorted_order(tmp_path: Path) -> None:
    make(tmp_path, ["ant", "bee", "cow"])
    assert labels(image_folder(tmp_path, Fake(3, ("cow", "ant", "bee")))) == {"ant": 1, "bee": 2, "cow": 0}


def test_class_names_come_before_numbers(tmp_path: Path) -> None:
    make(tmp_path, ["1", "2"])
    assert labels(image_folder(tmp_path, Fake(3, ("2", "1", "0")))) == {"1": 1, "2": 0}


@pytest.mark.parametrize("names", [None, tuple(f"n{i}" for i in range(12))])
def test_whole_numbers_are_class_indices_in_numeric_order(tmp_path: Path, names: tuple[str, ...] | None) -> None:
    make(tmp_path, [str(number) for number in range(12)])
    found = labels(image_folder(tmp_path, Fake(12, names)))
    assert found == {str(number): number for number in range(12)}


def test_padded_numbers_are_class_indices(tmp_path: Path) -> None:
    make(tmp_path, ["003", "011"])
    assert labels(image_folder(tmp_path, Fake(1000))) == {"003": 3, "011": 11}


def test_numbers_counted_from_one_are_refused_instead_of_sorted_as_text(tmp_path: Path) -> None:
    make(tmp_path, [str(number) for number in range(1, 13)])
    assert "numbered 1 to 12 and the model's classes 0 to 11" in refusal(tmp_path, Fake(12))


def test_two_folders_of_one_number_are_refused(tmp_path: Path) -> None:
    make(tmp_path, ["3", "03"])
    assert "more than one folder" in refusal(tmp_path, Fake(5))


def test_as_many_unknown_folders_as_classes_are_sorted_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, ["cat", "ant", "bee"])
    with caplog.at_level(logging.WARNING, logger="dfq"):
        assert labels(image_folder(tmp_path, Fake(3))) == {"ant": 0, "bee": 1, "cat": 2}
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("dfq", "WARNING")
    assert "sorted order, 'ant' first" in record.getMessage()


def test_known_names_give_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image_folder(make(tmp_path, ["n01440764"]), WORDNET)
    assert not caplog.records


def test_one_unknown_folder_among_known_ones_is_refused_even_when_the_count_fits(tmp_path: Path) -> None:
    make(tmp_path, ["n01440764", "n01443537", "thumbnails"])
    message = refusal(tmp_path, WORDNET)
    assert "1 of the 3 class folders" in message
    assert "'thumbnails'" in message
    assert "'n01440764', 'n01443537', 'n01484850'" in message


def test_unknown_folders_are_counted_and_the_first_ones_named(tmp_path: Path) -> None:
    make(tmp_path, ["e", "d", "c", "b", "a"])
    message = refusal(tmp_path, Fake(10))
    assert "5 of the 5 class folders" in message
    assert "('a', 'b', 'c', ...)" in message
    assert "by class index, 0 to 9" in message


def test_a_folder_one_level_too_high_is_pointed_out(tmp_path: Path) -> None:
    make(tmp_path, ["train/n01440764", "val/n01440764"])
    assert f"give {tmp_path / 'val'} instead" in refusal(tmp_path, WORDNET)


def test_images_are_sorted_found_below_and_whatever_the_case_of_the_extension(tmp_path: Path) -> None:
    for name in ("1/b.PNG", "1/a.jpg", "1/deep/c.Jpeg", "0/z.bmp", "0/y.webp", "0/x.tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    (tmp_path / "0" / "notes.txt").write_text("no image")
    (tmp_path / "1" / "._a.jpg").write_bytes(b"left by another system")
    (tmp_path / ".cache").mkdir()
    dataset = image_folder(tmp_path, Fake(2))
    found = [(path.relative_to(tmp_path).as_posix(), label) for path, label in dataset.samples]
    assert found == [
        ("0/x.tiff", 0),
        ("0/y.webp", 0),
        ("0/z.bmp", 0),
        ("1/a.jpg", 1),
        ("1/b.PNG", 1),
        ("1/deep/c.Jpeg", 1),
    ]
    assert len(dataset) == 6


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [("L", 7, (7, 7, 7)), ("RGBA", (1, 2, 3, 0), (1, 2, 3)), ("RGB", (4, 5, 6), (4, 5, 6)), ("1", 1, (255, 255, 255))],
)
def test_pictures_of_other_modes_become_rgb(tmp_path: Path, mode: str, colour: Any, expected: tuple[int, ...]) -> None:
    (tmp_path / "0").mkdir()
    Image.new(mode, (3, 2), colour).save(tmp_path / "0" / "a.png")
    image, label = image_folder(tmp_path, Fake(2))[0]
    assert image.shape == (3, 2, 3)
    assert tuple(image[:, 0, 0].tolist()) == expected
    assert (label, type(label)) == (0, int)


def test_missing_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent", WORDNET).startswith(f"there is no folder {tmp_path / 'absent'}")


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"")
    assert refusal(file, WORDNET).startswith(f"{file} is a file")


def test_an_empty_folder(tmp_path: Path) -> None:
    message = refusal(tmp_path, WORDNET)
    assert "no class folders" in message
    assert ".jpg" in message


def test_class_folders_without_images(tmp_path: Path) -> None:
    (tmp_path / "n01440764").mkdir()
    (tmp_path / "n01440764" / "notes.txt").write_text("")
    message = refusal(tmp_path, WORDNET)
    assert "no images in the class folders" in message
    assert ".bmp, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp" in message


def test_images_without_class_folders(tmp_path: Path) -> None:
    for name in ("a.png", "b.JPG"):
        (tmp_path / name).write_bytes(b"")
    assert "holds 2 images but no class folders" in refusal(tmp_path, WORDNET)


def test_images_beside_the_class_folders_are_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, ["n01440764"])
    (tmp_path / "loose.png").write_bytes(b"")
    assert len(image_folder(tmp_path, WORDNET)) == 1
    assert "passed over 1 images" in caplog.text


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read every folder")
def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path: Path) -> None:
    make(tmp_path, ["n01440764", "n01443537"])
    closed = tmp_path / "n01440764"
    closed.chmod(0)
    try:
        assert f"cannot list the folder {closed}" in refusal(tmp_path, WORDNET)
    finally:
        closed.chmod(0o755)


def damaged_png() -> bytes:
    """A whole header and half of the pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, "PNG")
    return whole.getvalue()[: len(whole.getvalue()) // 2]


@pytest.mark.parametrize("content", [b"", b"no image at all", damaged_png()], ids=["empty", "text", "truncated"])
@pytest.mark.parametrize("name", ["bad.png", "ImageFileError: odd name.png"])
def test_a_file_that_is_no_whole_image_is_named(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / "0" / name
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ImageFileError) as caught:
        image_folder(tmp_path, Fake(2))[0]
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_removed_since_the_folder_was_listed(tmp_path: Path) -> None:
    dataset = image_folder(make(tmp_path, ["0"]), Fake(2))
    (tmp_path / "0" / "image.png").unlink()
    with pytest.raises(DfqError, match="No such file or directory"):
        dataset[0]


def test_a_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, ["0"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with pytest.raises(DfqError, match=r"image\.png.*decompression bomb"):
        image_folder(tmp_path, Fake(2))[0]


def test_sixteen_bit_images_are_refused_since_they_would_come_out_white(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    Image.fromarray(np.full((4, 4), 30_000, dtype=np.uint16)).save(tmp_path / "0" / "deep.png")
    with pytest.raises(DfqError, match=r"deep\.png.*more than 8 bits"):
        image_folder(tmp_path, Fake(2))[0]


def test_an_error_in_a_worker_keeps_its_class_and_its_one_sentence(tmp_path: Path) -> None:
    make(tmp_path, ["0"])
    (tmp_path / "0" / "image.png").write_bytes(b"no image")
    dataset = image_folder(tmp_path, Fake(2))
    with pytest.raises(ImageFileError) as alone:
        dataset[0]
    with pytest.raises(ImageFileError) as from_worker:
        list(DataLoader(dataset, num_workers=1))
    assert str(from_worker.value) == str(alone.value)
    assert isinstance(from_worker.value, DfqError)


def test_datasets_can_be_sent_to_workers_that_do_not_fork(tmp_path: Path) -> None:
    dataset = pickle.loads(pickle.dumps(image_folder(make(tmp_path, ["0"]), Fake(2))))
    assert torch.equal(dataset[0][0], torch.zeros(3, 2, 2))


@pytest.mark.parametrize("name", ["", "imagenet", "folder", "torch/image_folder", "../data"])
def test_names_that_are_no_timm_dataset(tmp_path: Path, name: str) -> None:
    with pytest.raises(DfqError, match="the names understood begin with torch/"):
        timm_dataset(name, tmp_path, "validation", Fake(10))


@pytest.mark.parametrize("name", ["torch/cifar10", "torch/no_such_dataset"])
def test_a_timm_dataset_that_cannot_be_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(DfqError, match=f"timm cannot open the dataset '{name}', split 'validation'") as caught:
        timm_dataset(name, tmp_path, "validation", Fake(10))
    assert "\n" not in str(caught.value)


def test_a_timm_dataset_of_gray_pictures_is_transformed_as_the_model_wants(tmp_path: Path) -> None:
    # MNIST's own file format, written by hand: 2 pictures of 28x28.
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    header = (2).to_bytes(4, "big")
    pixels = bytes([9]) * 784 + bytes([200]) * 784
    for part in ("train", "t10k"):
        sizes = header + (28).to_bytes(4, "big") * 2
        (raw / f"{part}-images-idx3-ubyte").write_bytes((0x803).to_bytes(4, "big") + sizes + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes((0x801).to_bytes(4, "big") + header + bytes([4, 7]))
    dataset = timm_dataset("torch/mnist", tmp_path, "validation", Fake(10))
    image, label = dataset[1]
    assert torch.equal(image, torch.full((3, 28, 28), 200.0))
    assert label == 7


def test_reference_digits_are_those_of_the_reference() -> None:
    dataset = reference_digits(Fake(10, reference.CLASS_NAMES), split="test")
    images, digits = reference.digits("test")
    assert len(dataset) == len(images)  # type: ignore[arg-type]
    for index in (0, 17, len(images) - 1):
        image, label = dataset[index]
        assert torch.equal(image, images[index].float())
        assert label == digits[index]


@pytest.mark.parametrize("model", [Fake(1000), Fake(10, tuple("abcdefghij"))])
def test_reference_digits_for_a_model_of_other_classes(model: Fake) -> None:
    with pytest.raises(DfqError, match="the reference digits have the classes 0 to 9"):
        reference_digits(model)


def test_imagenet_wordnet_ids_are_the_sorted_thousand() -> None:
    ids = imagenet_wordnet_ids()
    assert len(set(ids)) == 1000
    assert list(ids) == sorted(ids)
    # Tench, goldfish, great white shark; toilet tissue.
    assert ids[:3] == ("n01440764", "n01443537", "n01484850")
    assert ids[-1] == "n15075141"
