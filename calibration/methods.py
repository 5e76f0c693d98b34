"""The named methods, each a few lines of composition, and the one function that runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from calibration import inversion
from calibration.calibration_set import CalibrationSet, SetFolder, concatenate, to_pixels
from calibration.errors import DfqError
from calibration.inversion import Precision, Progress, Settings
from calibration.objectives import Objective
from calibration.preview import write_preview
from calibration.schedules import Dense, PatchSchedule, ProgressiveStop
from calibration.sources import gaussian_noise
from calibration.tokens import PatchGrid


@dataclass(frozen=True)
class Method:
    """How images are made. `schedule` is None for a source without inversion."""

    summary: str
    schedule: PatchSchedule | None = None
    objective: Objective = field(default_factory=Objective)
    settings: Settings = field(default_factory=Settings)


METHODS: dict[str, Method] = {
    "smi": Method("sparse model inversion: background patches stop early (SMI, ICML 2024)", ProgressiveStop()),
    "dense": Method("dense model inversion: every patch, all the time (DeepInversion, CVPR 2020)", Dense()),
    "gaussian": Method("Gaussian noise, no inversion: the lower end of any comparison"),
}

# Published: 4,000. Under quantizers that only look for ranges, a few hundred calibrate as well (docs/methods.md).
DEFAULT_ITERATIONS = 500


@dataclass(frozen=True)
class Plan:
    """One run, fixed to the last number: what is made, from which seed, in which batches."""

    method: str
    num_images: int
    iterations: int
    batch_size: int
    seed: int
    precision: Precision

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise DfqError(f"unknown method {self.method!r}: choose from {', '.join(METHODS)}")
        for name in ("num_images", "iterations", "batch_size"):
            if getattr(self, name) < 1:
                raise DfqError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.seed < 0:
            raise DfqError(f"the seed must not be negative, and {self.seed} is")
        if self.precision not in get_args(Precision):
            raise DfqError(f"unknown precision {self.precision!r}: choose from {', '.join(get_args(Precision))}")

    @property
    def batches(self) -> list[int]:
        """The number of images of each batch."""
        full, rest = divmod(self.num_images, self.batch_size)
        return [self.batch_size] * full + [rest] * bool(rest)

    def describe(self, mean: tuple[float, ...], std: tuple[float, ...], grid: PatchGrid) -> dict[str, Any]:
        """Everything the images depend on, apart from the model."""
        method = METHODS[self.method]
        run: dict[str, Any] = {
            "method": self.method,
            "num_images": self.num_images,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "image_size": list(grid.image_size),
            "patch_grid": [grid.rows, grid.columns],
            "mean": list(mean),
            "std": list(std),
        }
        if method.schedule is not None:
            settings = replace(method.settings, iterations=self.iterations)
            run["inversion"] = inversion.describe(method.objective, method.schedule, settings)
            run["precision"] = self.precision
        return run


def batch_generator(seed: int, batch: int) -> torch.Generator:
    """The randomness of one batch hangs on (seed, batch) alone, whoever makes it and whenever."""
    state = np.random.SeedSequence([seed, batch]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def make_batch(
    vit: VisionTransformer,
    plan: Plan,
    batch: int,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    run: dict[str, Any],
    on_step: Callable[[Progress], None] | None = None,
) -> CalibrationSet:
    """Batch number `batch` of `plan`, on the model's device."""
    method = METHODS[plan.method]
    grid = PatchGrid.of(vit)
    count = plan.batches[batch]
    generator = batch_generator(plan.seed, batch)
    initial = gaussian_noise(count, grid.image_size, generator)
    if method.schedule is None:
        everything = torch.ones(count, grid.rows, grid.columns, dtype=torch.bool)
        return CalibrationSet(to_pixels(initial, mean, std), everything, None, None, mean, std, run)

    device = next(vit.parameters()).device
    labels = torch.randint(vit.num_classes, (count,), generator=generator)
    result = inversion.invert(
        vit,
        initial.to(device),
        labels.to(device),
        mean=mean,
        std=std,
        objective=method.objective,
        schedule=method.schedule,
        settings=replace(method.settings, iterations=plan.iterations),
        generator=generator,
        precision=plan.precision,
        on_step=on_step,
    )
    return CalibrationSet(
        images=to_pixels(result.images, mean, std).cpu(),
        mask=grid.mask_of(result.keep).cpu(),
        labels=labels,
        confidence=result.confidence.float().cpu(),
        mean=mean,
        std=std,
        run=run,
    )


def generate(
    vit: VisionTransformer,
    plan: Plan,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    run: dict[str, Any],
    folder: SetFolder | None = None,
    on_step: Callable[[int, Progress], None] | None = None,
) -> CalibrationSet:
    """All batches of `plan`; those `folder` already holds are read, the others are made and kept there."""
    parts = []
    for batch in range(len(plan.batches)):
        part = folder.read(batch) if folder is not None else None
        if part is None:
            report = None if on_step is None else (lambda progress, batch=batch: on_step(batch, progress))
            part = make_batch(vit, plan, batch, mean=mean, std=std, run=run, on_step=report)
            if folder is not None:
                folder.write(batch, part)
        parts.append(part)
    whole = concatenate(parts)
    if folder is not None:
        write_preview(whole, folder.path / "preview.png")
        folder.finish(parts)
    return whole
