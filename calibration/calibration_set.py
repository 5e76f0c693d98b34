"""CalibrationSet: the images a quantizer is calibrated on, and how they are kept on disk.

A set is a folder: `manifest.json` (what it is and everything needed to make it again), one `shard-NNNNN.safetensors`
per batch, and `preview.png`. Pixels are 8-bit, as they would be in a picture file, and that is what is calibrated on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from calibration.errors import DfqError
from calibration.files import FolderLock, read_json, remove_file, replace_file, sha256_of, take_folder, write_json
from calibration.team import ALONE, Team
from calibration.tokens import PatchGrid, keep_of_mask

log = logging.getLogger("dfq")

FORMAT = "dfq.calibration_set"
VERSION = 1
MANIFEST = "manifest.json"


# No generated equality: of tensors it would be an error, not an answer.
@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Images to calibrate on.

    images: uint8 [M, 3, H, W]; mask: bool [M, rows, columns], True where a patch is part of the image (a sparse
    image has only some); labels: int64 [M], or None where none are known; confidence: [M] in [0, 1], the model's
    probability of the label, or None; mean, std: per channel, of the model's normalisation; run: how it was made;
    iterations: int64 [M], how long each was inverted, or None.
    """

    images: Tensor
    mask: Tensor
    labels: Tensor | None
    confidence: Tensor | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    run: dict[str, Any] = field(default_factory=dict)
    iterations: Tensor | None = None

    def __post_init__(self) -> None:
        images, mask, count = self.images, self.mask, self.images.shape[:1]
        well_formed = (
            (images.dim(), images.dtype) == (4, torch.uint8)
            and (mask.dim(), mask.dtype) == (3, torch.bool)
            and images.numel() > 0
            and mask.numel() > 0
            and images.shape[1] == len(self.mean) == len(self.std)
            and mask.shape[:1] == count
            and images.shape[2] % mask.shape[1] == 0
            and images.shape[3] % mask.shape[2] == 0
            and (self.labels is None or (self.labels.shape, self.labels.dtype) == (count, torch.int64))
            and (self.confidence is None or (self.confidence.shape == count and self.confidence.is_floating_point()))
            and (self.iterations is None or (self.iterations.shape, self.iterations.dtype) == (count, torch.int64))
        )
        if not well_formed:
            tensors = {"images": images, "mask": mask, "labels": self.labels, "confidence": self.confidence}
            tensors["iterations"] = self.iterations
            found = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in tensors.items() if t is not None]
            raise DfqError(
                f"not a calibration set: {', '.join(found)}, {len(self.mean)} means, {len(self.std)} deviations"
            )
        if not all(map(math.isfinite, self.mean)) or not all(0.0 < value < math.inf for value in self.std):
            raise DfqError(
                f"not a calibration set: its means {self.mean} must be finite, its deviations {self.std} positive too"
            )
        if not bool(self.mask.flatten(1).any(1).all()):
            raise DfqError("not a calibration set: an image keeps no patch at all")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def grid(self) -> PatchGrid:
        return PatchGrid.tiling(self.images, self.mask)

    @property
    def is_sparse(self) -> bool:
        return not bool(self.mask.all())

    def first(self, count: int) -> CalibrationSet:
        """At most the first `count` images."""
        names = ("images", "mask", "labels", "confidence", "iterations")
        parts: dict[str, Any] = {name: getattr(self, name) for name in names}
        first: dict[str, Any] = {name: None if part is None else part[:count] for name, part in parts.items()}
        return replace(self, **first)

    def batches(self, batch_size: int, device: torch.device) -> Batches:
        """(images [B, 3, H, W] normalised, keep [B, K] or None where every patch counts), at most `batch_size` each.

        Patches outside the mask are 0, the mean colour. Images that keep different numbers of patches come in
        different batches, so that any mixture of them can be run.
        """
        return Batches(self, batch_size, device)


def of_one_size(mask: Tensor) -> Iterator[Tensor]:
    """mask: bool [M, rows, columns] -> indices of the images that keep equally many patches, for each number."""
    counts = mask.flatten(1).sum(1)
    for count in sorted(set(counts.tolist())):
        yield (counts == count).nonzero()[:, 0]


