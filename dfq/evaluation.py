"""Accuracy of a model beside full precision, on the same images, with what is needed to trust the numbers.

Both models see the same batches, so their difference is a paired one and far better known than either accuracy.
Intervals are at 95 %: Wilson's for a single accuracy, Agresti and Min's (2005) for the paired drop; the exact McNemar
test says how likely as uneven a split of the disagreements is when neither model is better.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from calibration.team import Team, team
from dfq.datasets import Labelled, image_folder
from dfq.errors import DfqError, UsageError
from dfq.models import PYTORCH, resolve_device
from dfq.progress import progress_bar
from dfq.statistics import mcnemar_p, paired_drop, sqnr_db, wilson_interval
from dfq.versions import versions

_TOP_K = 5


class Classifier(Labelled, Protocol):
    """What is used of a model: `Model`, `QuantizedModel` and `RuntimeModel` have it."""

    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> str: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def runtime(self) -> str: ...
    def to(self, device: torch.device, /) -> object: ...
    def __call__(self, images: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Comparison:
    """A model against its full-precision baseline on the same images."""

    baseline_top1: float
    """Percent of images the baseline gets right."""
    drop: float
    """`baseline_top1 - top1`, in points: positive when the model is worse."""
    drop_ci95: tuple[float, float]
    """Interval of the drop, in points (see `paired_drop`)."""
    agreement: float
    """Percent of images on which both give the same class, right or wrong."""
    mcnemar_p: float
    """p of the exact two-sided McNemar test (see `mcnemar_p`)."""
    logit_sqnr_db: float
    """Power of the baseline's logits over that of the difference, in dB; infinite when the logits are identical."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. Shares are in percent, differences of shares in points."""

    model: str
    bits: str
    device: str
    runtime: str
    """What computed the model: `pytorch`, or where an exported one was opened."""
    seed: int | None
    num_images: int
    top1: float
    top1_ci95: tuple[float, float]
    top5: float
    """Percent of images whose class is among the five likeliest (among all, where the model has fewer)."""
    images_per_second: float
    """Of the model's forward passes alone, without loading the images (see `evaluate`)."""
    weight_bytes: int
    versions: dict[str, str]
    comparison: Comparison | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON, in one level; the fields of `comparison` only where there was a baseline.

        JSON has no infinity: `logit_sqnr_db` is None (null) when the logits of both models are identical.
        """
        plain: dict[str, Any] = {
            "model": self.model,
            "bits": self.bits,
            "device": self.device,
            "runtime": self.runtime,
            "seed": self.seed,
            "num_images": self.num_images,
            "top1": self.top1,
            "top1_ci95": list(self.top1_ci95),
            "top5": self.top5,
        }
        if self.comparison is not None:
            against = self.comparison
            plain |= {
                "baseline_top1": against.baseline_top1,
                "drop": against.drop,
                "drop_ci95": list(against.drop_ci95),
                "agreement": against.agreement,
                "mcnemar_p": against.mcnemar_p,
                "logit_sqnr_db": against.logit_sqnr_db if math.isfinite(against.logit_sqnr_db) else None,
            }
        return plain | {
            "images_per_second": self.images_per_second,
            "weight_bytes": self.weight_bytes,
            "versions": dict(self.versions),
        }

    def table(self) -> str:
        """The same for people: aligned plain text of a few lines, without a newline at the end."""
        rows = [
            ("top-1", f"{self.top1:.2f} %", self._share_interval(self.top1)),
            ("top-5", f"{self.top5:.2f} %", self._share_interval(self.top5)),
        ]
        if self.comparison is not None:
            against = self.comparison
            sqnr = f"{against.logit_sqnr_db:.1f} dB" if math.isfinite(against.logit_sqnr_db) else "identical"
            rows += [
                ("full-precision top-1", f"{against.baseline_top1:.2f} %", self._share_interval(against.baseline_top1)),
                (
                    "drop",
                    f"{against.drop:.2f} points",
                    f"{_interval(against.drop_ci95)} points, p = {against.mcnemar_p:.2g}",
                ),
                ("agreement", f"{against.agreement:.2f} %", self._share_interval(against.agreement)),
                ("logit SQNR", sqnr, ""),
            ]
        passes = "forward passes"
        if self.runtime != PYTORCH:
            passes += f" in {self.runtime}"
        elif self.bits != "fp32":
            passes = f"fake-quantized {passes}"
        rows += [
            ("weights", f"{self.weight_bytes / 1e6:.2f} MB", ""),
            ("speed", f"{self.images_per_second:.1f} images/s", f"{passes} on {self.device}"),
        ]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{self.model}  {self.bits}  {self.num_images} images; in brackets 95 % intervals"]
        lines += [f"  {name:<{widths[0]}}  {value:>{widths[1]}}  {rest}".rstrip() for name, value, rest in rows]
        return "\n".join(lines)

    def _share_interval(self, percent: float) -> str:
        low, high = wilson_interval(round(percent * self.num_images / 100), self.num_images)
        return f"{_interval((100 * low, 100 * high))} %"


def evaluate(
    model: Classifier,
    data: Dataset[Any] | str | os.PathLike[str],
    *,
    baseline: Classifier | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str | torch.device | None = None,
    limit: int | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measures `model`, and `baseline` beside it on the same batches.

    Processes of one torch.distributed group share the batches, and each gets the whole result: the same numbers, but
    for the speed, that one process alone would count.

    data: a dataset of (image `[3, H, W]` as the model wants it, label), or a folder with one folder of images per class
    (see `dfq.datasets.image_folder`). batch_size: images per forward pass. workers: processes that load images, 0 for
    none. device: where to run, by default where `model` is; both models are moved there and back again. limit: at most
    so many images, evenly spaced over the dataset (the first ones of a dataset that can only be read in order). seed:
    only noted in the result; nothing here is random. progress: a bar on stderr, when that is a terminal.

    `images_per_second` counts the forward passes of `model` alone. The first batch warms up and is left out,
    where there are more.

    Raises: DfqError when there are no images, labels or logits do not fit, logits are NaN or infinite, or the baseline
    takes other images than the model; UsageError when a number is out of range or the device is not there.
    """
    _check_counts(batch_size, workers, limit)
    if baseline is not None:
        _check_comparable(model, baseline)
    where = model.device if device is None else resolve_device(device)
    dataset = image_folder(data, model) if isinstance(data, str | os.PathLike) else data
    if limit is not None:
        dataset = _evenly_spaced(dataset, limit)
    shared = team()
    loader = DataLoader(
        dataset,
        # Batches are whole whoever has them: a network rounds differently in another batch.
        **_own_batches(dataset, batch_size, shared),
        num_workers=workers,
        pin_memory=where.type == "cuda",
        # Otherwise the loader draws from torch's global generator, and the user's next random number would be another.
        generator=torch.Generator(),
    )

    tally = _Tally(model, baseline)
    with (
        _moved(model, where),
        _moved(baseline, where),
        torch.inference_mode(),
        progress_bar(_length(loader), "evaluate", "batch", shown=progress and shared.leads) as bar,
    ):
        left = limit
        in_order = isinstance(dataset, IterableDataset)
        for index, (images, labels) in enumerate(loader):
            if left is not None and in_order:
                images, labels = images[:left], labels[:left]
                left -= len(images)
            # What can only be read in order is read by all.
            if not in_order or index % shared.size == shared.rank:
                tally.add(images.to(where), labels)
            bar.update()
            if left == 0:
                break
    return tally.result(where, seed, shared)


