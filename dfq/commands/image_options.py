"""Which calibration images: those of a set, or how they are to be made."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dfq.commands.values import count, finite, iterations_or_auto, positive

if TYPE_CHECKING:
    from calibration import CalibrationSet, Plan
    from dfq.models import Model


def add_image_options(
    parser: argparse.ArgumentParser,
    *,
    num_images: int | None = 32,
    trace: bool = True,
    methods: Sequence[str] = (),
) -> None:
    """num_images: the default, None for the number that the recipe says; methods: the default of a command that takes
    several and makes images round by round."""
    round_by_round = bool(methods)
    group = parser.add_argument_group("calibration images that are made")
    if methods:
        group.add_argument(
            "--method",
            nargs="+",
            default=list(methods),
            metavar="NAME",
            help=f"how, each as many; see `dfq list methods` (default: {' '.join(methods)})",
        )
    else:
        group.add_argument(
            "--method", default="natural", metavar="NAME", help="how; see `dfq list methods` (default: %(default)s)"
        )
    group.add_argument(
        "-n",
        "--num-images",
        type=positive,
        default=num_images,
        metavar="N",
        help=f"how many{' by each method in a round' * round_by_round} (default: {num_images or 'as the recipe says'})",
    )
    group.add_argument(
        "--iterations",
        type=iterations_or_auto,
        default="auto",
        metavar="N",
        help="of inversion, per batch; auto: until its images are good enough, at most the method's own number "
        "(default: %(default)s)",
    )
    if not round_by_round:  # Those of a round are.
        group.add_argument(
            "-b",
            "--batch-size",
            type=positive,
            default=32,
            metavar="N",
            help="canvases inverted together (default: %(default)s)",
        )
    group.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of the model's passes (default: %(default)s)",
    )
    group.add_argument(
        "--init",
        choices=("noise", "pink", "leaves"),
        help="where inversion starts: white noise, pink noise or dead leaves (default: the method's own)",
    )
    group.add_argument(
        "--schedule",
        choices=("dense", "smi", "pri"),
        help="which patches are inverted when (default: the method's own)",
    )
    group.add_argument(
        "--stop-at",
        type=count,
        nargs="+",
        metavar="N",
        help="smi: iterations at which patches stop (default: four, from 1/80 to 3/40 of all)",
    )
    group.add_argument("--stop-ratio", type=finite, metavar="X", help="smi: share that stops each time (default: 0.3)")
    group.add_argument("--division", type=positive, metavar="V", help="pri: images of one canvas (default: 4)")
    group.add_argument(
        "--learning-rate", type=finite, metavar="X", help="of Adam on the pixels (default: the method's own)"
    )
    if trace:  # It lies in the folder of the set.
        group.add_argument("--trace", action="store_true", help="also draw how the first images came about: trace.png")


def plan_of(arguments: argparse.Namespace, method: str | None = None) -> Plan:
    """How images are to be generated. Raises UsageError: it is made before anything else is done.

    method: of several, the one that this plan is of.
    """
    from calibration import Plan
    from dfq.errors import DfqError, UsageError
    from dfq.generation import chosen_schedule

    method = method or arguments.method
    iterations = None if arguments.iterations == "auto" else arguments.iterations
    schedule = chosen_schedule(
        method,
        arguments.schedule,
        stops=arguments.stop_at,
        ratio=arguments.stop_ratio,
        division=arguments.division,
    )
    try:
        return Plan(
            method=method,
            num_images=arguments.num_images,
            iterations=iterations,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            precision=arguments.precision,
            initial=arguments.init,
            schedule=schedule,
            learning_rate=arguments.learning_rate,
        )
    except DfqError as error:
        raise UsageError(str(error)) from error


def generated_images(arguments: argparse.Namespace, model: Model, plan: Plan, out: Path) -> CalibrationSet:
    from dfq.generation import run_plan

    return run_plan(
        model,
        plan,
        trace=arguments.trace,
        out=out,
        overwrite=arguments.overwrite,
        progress=not arguments.quiet,
    )


def given_images(arguments: argparse.Namespace, model: Model) -> CalibrationSet | None:
    import dfq

    if arguments.calibration is not None:
        return dfq.load_calibration_set(arguments.calibration)
    if arguments.calibration_images is not None:
        return dfq.real_images(model, arguments.calibration_images, arguments.num_images, seed=arguments.seed)
    return None
