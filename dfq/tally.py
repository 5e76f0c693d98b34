"""Two models run on the same batches, and what is counted of their answers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor

from calibration.team import Team
from dfq.datasets import Labelled
from dfq.errors import DfqError
from dfq.statistics import divergence

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
class Counted:
    """What was counted of some images; sums are of 64 bits, whatever the device.

    hits: of all images by what happened; by_class: of those of one class, by (its label, what happened); changed: by
    (the baseline's answer, the model's), where they are two; divergence: KL(baseline || model) of the predictions, in
    nats; signal, noise: powers of the baseline's logits and of the difference; seconds: of the model's forward passes.
    """

    hits: Counter[str]
    by_class: Counter[tuple[int, str]]
    changed: Counter[tuple[int, int]]
    divergence: float
    signal: float
    noise: float
    num_images: int
    seconds: float

    @classmethod
    def sum(cls, parts: list[Counted]) -> Counted:
        """Of several, added up in their order."""
        hits: Counter[str] = Counter()
        by_class: Counter[tuple[int, str]] = Counter()
        changed: Counter[tuple[int, int]] = Counter()
        for part in parts:
            hits.update(part.hits)
            by_class.update(part.by_class)
            changed.update(part.changed)
        names = ("divergence", "signal", "noise", "num_images", "seconds")
        return cls(hits, by_class, changed, *(sum(getattr(part, name) for part in parts) for name in names))

    @property
    def images_per_second(self) -> float:
        """Of the forward passes."""
        return self.num_images / max(self.seconds, 1e-9)


class Tally:
    """Runs batches of a model, and of its baseline where there is one, and counts."""

    def __init__(self, model: Classifier, baseline: Classifier | None) -> None:
        self._model = model
        self._baseline = baseline
        self._batches: list[Counted] = []

    def add(self, images: Tensor, labels: Tensor) -> None:
        """images: `[B, 3, H, W]`, on the model's device; labels: `[B]`, on the CPU.

        Raises DfqError for labels and logits that do not fit, for logits that are not finite, and where memory ends.
        """
        model, baseline = self._model, self._baseline
        _check_labels(labels, model)
        logits, seconds = _timed_logits(model, images)
        best = _best_classes(logits)
        found = best[:, 0]
        right = found == labels
        marks = {"all": torch.ones_like(right), "right": right, "right5": (best == labels[:, None]).any(1)}
        changed: Counter[tuple[int, int]] = Counter()
        kl = signal = noise = 0.0
        if baseline is not None:
            reference, _ = _timed_logits(baseline, images)
            expected = _best_classes(reference)[:, 0]
            baseline_right, agreeing = expected == labels, expected == found
            marks |= {
                "baseline_right": baseline_right,
                "lost": baseline_right & ~right,
                "gained": right & ~baseline_right,
                "agreeing": agreeing,
            }
            changed.update(zip(expected[~agreeing].tolist(), found[~agreeing].tolist(), strict=True))
            kl = float(divergence(logits, reference).sum())
            signal = float(reference.square().sum())
            noise = float((reference - logits).square().sum())
        hits = Counter({name: int(which.sum()) for name, which in marks.items()})
        by_class = Counter((label, name) for name, which in marks.items() for label in labels[which].tolist())
        self._batches.append(Counted(hits, by_class, changed, kl, signal, noise, len(images), seconds))

    def total(self, shared: Team) -> tuple[Counted, float]:
        """Of all batches of all processes, and images per second.

        The first batch of each process warms up and is left out of the speed, where there are more.

        Raises DfqError where there were no images.
        """
        found = shared.gather(self._batches)
        # In the order of the dataset, so that sums round alike whoever shares them.
        counted = Counted.sum([batch for turn in zip_longest(*found) for batch in turn if batch is not None])
        if counted.num_images == 0:
            raise DfqError("the dataset is empty; there must be images to evaluate on")
        return counted, sum(Counted.sum(batches[1:] or batches).images_per_second for batches in found)


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
def moved(model: Classifier | None, device: torch.device) -> Iterator[None]:
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


def _clock(device: torch.device) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
