"""`generate`: a calibration set from a model and no data."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

import calibration
from calibration import CalibrationSet, Plan
from calibration.calibration_set import SetFolder
from calibration.inversion import Precision, Progress
from calibration.methods import DEFAULT_ITERATIONS
from calibration.tokens import PatchGrid
from dfq.models import Model, check_supported
from dfq.versions import versions

log = logging.getLogger("dfq")


def describe_run(model: Model, plan: Plan) -> dict[str, Any]:
    """Everything the images of a run depend on; two runs with the same description give the same set."""
    preprocessing = model.preprocessing
    described = plan.describe(preprocessing.mean, preprocessing.std, PatchGrid.of(model.module))
    return described | {"model": model.origin.to_dict()}


def generate(
    model: Model,
    method: str = "smi",
    num_images: int = 32,
    *,
    iterations: int = DEFAULT_ITERATIONS,
    batch_size: int = 32,
    seed: int = 0,
    precision: Precision = "auto",
    out: Path | str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> CalibrationSet:
    """Make a calibration set without a single real image.

    method: `smi` (sparse model inversion), `dense`, or `gaussian` noise; iterations: of Adam, per batch (published:
    4,000; ignored by `gaussian`); batch_size: images optimised together; seed: with it and the batch size the same
    images come out on the same hardware; precision: of the model's passes, `auto` picks bf16 where the hardware has
    it; out: a folder to keep the set in, batch by batch: a run that was stopped goes on there, and a finished one is
    read. overwrite: replace a set of another run that lies there.

    Raises DfqError: an unknown method, a model that is not supported, or whose patches cannot be ranked for want of a
    class token, a folder that holds something else.
    """
    plan = Plan(method, num_images, iterations, batch_size, seed, precision)
    check_supported(model.name, model.module)
    mean, std = model.preprocessing.mean, model.preprocessing.std
    run = describe_run(model, plan)
    schedule = calibration.METHODS[method].schedule
    beyond = [] if schedule is None else [at for at in schedule.decisions if at >= iterations]
    if beyond:
        log.warning(
            "%s stops patches at iterations up to %d, and %d are asked for: more patches stay than published",
            method,
            beyond[-1],
            iterations,
        )
    folder = None if out is None else SetFolder(Path(out), run, versions(), overwrite=overwrite)

    started = time.monotonic()
    # One bar for the whole run: what is left is what a person wants to know.
    total = len(plan.batches) * (iterations if schedule is not None else 1)
    with tqdm(total=total, desc=method, unit="it", file=sys.stderr, disable=None if progress else True) as bar:

        def on_step(batch: int, step: Progress) -> None:
            bar.n = batch * iterations + step.iteration
            bar.set_postfix_str(
                f"batch {batch + 1}/{len(plan.batches)}, loss {step.loss:.3f}, "
                f"confidence {step.confidence:.0%}, {step.kept_patches} patches",
                refresh=False,
            )
            bar.refresh()

        made = calibration.generate(
            model.module, plan, mean=mean, std=std, run=run, folder=folder, on_step=None if bar.disable else on_step
        )
    log.info("%s: %d images in %.1f s", method, len(made), time.monotonic() - started)
    return made


def real_images(model: Model, folder: Path | str, num_images: int = 32, *, seed: int = 0) -> CalibrationSet:
    """A calibration set of real images instead, with the model's own preprocessing.

    `num_images` are drawn by `seed` from all that lie in or below `folder`; their labels are not looked at.
    Raises DfqError where the folder is missing, holds too few images, or one cannot be read.
    """
    return calibration.real_images(
        folder,
        PatchGrid.of(model.module),
        model.preprocessing.transform(),
        mean=model.preprocessing.mean,
        std=model.preprocessing.std,
        num_images=num_images,
        seed=seed,
    )
