"""`generate`: a calibration set from a model and no data."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import calibration
from calibration import CalibrationSet, Dense, Method, PatchSchedule, Plan, ProgressiveStop, Rebirth
from calibration.calibration_set import SetFolder, concatenate
from calibration.inversion import Progress
from calibration.methods import DEFAULT_METHOD, METHODS, SCHEDULES
from calibration.passes import Precision, resolve_precision
from calibration.team import team
from calibration.tokens import PatchGrid
from dfq.datasets import class_captions
from dfq.errors import UsageError
from dfq.models import Model
from dfq.progress import progress_bar
from dfq.support import check_invertible
from dfq.versions import versions

log = logging.getLogger("dfq")

# Without the rate, so that what tells of the images fits into 80 columns.
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


def describe_run(model: Model, plan: Plan) -> dict[str, Any]:
    """Everything the images of a run depend on, but for the make of the hardware and the versions of the libraries."""
    preprocessing = model.preprocessing
    run = plan.describe(preprocessing.mean, preprocessing.std, PatchGrid.of(model.module))
    if "precision" in run:
        # As it is, not as it was asked for: a set begun in one precision is not to be finished in another.
        run["precision"] = str(resolve_precision(plan.precision, model.device)).removeprefix("torch.")
        run["device"] = model.device.type
    return run | {"model": model.origin.to_dict()}


def chosen_schedule(
    method: str | Method,
    schedule: str | None,
    *,
    stops: Sequence[int] | None = None,
    ratio: float | None = None,
    division: int | None = None,
) -> PatchSchedule | None:
    """A schedule by name with what is to be other about it; None where the method's own is left as it is.

    stops, ratio: of `smi`; division: of `pri`. Raises UsageError where they are not for the schedule, or nobody knows
    it.
    """
    if schedule is not None and schedule not in SCHEDULES:
        raise UsageError(f"unknown schedule {schedule!r}: choose from {', '.join(SCHEDULES)}")
    given = {"stops": None if stops is None else tuple(stops), "ratio": ratio, "division": division}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if not changes:
        return None if schedule is None else SCHEDULES[schedule]
    known = METHODS.get(method) if isinstance(method, str) else method
    changed: Any = SCHEDULES[schedule] if schedule is not None else getattr(known, "schedule", None)
    if changes.keys() & {"stops", "ratio"} and not isinstance(changed, ProgressiveStop):
        raise UsageError("--stop-at and --stop-ratio belong to --schedule smi")
    if "division" in changes and not isinstance(changed, Rebirth):
        raise UsageError("--division belongs to --schedule pri")
    try:
        chosen: PatchSchedule = replace(changed, **changes)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return chosen


def generate(
    model: Model,
    method: str | Method = DEFAULT_METHOD,
    num_images: int = 32,
    *,
    iterations: int | Literal["auto"] = "auto",
    batch_size: int = 32,
    seed: int = 0,
    precision: Precision = "auto",
    initial: str | None = None,
    schedule: str | PatchSchedule | None = None,
    learning_rate: float | None = None,
    trace: bool = False,
    out: Path | str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> CalibrationSet:
    """Make a calibration set without a single real image.

    method: a name in `calibration.METHODS`, such as `natural` or `smi`, or a `calibration.Method` of one's own;
    iterations: of Adam, per batch, or `auto`: each batch runs until its images are good enough (docs/methods.md has the
    rule), or as long as a method of one's own says; batch_size: canvases optimised together (of `pri`, each gives
    several images); seed: with it and the batch size the same images come out on the same hardware; precision: of the
    model's passes, `auto` picks bf16 where the hardware has it.

    initial (`noise`, `pink`, `leaves`), schedule (`dense`, `smi`, `pri`, or a PatchSchedule) and learning_rate replace
    the method's own.

    out: a folder to keep the set in, batch by batch: a run that was stopped goes on there, and a finished one is read.
    trace: also leave there a picture of how the first images came about. overwrite: replace a set of another run that
    lies there.

    Raises DfqError: an unknown method, a model that is not supported, or whose patches cannot be left out where the
    schedule asks for it, a folder that holds something else.
    """
    if trace and out is None:
        raise UsageError("a trace is a picture in the folder of the set: give out")
    if isinstance(schedule, str):
        schedule = chosen_schedule(method, schedule)
    if isinstance(iterations, str) and iterations != "auto":
        raise UsageError(f"iterations must be a number or auto, not {iterations!r}")
    plan = Plan(
        method=method,
        num_images=num_images,
        iterations=None if iterations == "auto" else iterations,
        batch_size=batch_size,
        seed=seed,
        precision=precision,
        initial=initial,
        schedule=schedule,
        learning_rate=learning_rate,
    )
    return run_plan(model, plan, trace=trace, out=out, overwrite=overwrite, progress=progress)


def run_plan(
    model: Model,
    plan: Plan,
    *,
    trace: bool = False,
    out: Path | str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> CalibrationSet:
    """`generate`, with everything about the images in a plan."""
    started = time.monotonic()
    with ExitStack() as held:
        parts = batches(model, plan, held, trace=trace, out=out, overwrite=overwrite, progress=progress, at_once=True)
        made = concatenate(list(parts))
    log.info("%s: %d images in %.1f s", plan.name, len(made), time.monotonic() - started)
    return made


def batches(
    model: Model,
    plan: Plan,
    held: ExitStack,
    *,
    trace: bool = False,
    out: Path | str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    at_once: bool = False,
) -> Iterator[CalibrationSet]:
    """The batches of `run_plan`, each when it is asked for; the set in `out` is whole with the last one.

    held: no other run writes to `out` until it closes. at_once: all are asked for before the first is needed, so that
    processes that share the work need not wait for each other in between. What is wrong with the model, the plan or
    `out` is told before the first batch is made.
    """
    shared = team()
    check_invertible(model.name, model.module)
    mean, std = model.preprocessing.mean, model.preprocessing.std
    run = describe_run(model, plan)
    calibration.check_method(model.module, plan)
    method = plan.composed
    folder = None if out is None else SetFolder(Path(out), run, versions(), overwrite=overwrite, team=shared)
    if folder is not None:
        held.callback(folder.release)
    if folder is not None and folder.complete:
        log.info("%s already holds this set; nothing to do", folder.path)
    if isinstance(method.schedule, ProgressiveStop):
        stops = method.schedule.num_stops
        left = len(method.schedule.decisions(method.settings.iterations))
        if left < stops:
            log.warning("patches stop %d times instead of %d in %d iterations", left, stops, method.settings.iterations)
    if trace and method.schedule is None:
        log.warning("%s inverts nothing, so there is no trace", plan.name)

    def making() -> Iterator[CalibrationSet]:
        iterations = 1 if method.schedule is None else method.settings.iterations
        sparse = not isinstance(method.schedule, Dense)
        # One bar for the whole run: what is left is what a person wants to know.
        own = shared.part_of(len(plan.batches))
        total = len(own) * iterations
        with progress_bar(total, plan.name, "it", shown=progress, bar_format=_BAR) as bar:

            def on_step(batch: int, step: Progress) -> None:
                bar.n = own.index(batch) * iterations + step.iteration
                bar.set_postfix_str(
                    f"batch {batch + 1}/{len(plan.batches)}, {f'{step.kept_patches} patches, ' * sparse}"
                    f"loss {step.loss:.3f}, confidence {step.confidence:.0%}",
                    refresh=False,
                )
                bar.refresh()

            yield from calibration.generate(
                model.module,
                plan,
                mean=mean,
                std=std,
                run=run,
                folder=folder,
                on_step=None if bar.disable else on_step,
                class_names=class_captions(model),
                trace=trace,
                team=shared,
                at_once=at_once,
            )
            bar.update(total - bar.n)

    return making()


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