class Batches(Sequence[tuple[Tensor, Tensor | None]]):
    """The batches of a set, each made when it is asked for: normalised, they take four times the memory of the set."""

    def __init__(self, images: CalibrationSet, batch_size: int, device: torch.device) -> None:
        self._set = images
        self._device = device
        self._chunks = [chunk for alike in of_one_size(images.mask) for chunk in torch.split(alike, batch_size)]

    def __len__(self) -> int:
        return len(self._chunks)

    @overload
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | None]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Tensor, Tensor | None]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Tensor, Tensor | None] | list[tuple[Tensor, Tensor | None]]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        whole, chunk = self._set, self._chunks[index]
        images = normalise(whole.images[chunk].to(self._device), whole.mean, whole.std)
        mask = whole.mask[chunk].to(self._device)
        if bool(mask.all()):
            return images, None
        return images * whole.grid.to_pixels(mask), keep_of_mask(mask)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [M, 3, H, W] -> float32, normalised."""
    mean_, std_ = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (mean, std))
    return (images.float() / 255.0 - mean_) / std_


def to_pixels(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """float32 [M, 3, H, W], normalised -> the nearest uint8 picture."""
    mean_, std_ = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (mean, std))
    pixels = ((images * std_ + mean_) * 255.0).round().clamp(0, 255).to(torch.uint8)
    # As they are read back from a file: a network rounds differently where they lie in another order.
    return pixels.contiguous()


def concatenate(parts: list[CalibrationSet]) -> CalibrationSet:
    """Batches of one run, in order, as one set."""

    def joined(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if any(tensor is None for tensor in tensors) else torch.cat(tensors)

    first = parts[0]
    return CalibrationSet(
        images=torch.cat([part.images for part in parts]),
        mask=torch.cat([part.mask for part in parts]),
        labels=joined("labels"),
        confidence=joined("confidence"),
        mean=first.mean,
        std=first.std,
        run=first.run,
        iterations=joined("iterations"),
    )


class SetFolder:
    """A calibration set on disk while it is being made: which batches are there, and which are missing.

    A folder that holds the same run is continued; one that holds anything else is refused, unless `overwrite`, which
    removes the files of a calibration set there and nothing else. The leader of a team claims the folder and finishes
    the set; everybody reads and writes batches.
    """

    def __init__(
        self,
        path: Path,
        run: dict[str, Any],
        versions: dict[str, str],
        *,
        overwrite: bool = False,
        team: Team = ALONE,
    ) -> None:
        self.path = path
        # As it will be read back: JSON knows lists, not tuples.
        self._run = json.loads(json.dumps(run))
        self._versions = versions
        self._lock: FolderLock | None = None
        try:
            self._checksums = team.lead(lambda: self._claim(overwrite))
        except BaseException:
            self.release()
            raise
        self.complete = bool(self._checksums)

    def _claim(self, overwrite: bool) -> dict[str, str]:
        """The checksums of the batches of a set that is complete."""
        self._lock = take_folder(self.path)
        path = self.path / MANIFEST
        if path.exists():
            manifest = read_json(path)
            if manifest.get("format") != FORMAT:
                raise DfqError(f"{path} does not describe a calibration set; choose another --out")
            if (manifest.get("version"), manifest.get("run")) == (VERSION, self._run):
                return _checksums(manifest, path)
            if not overwrite:
                raise DfqError(
                    f"{self.path} holds a calibration set of another run; choose another --out or give --overwrite"
                )
            remove_set(self.path)
        elif any(self.path.iterdir()):
            raise DfqError(f"{self.path} is not empty and holds no calibration set; choose another --out")
        self._write_manifest([])
        return {}

    def _write_manifest(self, shards: list[dict[str, Any]]) -> None:
        write_json(
            self.path / MANIFEST,
            {
                "format": FORMAT,
                "version": VERSION,
                "complete": bool(shards),
                "run": self._run,
                "shards": shards,
                "versions": self._versions,
            },
        )

    def _shard(self, index: int) -> Path:
        return self.path / f"shard-{index:05d}.safetensors"

    def read(self, index: int) -> CalibrationSet | None:
        """Batch `index` where it has been made, else None; one that is damaged is named, and counts as not made."""
        path = self._shard(index)
        if not path.exists():
            return None
        try:
            return _read_shard(path, self._run, self._checksums.get(path.name))
        except DfqError as error:
            log.warning("%s: it is made again", error)
            return None

    def write(self, index: int, part: CalibrationSet) -> None:
        """Keep batch `index`."""
        tensors = {name: getattr(part, name) for name in ("images", "mask", "labels", "confidence", "iterations")}
        present = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        # One entry: safetensors writes several in an order that changes from run to run, and checksums with it.
        content = save(present, {"dfq": f"{FORMAT} {VERSION}, batch {index}, sha256 {_sum_of(present)}"})
        path = self._shard(index)
        replace_file(path, lambda partial: partial.write_bytes(content))
        self._checksums.pop(path.name, None)
        self.complete = False

    def finish(self, counts: Sequence[int]) -> None:
        """Declare the set complete, with a checksum for each batch; counts: of the images in each."""
        self.complete = True
        paths = [self._shard(index) for index in range(len(counts))]
        self._write_manifest(
            [
                {"file": path.name, "images": count, "sha256": sha256_of(path)}
                for path, count in zip(paths, counts, strict=True)
            ]
        )

    def release(self) -> None:
        """Let others write to the folder."""
        if self._lock is not None:
            self._lock.release()


def remove_set(folder: Path) -> None:
    """Delete what a set consists of, finished or not, the manifest last; whatever else lies there stays.

    Raises DfqError where something cannot be deleted.
    """
    for path in [*sorted(folder.glob("shard-[0-9]*.safetensors")), folder / "preview.png", folder / "trace.png"]:
        remove_file(path)
    remove_file(folder / MANIFEST)


def load_calibration_set(path: Path | str) -> CalibrationSet:
    """Read a finished set. Raises DfqError where it is missing, unfinished, damaged or not a calibration set."""
    folder = Path(path)
    manifest_path = folder / MANIFEST
    if not manifest_path.is_file():
        wrong = f"it has no {MANIFEST}" if folder.is_dir() else "there is no such folder"
        raise DfqError(
            f"{folder} is not a calibration set: {wrong}; `dfq generate` makes one, and a folder of pictures is "
            "given as --calibration-images"
        )
    manifest = read_json(manifest_path)
    if manifest.get("format") != FORMAT:
        raise DfqError(f"{manifest_path} does not describe a calibration set (format {manifest.get('format')!r})")
    if manifest.get("version") != VERSION:
        raise DfqError(f"{manifest_path} has version {manifest.get('version')!r}; this dfq reads version {VERSION}")
    if not manifest.get("complete"):
        raise DfqError(f"{folder} is unfinished: run the command that made it again, and it goes on where it stopped")
    checksums, run = _checksums(manifest, manifest_path), manifest.get("run")
    if not checksums or not isinstance(run, dict):
        raise DfqError(f"{manifest_path} is damaged: it has no shards, or tells of no run")
    parts = []
    for name, checksum in checksums.items():
        if not _lies_in(folder, name):
            raise DfqError(f"{manifest_path} names {reprlib.repr(name)}, which is not a file in {folder}")
        try:
            parts.append(_read_shard(folder / name, run, checksum))
        except DfqError as error:
            raise DfqError(f"{error}: the command that made the set makes it again") from error
    if len({(part.images.shape[1:], part.mask.shape[1:]) for part in parts}) > 1:
        raise DfqError(f"{manifest_path} is damaged: its shards hold images of several sizes")
    return concatenate(parts)


def _lies_in(folder: Path, name: str) -> bool:
    """Whether `name` is that of a file in `folder` itself; a link is followed within the folder only."""
    path = folder / name
    try:
        return Path(name).name == name and path.is_file() and path.resolve().parent == folder.resolve()
    # A name that is too long, or bytes that cannot be in one.
    except (OSError, ValueError):
        return False


def _checksums(manifest: dict[str, Any], path: Path) -> dict[str, str]:
    """The SHA-256 of each shard by its name, in order; none while the set is unfinished."""
    try:
        return {str(entry["file"]): str(entry["sha256"]) for entry in manifest["shards"]}
    except (KeyError, TypeError) as error:
        raise DfqError(f"{path} is damaged: its list of shards cannot be read ({error!r})") from error


def _read_shard(path: Path, run: dict[str, Any], checksum: str | None) -> CalibrationSet:
    if not path.is_file():
        raise DfqError(f"{path} is not a file")
    if checksum is not None and sha256_of(path) != checksum:
        raise DfqError(f"{path} is damaged (its checksum is not that in {MANIFEST})")
    try:
        with safe_open(path, framework="pt") as file:
            note = (file.metadata() or {}).get("dfq", "")
        tensors = load_file(path)
        if checksum is None and not note.endswith(f"sha256 {_sum_of(tensors)}"):
            raise ValueError("its tensors are not those that were written")
        return CalibrationSet(
            images=tensors["images"],
            mask=tensors["mask"],
            labels=tensors.get("labels"),
            confidence=tensors.get("confidence"),
            mean=tuple(float(value) for value in run["mean"]),
            std=tuple(float(value) for value in run["std"]),
            run=run,
            iterations=tensors.get("iterations"),
        )
    except (DfqError, OSError, SafetensorError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        # Of a garbled header safetensors quotes all.
        raise DfqError(f"{path} is damaged ({str(error)[:200]})") from error


def _sum_of(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors on the CPU: their names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()
