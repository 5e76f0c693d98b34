"""Where the images of a transfer come from: networks that are inverted, round by round, or pools made before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from calibration import CalibrationSet, Plan, check_method, load_calibration_set
from calibration.tokens import PatchGrid
from dfq.errors import DfqError, UsageError
from dfq.models import Model
from dfq.support import check_invertible

Images = CalibrationSet | Path | str

FURTHER = "student-"
"""What the folder of a method's pool begins with where another network than the teacher made it."""


@dataclass(frozen=True)
class Source:
    """Images of all rounds: of which network, how, and the folder of their pool."""

    model: Model
    plan: Plan
    pool: str


def plans_of(method: str | Sequence[str], num_images: int, seed: int, plan: Plan | Sequence[Plan] | None) -> list[Plan]:
    """Of the images of one round, by each method."""
    if isinstance(plan, Plan):
        return [plan]
    methods = [method] if isinstance(method, str) else list(method)
    found = [Plan(name, num_images, None, num_images, seed, "auto") for name in methods] if plan is None else list(plan)
    names = [each.name for each in found]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"give one method or more, each once, not {', '.join(names) or 'none'}")
    return found


def sources_of(teacher: Model, further: Model | None, plans: Sequence[Plan], rounds: int) -> list[Source]:
    """Of the plans of one round, and of as many images in the same ways of `further`, shown to the teacher as well.

    Raises DfqError for a method that is not for its network, and images of `further` that are not for the teacher.
    """
    plans = [_of_all_rounds(plan, rounds) for plan in plans]
    sources = [Source(teacher, plan, plan.name) for plan in plans]
    if further is not None:
        # Of a seed of their own: the same starts twice would be less to learn from.
        sources += [Source(further, replace(plan, seed=plan.seed + 1), FURTHER + plan.name) for plan in plans]
        _check_further(further, teacher, plans)
    for source in sources:
        check_method(source.model.module, source.plan)
    return sources


def pools_of(teacher: Model, pools: Images | Sequence[Images]) -> list[CalibrationSet]:
    """Pools that were made before. Raises DfqError, and UsageError where there is none."""
    several = [pools] if isinstance(pools, CalibrationSet | Path | str) else pools
    found = [each if isinstance(each, CalibrationSet) else load_calibration_set(each) for each in several]
    _check_sizes(teacher, found)
    return found


def _of_all_rounds(plan: Plan, rounds: int) -> Plan:
    """What one round makes, made in each, a batch per round; canvases that give several images are filled."""
    (canvases,) = replace(plan, batch_size=plan.num_images).canvases
    return replace(plan, num_images=rounds * canvases * plan.images_per_canvas, batch_size=canvases)


def _check_further(further: Model, teacher: Model, plans: Sequence[Plan]) -> None:
    """Raise DfqError where the teacher cannot be shown what is made of another network."""
    size, wanted = further.preprocessing.image_size, teacher.preprocessing.image_size
    if size != wanted:
        raise DfqError(
            f"{further.name} makes images of {size[0]}x{size[1]}, and {teacher.name} takes {wanted[0]}x{wanted[1]}"
        )
    check_invertible(further.name, further.module)
    if PatchGrid.of(further.module) == PatchGrid.of(teacher.module):
        return
    for plan in plans:
        if plan.composed.is_sparse:
            raise DfqError(
                f"{further.name} and {teacher.name} have patches of different sizes: {plan.name} makes sparse images, "
                "which are for one of them; choose a dense method"
            )


def _check_sizes(teacher: Model, pools: Sequence[CalibrationSet]) -> None:
    if not pools:
        raise UsageError("no pool is given: name one or more, or leave calibration out, and images are made")
    wanted = teacher.preprocessing.image_size
    for pool in pools:
        size = tuple(pool.images.shape[-2:])
        if size != wanted:
            raise DfqError(
                f"the pool holds images of {size[0]}x{size[1]}, and {teacher.name} takes {wanted[0]}x{wanted[1]}: "
                "generate one for this teacher"
            )
    if len({pool.mask.shape[1:] for pool in pools if pool.is_sparse}) > 1:
        raise DfqError("the sparse pools have patches of different sizes: generate them for one teacher")


def round_by_round(sources: Sequence[Iterator[CalibrationSet]]) -> Iterator[list[CalibrationSet]]:
    """What all make for one round after the other, until none has any left."""
    while parts := [part for source in sources if (part := next(source, None)) is not None]:
        yield on_one_grid(parts)


def on_one_grid(parts: list[CalibrationSet]) -> list[CalibrationSet]:
    """The same with all masks in the patches of the sparse ones, or of the first: of a whole image any are."""
    wanted = next((part for part in parts if part.is_sparse), parts[0]).mask.shape[1:]
    whole = torch.ones(1, *wanted, dtype=torch.bool)
    return [
        part if part.mask.shape[1:] == wanted else replace(part, mask=whole.expand(len(part), -1, -1)) for part in parts
    ]
