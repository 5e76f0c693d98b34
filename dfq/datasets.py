"""Labelled images to evaluate on: class folders, timm's datasets, the reference model's digits.

Every dataset here yields `(image, label)`: image `[3, H, W]`, preprocessed and normalised as the model wants it; label
an int, the index of the class in the model's output. Labels are never guessed from the order of folders where names
tell.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal, Protocol

import timm.data
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from calibration.pictures import IMAGE_EXTENSIONS, images_below, is_image, read_image, reason
from dfq import reference
from dfq.errors import DfqError

_EXTENSIONS_SAID = ", ".join(IMAGE_EXTENSIONS)
_TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")

_log = logging.getLogger("dfq")

Transform = Callable[[Image.Image], Tensor]
"""From a picture to `[3, H, W]`, normalised."""


class _Preprocessing(Protocol):
    def transform(self) -> Transform: ...
    def describe(self) -> str: ...


class Labelled(Protocol):
    """What a dataset must know of the model it is made for: the pictures it takes and the names of its classes."""

    @property
    def preprocessing(self) -> _Preprocessing: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def class_names(self) -> tuple[str, ...] | None: ...


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Pictures read from files, with their labels; made by `image_folder`.

    Raises, for a file that cannot be read as a picture: ImageFileError, naming the file.
    """

    def __init__(self, samples: Sequence[tuple[Path, int]], transform: Transform) -> None:
        self.samples = tuple(samples)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.transform(read_image(path)), label


def image_folder(root: str | os.PathLike[str], model: Labelled) -> ImageFolder:
    """The pictures below `root`, which holds one folder per class.

    Which class a folder is: the one of that name, where all folder names are among `model.class_names` (a part of the
    classes is enough); else the class of that number, where all names are whole numbers, counted from 0; else, where
    there are exactly as many folders as classes and no name is known, their sorted order, with a warning on the logger
    "dfq".
    Names that begin with a dot are passed over. The order is that of the classes' folder names, then of the paths.

    Raises: DfqError when the folder is missing or empty, or when its class folders do not fit the model.
    """
    root = Path(root)
    folders = _class_folders(root)
    labels = _labels_of([folder.name for folder in folders], root, model)
    samples = [(path, label) for folder, label in zip(folders, labels, strict=True) for path in images_below(folder)]
    if not samples:
        raise DfqError(
            f"there are no images in the class folders of {root}; put files there that end in {_EXTENSIONS_SAID}"
        )
    return ImageFolder(samples, model.preprocessing.transform())


def timm_dataset(name: str, root: str | os.PathLike[str] | None, split: str, model: Labelled) -> Dataset[Any]:
    """A dataset that timm can open, such as `torch/cifar10` or `hfds/owner/name`. Nothing is downloaded by `torch/`.

    The labels are the dataset's own and must be those of the model. timm's plain folders are refused: `image_folder`
    reads those and knows the names of their classes.

    name: as in timm's `create_dataset`, with its prefix. root: where the data lies, or is kept.

    Raises: DfqError when timm cannot open it.
    """
    if not name.lower().startswith(_TIMM_PREFIXES) or name.lower() in ("torch/folder", "torch/image_folder"):
        raise DfqError(
            f"there is no dataset {name!r}: the names understood begin with {', '.join(_TIMM_PREFIXES)}; "
            "for a folder with one folder per class give the data directory alone"
        )
    try:
        # Results alone go to stdout, and timm prints there which package it lacks.
        with redirect_stdout(sys.stderr):
            dataset = timm.data.create_dataset(name, root=None if root is None else os.fspath(root), split=split)
    # Behind create_dataset stand half a dozen libraries, each with exceptions of its own, AssertionError among them.
    except Exception as error:
        place = "" if root is None else f", in {root}"
        raise DfqError(
            f"timm cannot open the dataset {name!r}, split {split!r}{place}: {reason(error)}; "
            "check the name, the split, the data directory, and that the library behind that prefix is installed"
        ) from error
    dataset.transform = _ToRgb(model.preprocessing.transform())
    opened: Dataset[Any] = dataset
    return opened


class _Digits(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: Tensor, labels: Tensor, transform: Transform) -> None:
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = Image.fromarray(self.images[index].permute(1, 2, 0).numpy())
        return self.transform(picture), int(self.labels[index])


