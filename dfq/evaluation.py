"""Accuracy of a model beside full precision, on the same images, with what is needed to trust the numbers.

Both models see the same batches, so their difference is a paired one and far better known than either accuracy.
Intervals are at 95 %: Wilson's for a single accuracy, Agresti and Min's (2005) for the paired drop; the exact McNemar
test says how likely as uneven a split of the disagreements is when neither model is better.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from calibration.team import Team, team
from dfq.datasets import image_folder
from dfq.errors import DfqError, UsageError
from dfq.models import PYTORCH, resolve_device
from dfq.progress import progress_bar
from dfq.runtime import FULL, RuntimeModel
from dfq.statistics import mcnemar_p, paired_drop, sqnr_db, wilson_interval
from dfq.tally import Classifier, Counted, Tally, moved
from dfq.versions import versions


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

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Comparison:
        """See `Evaluation.from_dict`."""
        sqnr = content["logit_sqnr_db"]
        return cls(
            baseline_top1=_percent(content["baseline_top1"]),
            drop=float(content["drop"]),
            drop_ci95=_pair(content["drop_ci95"]),
            agreement=_percent(content["agreement"]),
            mcnemar_p=float(content["mcnemar_p"]),
            logit_sqnr_db=math.inf if sqnr is None else float(sqnr),
        )


@dataclass(frozen=True)
class ClassCounts:
    """Images of one class: how many there are, and on how many of them which model was right.

    baseline_right, agreeing (both gave the same answer, right or wrong): None where there was no baseline.
    """

    label: int
    num_images: int
    right: int
    baseline_right: int | None
    agreeing: int | None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ClassCounts:
        """See `Evaluation.from_dict`."""
        label, all = _count(content["label"]), _count(content["num_images"], 1)
        compared = (content["baseline_right"], content["agreeing"])
        right, same = (None if count is None else _count(count, 0, all) for count in compared)
        return cls(label, all, _count(content["right"], 0, all), right, same)


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
    classes: tuple[ClassCounts, ...] = ()
    """Those of which there were images, by label."""
    changed: tuple[tuple[int, int, int], ...] = ()
    """(the baseline's answer, the model's other one, on how many images), the most frequent first."""

    def to_dict(self, *, classes: bool = False) -> dict[str, Any]:
        """The same as plain values for JSON, in one level; the fields of `comparison` only where there was a baseline.

        classes: also `classes` and `changed`, which may be long. JSON has no infinity: `logit_sqnr_db` is None (null)
        when the logits of both models are identical.
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
        plain |= {
            "images_per_second": self.images_per_second,
            "weight_bytes": self.weight_bytes,
            "versions": dict(self.versions),
        }
        if classes:
            plain["classes"] = [vars(counts) for counts in self.classes]
            plain["changed"] = [list(entry) for entry in self.changed]
        return plain

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Evaluation:
        """What `to_dict` gave, with classes or without. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            model=str(content["model"]),
            bits=str(content["bits"]),
            device=str(content["device"]),
            runtime=str(content["runtime"]),
            seed=None if content["seed"] is None else int(content["seed"]),
            num_images=_count(content["num_images"], 1),
            top1=_percent(content["top1"]),
            top1_ci95=_pair(content["top1_ci95"]),
            top5=_percent(content["top5"]),
            images_per_second=float(content["images_per_second"]),
            weight_bytes=int(content["weight_bytes"]),
            versions={str(name): str(number) for name, number in content["versions"].items()},
            comparison=Comparison.from_dict(content) if "drop" in content else None,
            classes=tuple(ClassCounts.from_dict(counts) for counts in content.get("classes", ())),
            changed=tuple((_count(a), _count(b), _count(n)) for a, b, n in content.get("changed", ())),
        )

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
    where = model.device if device is None else resolve_device(device)
    dataset = image_folder(data, model) if isinstance(data, str | os.PathLike) else data
    counted, images_per_second = count_answers(
        model, baseline, dataset, where, batch_size=batch_size, workers=workers, limit=limit, progress=progress
    )
    low, high = wilson_interval(counted.hits["right"], counted.num_images)
    return Evaluation(
        model=model.name,
        bits=model.bits,
        device=str(where),
        runtime=where_it_runs(model),
        seed=seed,
        num_images=counted.num_images,
        top1=100 * counted.hits["right"] / counted.num_images,
        top1_ci95=(100 * low, 100 * high),
        top5=100 * counted.hits["right5"] / counted.num_images,
        images_per_second=images_per_second,
        weight_bytes=model.weight_bytes,
        versions=versions(*(() if model.runtime == PYTORCH else (model.runtime,))),
        comparison=None if baseline is None else _comparison(counted),
        classes=_classes(counted, compared=baseline is not None),
        changed=tuple(
            (answer, other, count) for (answer, other), count in sorted(counted.changed.items(), key=_by_count)
        ),
    )


def count_answers(
    model: Classifier,
    baseline: Classifier | None,
    dataset: Dataset[Any],
    where: torch.device,
    *,
    batch_size: int,
    workers: int,
    limit: int | None,
    progress: bool,
) -> tuple[Counted, float]:
    """What both say of the images of a dataset, on the device `where`, and the model's images per second.

    See `evaluate`, also for what is raised.
    """
    _check_counts(batch_size, workers, limit)
    if baseline is not None:
        _check_comparable(model, baseline)
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

    tally = Tally(model, baseline)
    with (
        moved(model, where),
        moved(baseline, where),
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
    return tally.total(shared)


def _length(loader: DataLoader[Any]) -> int | None:
    try:
        return len(loader)
    # Of images that are read one after another.
    except TypeError:
        return None


def _by_count(entry: tuple[tuple[int, int], int]) -> tuple[int, tuple[int, int]]:
    """The most frequent first."""
    answers, count = entry
    return -count, answers


def where_it_runs(model: Classifier) -> str:
    """The runtime, and of an exported model the precision of what is not computed in integers, unless it is fp32."""
    if isinstance(model, RuntimeModel) and model.precision != FULL:
        return f"{model.runtime} ({model.precision})"
    return model.runtime


def _comparison(counted: Counted) -> Comparison:
    hits, num_images = counted.hits, counted.num_images
    drop, (low, high) = paired_drop(hits["lost"], hits["gained"], num_images)
    return Comparison(
        baseline_top1=100 * hits["baseline_right"] / num_images,
        drop=100 * drop,
        drop_ci95=(100 * low, 100 * high),
        agreement=100 * hits["agreeing"] / num_images,
        mcnemar_p=mcnemar_p(hits["lost"], hits["gained"]),
        logit_sqnr_db=sqnr_db(counted.signal, counted.noise),
    )


def _classes(counted: Counted, *, compared: bool) -> tuple[ClassCounts, ...]:
    def of(label: int, what: str) -> int:
        return counted.by_class[label, what]

    labels = sorted({label for label, _ in counted.by_class})
    return tuple(
        ClassCounts(
            label,
            of(label, "all"),
            of(label, "right"),
            of(label, "baseline_right") if compared else None,
            of(label, "agreeing") if compared else None,
        )
        for label in labels
    )


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


def _evenly_spaced(dataset: Dataset[Any], limit: int) -> Dataset[Any]:
    """At most so many of its images. The first ones will not do: sorted by class, they are all of the first classes."""
    if isinstance(dataset, IterableDataset):
        return dataset
    size = len(dataset)  # type: ignore[arg-type]  # torch declares no length, but every map-style dataset has one
    return Subset(dataset, [index * size // limit for index in range(limit)]) if limit < size else dataset


def _pair(ends: Any) -> tuple[float, float]:
    low, high = ends
    return float(low), float(high)


def _count(value: Any, low: int = 0, high: int = 2**53) -> int:
    """Raises ValueError where it is out of range."""
    if not low <= int(value) <= high:
        raise ValueError(f"a count of {value}")
    return int(value)


def _percent(value: Any) -> float:
    """Raises ValueError where it is none."""
    if not 0 <= float(value) <= 100:
        raise ValueError(f"a share of {value} %")
    return float(value)


def _interval(ends: tuple[float, float]) -> str:
    return f"[{ends[0]:.2f}, {ends[1]:.2f}]"
