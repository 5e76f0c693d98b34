"""A set, batch by batch: out of its folder where a run before has left it, or made; alone or in a team."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibration import inversion
from calibration.calibration_set import CalibrationSet, SetFolder, concatenate, to_pixels
from calibration.errors import DfqError
from calibration.initial import initial_images
from calibration.inversion import DivergedError, Inverted, Progress
from calibration.memory import images_that_fit
from calibration.methods import Method, Plan, check_method
from calibration.objectives import soft_targets
from calibration.passes import resolve_precision
from calibration.preview import MOST, write_preview
from calibration.team import ALONE, Team
from calibration.tokens import PatchGrid
from calibration.trace import Trace, write_trace

log = logging.getLogger("dfq")

RESTART_SLOWDOWN = 4
"""A batch that left the finite numbers starts again, once, with its steps so many times smaller."""


def generate(
    vit: nn.Module,
    plan: Plan,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    run: dict[str, Any],
    folder: SetFolder | None = None,
    on_step: Callable[[int, Progress], None] | None = None,
    class_names: Sequence[str] | None = None,
    trace: bool = False,
    team: Team = ALONE,
    at_once: bool = False,
) -> Iterator[CalibrationSet]:
    """The batches of `plan`, one by one; those `folder` already holds are read, the others are made and kept there.

    With the last one the set in the folder is finished. run: what the images depend on, `plan.describe` and the model,
    for the record. class_names: for the captions of `preview.png`; trace: leave `trace.png` of the first batch in the
    folder too.

    team: who shares the work, a batch to each; the same come out in every process, whatever their number. A folder is
    one that all of them see. They wait for each other when each has made one, or, `at_once`, when all are made.
    """
    check_method(vit, plan)
    maker = _Maker(vit, plan, mean, std, run, folder, on_step, class_names, trace)
    count = len(plan.batches)
    together = 1 if team.size == 1 else count if at_once else team.size
    first: list[CalibrationSet] = []
    for start in range(0, count, together):
        group = range(start, min(start + together, count))
        made: dict[int, CalibrationSet] = {}
        for batch in group:
            if batch in team.part_of(count):
                part = maker.batch(batch)
                if folder is None or team.size == 1:
                    made[batch] = part
        if folder is None:
            made = {batch: part for some in team.gather(made) for batch, part in some.items()}
        else:
            team.wait()
        for batch in group:
            part = made.pop(batch) if batch in made else _made_by_others(folder, batch)
            if sum(map(len, first)) < MOST:
                first.append(part)
            if folder is not None and batch == count - 1 and not all(team.gather(folder.complete)):
                if team.leads:
                    write_preview(concatenate(first), folder.path / "preview.png", class_names)
                    folder.finish(plan.batches)
                team.wait()
            yield part


def _made_by_others(folder: SetFolder | None, batch: int) -> CalibrationSet:
    assert folder is not None
    part = folder.read(batch)
    if part is None:
        raise DfqError(f"batch {batch} is not in {folder.path}: it must be a folder that all machines see")
    return part


@dataclass(frozen=True)
class _Maker:
    """Makes batches of one run; what they are is in `generate`."""

    vit: nn.Module
    plan: Plan
    mean: tuple[float, ...]
    std: tuple[float, ...]
    run: dict[str, Any]
    folder: SetFolder | None
    on_step: Callable[[int, Progress], None] | None
    class_names: Sequence[str] | None
    trace: bool

    def batch(self, batch: int) -> CalibrationSet:
        """Out of the folder, or a new one, put there."""
        folder, plan = self.folder, self.plan
        on_step, trace = self.on_step, None
        if folder is not None:
            part = folder.read(batch)
            traced = self.trace and batch == 0
            if part is not None:
                if traced and not (folder.path / "trace.png").exists():
                    log.warning("no trace: the first batch is there already; delete the set and make it again for one")
                return part
            trace = Trace(PatchGrid.of(self.vit), self.mean, self.std) if traced else None
        report = None if on_step is None else (lambda progress: on_step(batch, progress))
        part = make_batch(
            self.vit, plan, batch, mean=self.mean, std=self.std, run=self.run, on_step=report, trace=trace
        )
        if folder is not None:
            folder.write(batch, part)
            if trace is not None and plan.composed.schedule is not None and part.labels is not None:
                labels = part.labels[:: plan.composed.schedule.images_per_canvas]
                write_trace(trace, folder.path / "trace.png", labels=labels, class_names=self.class_names)
        return part


def batch_generator(seed: int, batch: int) -> torch.Generator:
    """The randomness of one batch hangs on (seed, batch) alone, whoever makes it and whenever."""
    state = np.random.SeedSequence([seed, batch]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def make_batch(
    vit: nn.Module,
    plan: Plan,
    batch: int,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    run: dict[str, Any],
    on_step: Callable[[Progress], None] | None = None,
    trace: Trace | None = None,
) -> CalibrationSet:
    """Batch number `batch` of `plan`, on the model's device."""
    method, grid, count = plan.composed, PatchGrid.of(vit), plan.batches[batch]
    if method.schedule is None:
        initial = initial_images(method.initial, count, grid.image_size, batch_generator(plan.seed, batch), mean, std)
        everything = torch.ones(count, grid.rows, grid.columns, dtype=torch.bool)
        return CalibrationSet(to_pixels(initial, mean, std), everything, None, None, mean, std, run)

    try:
        result, labels = _inverted(vit, plan, method, batch, mean, std, on_step, trace)
    except DivergedError as error:
        slower = replace(method.settings, learning_rate=method.settings.learning_rate / RESTART_SLOWDOWN)
        log.warning("batch %d: %s; once more with learning rate %g", batch, error, slower.learning_rate)
        if trace is not None:
            trace.clear()
        try:
            result, labels = _inverted(vit, plan, replace(method, settings=slower), batch, mean, std, on_step, trace)
        except DivergedError as again:
            raise DfqError(
                f"batch {batch} of seed {plan.seed}: {again}, also with learning rate {slower.learning_rate:g}; "
                "try --precision fp32, and check the model's weights"
            ) from again
    return CalibrationSet(
        images=to_pixels(result.images, mean, std)[:count].cpu(),
        mask=torch.cat([grid.mask_of(keep[None]) for keep in result.keep])[:count].cpu(),
        labels=labels.repeat_interleave(method.schedule.images_per_canvas)[:count],
        confidence=result.confidence.float()[:count].cpu(),
        mean=mean,
        std=std,
        run=run,
        iterations=result.finished[:count],
    )


def _inverted(
    vit: nn.Module,
    plan: Plan,
    method: Method,
    batch: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    on_step: Callable[[Progress], None] | None,
    trace: Trace | None,
) -> tuple[Inverted, Tensor]:
    """(what became of the canvases of a batch, their labels [B])."""
    assert method.schedule is not None
    generator, device = batch_generator(plan.seed, batch), next(vit.parameters()).device
    num_classes = int(vit.num_classes)  # type: ignore[arg-type]
    canvases = plan.canvases[batch]
    initial = initial_images(method.initial, canvases, PatchGrid.of(vit).image_size, generator, mean, std)
    labels = torch.randint(num_classes, (canvases,), generator=generator)
    targets = soft_targets(labels, num_classes, generator) if method.soft_labels else labels
    fitting = images_that_fit(vit, resolve_precision(plan.precision, device))
    result = inversion.invert(
        vit,
        initial.to(device),
        targets.to(device),
        mean=mean,
        std=std,
        objective=method.objective,
        schedule=method.schedule,
        settings=method.settings,
        generator=generator,
        precision=plan.precision,
        part=canvases if fitting is None else min(fitting, canvases),
        on_step=on_step,
        trace=trace,
    )
    return result, labels