def reference_digits(model: Labelled, split: Literal["train", "test"] = "test") -> Dataset[tuple[Tensor, int]]:
    """The handwritten digits of `dfq.reference.digits`, for the reference model or another one of the same ten classes.

    Raises: DfqError when the model has other classes, or scikit-learn is not installed.
    """
    expected = reference.CLASS_NAMES
    if model.num_classes != len(expected) or model.class_names not in (None, expected):
        raise DfqError(
            "the reference digits have the classes 0 to 9, and this model has others "
            f"({model.num_classes} classes); evaluate it on images of its own classes"
        )
    images, labels = reference.digits(split)
    return _Digits(images, labels, model.preprocessing.transform())


def imagenet_wordnet_ids() -> tuple[str, ...]:
    """The WordNet ids of the 1000 classes of ImageNet-1k, in class order: `n01440764` first. Needs no network."""
    return tuple(timm.data.ImageNetInfo("imagenet-1k").label_names())


def imagenet_class_names() -> tuple[str, ...]:
    """The classes of ImageNet-1k for people, in class order: `tench` first. Needs no network."""
    known = timm.data.ImageNetInfo("imagenet-1k")
    return tuple(known.index_to_description(index).split(",")[0] for index in range(known.num_classes()))


def class_captions(model: Labelled) -> tuple[str, ...] | None:
    """What the classes of a model are called under a picture: in words where they are known, else by folder name."""
    names = model.class_names
    return imagenet_class_names() if names == imagenet_wordnet_ids() else names


class _ToRgb:
    """The model's transform for pictures that may be gray: timm does not convert those of torchvision's datasets."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __call__(self, picture: Image.Image) -> Tensor:
        return self.transform(picture.convert("RGB"))


def _class_folders(root: Path) -> list[Path]:
    """The folders in `root`, sorted by name; at least one."""
    try:
        entries = sorted(root.iterdir())
    except FileNotFoundError:
        raise DfqError(f"there is no folder {root}; give one that holds a folder of images per class") from None
    except NotADirectoryError:
        raise DfqError(f"{root} is a file; give a folder that holds a folder of images per class") from None
    except OSError as error:
        raise DfqError(f"cannot list the folder {root}: {reason(error)}; check its access rights") from None
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    loose = [entry for entry in entries if is_image(entry.name) and entry.is_file()]
    if not folders and loose:
        raise DfqError(
            f"{root} holds {len(loose)} images but no class folders; put the images of each class into a folder named "
            "after the class"
        )
    if not folders:
        raise DfqError(
            f"there are no class folders in {root}; put images, in files that end in {_EXTENSIONS_SAID}, "
            "into one folder per class"
        )
    if loose:
        _log.warning("passed over %d images that lie in %s itself, in no class folder", len(loose), root)
    return folders


def _labels_of(names: Sequence[str], root: Path, model: Labelled) -> list[int]:
    """The class index of each folder name (see `image_folder`). names: sorted, not empty."""
    index_of = {name: index for index, name in enumerate(model.class_names or ())}
    unknown = [name for name in names if name not in index_of]
    if not unknown:
        return [index_of[name] for name in names]
    if all(name.isascii() and name.isdigit() for name in names):
        return _numbered(names, root, model.num_classes)
    if len(names) == model.num_classes and len(unknown) == len(names):
        _log.warning(
            "the %d class folders in %s have names the model does not know; they are taken as its classes in sorted "
            "order, %r first",
            len(names),
            root,
            names[0],
        )
        return list(range(len(names)))
    raise DfqError(
        f"{len(unknown)} of the {len(names)} class folders in {root} are unknown to the model "
        f"({_some(unknown)}); name them {_expected_names(model)}{_subfolder_hint(unknown, root)}"
    )


def _numbered(names: Sequence[str], root: Path, num_classes: int) -> list[int]:
    indices = [int(name) for name in names]
    if max(indices) >= num_classes:
        raise DfqError(
            f"the class folders in {root} are numbered {min(indices)} to {max(indices)} and the model's classes 0 to "
            f"{num_classes - 1}; rename the folders to the class indices"
        )
    if len(set(indices)) < len(indices):
        twice = next(index for index in indices if indices.count(index) > 1)
        raise DfqError(f"more than one folder in {root} has the number {twice}; keep one folder per class")
    return indices


def _expected_names(model: Labelled) -> str:
    by_number = f"by class index, 0 to {model.num_classes - 1}"
    if model.class_names is None:
        return by_number
    return f"as the model does ({_some(model.class_names)}) or {by_number}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown}, ..."


def _subfolder_hint(unknown: Sequence[str], root: Path) -> str:
    for name in ("val", "validation", "test", "train"):
        if name in unknown:
            return f", or give {root / name} instead"
    return ""