def _length(loader: DataLoader[Any]) -> int | None:
    try:
        return len(loader)
    # Of images that are read one after another.
    except TypeError:
        return None


@dataclass(frozen=True)
class _Counted:
    """What was counted of one batch. Sums are of 64 bits, whatever the device."""

    hits: dict[str, int]
    signal: float
    noise: float
    num_images: int
    seconds: float


class _Tally:
    """Runs batches and counts."""

    def __init__(self, model: Classifier, baseline: Classifier | None) -> None:
        self._model = model
        self._baseline = baseline
        self._batches: list[_Counted] = []

    def add(self, images: Tensor, labels: Tensor) -> None:
        """images: `[B, 3, H, W]`, on the model's device; labels: `[B]`, on the CPU."""
        model, baseline = self._model, self._baseline
        _check_labels(labels, model)
        logits, seconds = _timed_logits(model, images)
        best = _best_classes(logits)
        right = best[:, 0] == labels
        hits = {"right": right, "right5": (best == labels[:, None]).any(1)}
        signal = noise = 0.0
        if baseline is not None:
            reference, _ = _timed_logits(baseline, images)
            predicted = _best_classes(reference)[:, 0]
            baseline_right = predicted == labels
            hits |= {
                "baseline_right": baseline_right,
                "lost": baseline_right & ~right,
                "gained": right & ~baseline_right,
                "agreeing": predicted == best[:, 0],
            }
            signal = float(reference.square().sum())
            noise = float((reference - logits).square().sum())
        counts = {name: int(which.sum()) for name, which in hits.items()}
        self._batches.append(_Counted(counts, signal, noise, len(images), seconds))

    def result(self, device: torch.device, seed: int | None, shared: Team) -> Evaluation:
        found = shared.gather(self._batches)
        # In the order of the dataset, so that sums round alike whoever shares them.
        counted = [batch for turn in zip_longest(*found) for batch in turn if batch is not None]
        num_images = sum(batch.num_images for batch in counted)
        if num_images == 0:
            raise DfqError("the dataset is empty; there must be images to evaluate on")
        hits: Counter[str] = Counter()
        for batch in counted:
            hits.update(batch.hits)
        low, high = wilson_interval(hits["right"], num_images)
        return Evaluation(
            model=self._model.name,
            bits=self._model.bits,
            device=str(device),
            runtime=self._model.runtime,
            seed=seed,
            num_images=num_images,
            top1=100 * hits["right"] / num_images,
            top1_ci95=(100 * low, 100 * high),
            top5=100 * hits["right5"] / num_images,
            images_per_second=sum(map(_images_per_second, found)),
            weight_bytes=self._model.weight_bytes,
            versions=versions(*(() if self._model.runtime == PYTORCH else (self._model.runtime,))),
            comparison=None if self._baseline is None else self._comparison(hits, counted, num_images),
        )

    def _comparison(self, hits: Counter[str], counted: list[_Counted], num_images: int) -> Comparison:
        lost, gained = hits["lost"], hits["gained"]
        drop, (low, high) = paired_drop(lost, gained, num_images)
        return Comparison(
            baseline_top1=100 * hits["baseline_right"] / num_images,
            drop=100 * drop,
            drop_ci95=(100 * low, 100 * high),
            agreement=100 * hits["agreeing"] / num_images,
            mcnemar_p=mcnemar_p(lost, gained),
            logit_sqnr_db=sqnr_db(sum(batch.signal for batch in counted), sum(batch.noise for batch in counted)),
        )


