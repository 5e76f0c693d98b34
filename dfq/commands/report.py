"""`dfq report`: a page on what became of a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from dfq.commands.command import Command


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directories",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="a folder that `dfq quantize` made; several are compared",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="FILE.html",
        help="to write (default: report.html in DIR; of several it has to be said)",
    )
    for name, what in (("evaluation", "evaluate"), ("bench", "bench"), ("sensitivity", "sensitivity")):
        parser.add_argument(
            f"--{name}",
            type=Path,
            metavar="FILE",
            help=f"what `dfq {what} --json` wrote (default: {name}.json in DIR, if there)",
        )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="the images it was calibrated on (default: calibration in DIR)",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="the original weights (default: where they were)"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda where there is one)")


def run(arguments: argparse.Namespace) -> None:
    import dfq

    path = dfq.report(
        arguments.directories,
        arguments.out,
        evaluation=arguments.evaluation,
        bench=arguments.bench,
        sensitivity=arguments.sensitivity,
        calibration=arguments.calibration,
        checkpoint=arguments.checkpoint,
        device=arguments.device,
        progress=not arguments.quiet,
    )
    print(f"kept in {path}; open it in a browser")


COMMAND = Command(
    "report",
    "write a page about a quantized model, or about several side by side",
    "dfq report vit-w4a8",
    options,
    run,
)
