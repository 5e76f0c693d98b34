"""A quantized model beside full precision on images without labels: how near its answers are, not how right."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from calibration import CalibrationSet
from calibration.calibration_set import MANIFEST, load_calibration_set, normalise
from calibration.pictures import IMAGE_EXTENSIONS, images_below
from dfq.datasets import ImageFolder
from dfq.errors import DfqError
from dfq.evaluation import count_answers, where_it_runs
from dfq.models import PYTORCH, resolve_device
from dfq.statistics import sqnr_db, wilson_interval
from dfq.tally import Classifier
from dfq.versions import versions


@dataclass(frozen=True)
class Likeness:
    """What `compare` measured.

    agreement: percent of the images on which both name the same class, with its 95 % interval (Wilson); kl: KL(full
    precision || quantized) of the predictions, in nats, mean over the images; logit_sqnr_db: power of the logits of
    full precision over that of the difference, infinite where there is none.
    """

    model: str
    bits: str
    device: str
    runtime: str
    num_images: int
    agreement: float
    agreement_ci95: tuple[float, float]
    kl: float
    logit_sqnr_db: float
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `logit_sqnr_db` is None where the logits are identical, since JSON has no infinity."""
        finite = self.logit_sqnr_db if math.isfinite(self.logit_sqnr_db) else None
        return vars(self) | {"agreement_ci95": list(self.agreement_ci95), "logit_sqnr_db": finite}

    def table(self) -> str:
        """The same for people, in a few aligned lines."""
        low, high = self.agreement_ci95
        sqnr = f"{self.logit_sqnr_db:.1f} dB" if math.isfinite(self.logit_sqnr_db) else "identical"
        rows = [
            ("agreement", f"{self.agreement:.2f} %", f"[{low:.2f}, {high:.2f}] %"),
            ("KL", f"{self.kl:.4f} nats", ""),
            ("logit SQNR", sqnr, ""),
        ]
        width = max(len(value) for _, value, _ in rows)
        lines = [f"{self.model}  {self.bits}  {self.num_images} images without labels, beside full precision"]
        lines += [f"  {name:<10}  {value:>{width}}  {rest}".rstrip() for name, value, rest in rows]
        return "\n".join(lines)


def compare(
    model: Classifier,
    baseline: Classifier,
    data: CalibrationSet | str | os.PathLike[str],
    *,
    batch_size: int = 64,
    workers: int = 0,
    device: str | torch.device | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> Likeness:
    """Run a model and the one it was quantized from on the same images, whose labels nobody knows.

    data: a folder, of which all images in it and below are taken; a calibration set, or the folder of one, whose
    images are whole. The rest is as of `evaluate`. Where `agreement` is a percent, the two accuracies on these images
    differ by 100 - a points at most, whatever the labels are.

    Raises DfqError: no images, a sparse calibration set, one made for other models, and what `evaluate` raises.
    """
    where = model.device if device is None else resolve_device(device)
    counted, _ = count_answers(
        model,
        baseline,
        _images(data, model),
        where,
        batch_size=batch_size,
        workers=workers,
        limit=limit,
        progress=progress,
    )
    count, agreeing = counted.num_images, counted.hits["agreeing"]
    low, high = wilson_interval(agreeing, count)
    return Likeness(
        model=model.name,
        bits=model.bits,
        device=str(where),
        runtime=where_it_runs(model),
        num_images=count,
        agreement=100 * agreeing / count,
        agreement_ci95=(100 * low, 100 * high),
        # Of nearly equal predictions rounding may bring the sum a trifle below zero.
        kl=max(counted.divergence / count, 0.0),
        logit_sqnr_db=sqnr_db(counted.signal, counted.noise),
        versions=versions(*(() if model.runtime == PYTORCH else (model.runtime,))),
    )


class _Made(Dataset[tuple[Tensor, int]]):
    """The images of a calibration set, normalised, each with a label that nobody looks at."""

    def __init__(self, images: CalibrationSet) -> None:
        self._set = images

    def __len__(self) -> int:
        return len(self._set)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return normalise(self._set.images[[index]], self._set.mean, self._set.std)[0], 0


def _images(data: CalibrationSet | str | os.PathLike[str], model: Classifier) -> Dataset[tuple[Tensor, int]]:
    if not isinstance(data, CalibrationSet):
        folder = Path(data)
        if not folder.is_dir():
            raise DfqError(f"there is no folder {folder} to take images from")
        if not (folder / MANIFEST).is_file():
            paths = images_below(folder)
            if not paths:
                known = ", ".join(IMAGE_EXTENSIONS)
                raise DfqError(f"there are no images in or below {folder}: files that end in {known}")
            return ImageFolder([(path, 0) for path in paths], model.preprocessing.transform())
        data = load_calibration_set(folder)
    wanted: Any = model.preprocessing
    size = tuple(data.images.shape[-2:])
    if (size, data.mean, data.std) != (wanted.image_size, wanted.mean, wanted.std):
        raise DfqError(
            f"the calibration set holds images of {size[0]}x{size[1]} with mean {data.mean} and std {data.std}, and "
            f"{model.name} takes others ({model.preprocessing.describe()}): generate one for this model"
        )
    if data.is_sparse:
        raise DfqError("a sparse calibration set has blank patches that no photograph has: generate a dense one")
    return _Made(data)