def _images_per_second(batches: list[_Counted]) -> float:
    """Of one process. The first batch warms up and is left out, where there are more."""
    timed = batches[1:] or batches
    return sum(batch.num_images for batch in timed) / max(sum(batch.seconds for batch in timed), 1e-9)


def _own_batches(dataset: Dataset[Any], batch_size: int, shared: Team) -> dict[str, Any]:
    """For a DataLoader: which batches of a dataset are this process's."""
    if shared.size == 1 or isinstance(dataset, IterableDataset):
        return {"batch_size": batch_size}
    count = len(dataset)  # type: ignore[arg-type]  # torch declares no length, but every map-style dataset has one
    whole = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    return {"batch_sampler": [whole[index] for index in shared.part_of(len(whole))]}


def _check_counts(batch_size: int, workers: int, limit: int | None) -> None:
    if batch_size < 1:
        raise UsageError(f"the batch size is {batch_size}; it must be 1 or more")
    if workers < 0:
        raise UsageError(f"the number of workers is {workers}; it must be 0 or more")
    if limit is not None and limit < 1:
        raise UsageError(f"the number of images to evaluate on is {limit}; it must be 1 or more")


def _check_comparable(model: Classifier, baseline: Classifier) -> None:
    if model.num_classes != baseline.num_classes:
        raise DfqError(
            f"the model {model.name} has {model.num_classes} classes and the baseline {baseline.name} has "
            f"{baseline.num_classes}; compare with the model that was quantized"
        )
    if model.preprocessing != baseline.preprocessing:
        raise DfqError(
            f"the model {model.name} and the baseline {baseline.name} want their images prepared differently "
            f"({model.preprocessing.describe()}; {baseline.preprocessing.describe()}); evaluate each alone"
        )


def _check_labels(labels: Tensor, model: Classifier) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= model.num_classes:
        raise DfqError(
            f"the dataset has the label {low if low < 0 else high} and the classes of {model.name} are 0 to "
            f"{model.num_classes - 1}; evaluate on images of the model's own classes"
        )


def _best_classes(logits: Tensor) -> Tensor:
    """`[B, C]` -> `[B, 5]`, the best first. Found in one way for both models, or equal logits would be told apart."""
    return logits.topk(min(_TOP_K, logits.shape[1]), dim=1).indices


def _timed_logits(model: Classifier, images: Tensor) -> tuple[Tensor, float]:
    """The checked logits `[B, C]`, float64 on the CPU, and the seconds the forward pass took."""
    start = _clock(images.device)
    try:
        logits = model(images)
    except torch.OutOfMemoryError:
        raise DfqError(
            f"{model.name} does not fit into the memory of {images.device} with {len(images)} images at once; "
            "use a smaller batch size"
        ) from None
    seconds = _clock(images.device) - start
    if logits.shape != (len(images), model.num_classes):
        raise DfqError(
            f"{model.name} gives an output of shape {tuple(logits.shape)} for {len(images)} images and "
            f"{model.num_classes} classes; only classifiers, with one logit per image and class, can be evaluated"
        )
    if not bool(logits.isfinite().all()):
        if not bool(images.isfinite().all()):
            raise DfqError("the dataset holds images that are NaN or infinite; evaluate on images without such pixels")
        raise DfqError(
            f"{model.name} ({model.bits}) gives logits that are NaN or infinite; look for such values in its weights, "
            "or quantize it to more bits"
        )
    return logits.cpu().double(), seconds


@contextmanager
def _moved(model: Classifier | None, device: torch.device) -> Iterator[None]:
    """The model on this device for a while; then where it was."""
    if model is None or model.device == device:
        yield
        return
    before = model.device
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


def _evenly_spaced(dataset: Dataset[Any], limit: int) -> Dataset[Any]:
    """At most so many of its images. The first ones will not do: sorted by class, they are all of the first classes."""
    if isinstance(dataset, IterableDataset):
        return dataset
    size = len(dataset)  # type: ignore[arg-type]  # torch declares no length, but every map-style dataset has one
    return Subset(dataset, [index * size // limit for index in range(limit)]) if limit < size else dataset


def _clock(device: torch.device) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _interval(ends: tuple[float, float]) -> str:
    return f"[{ends[0]:.2f}, {ends[1]:.2f}]"
