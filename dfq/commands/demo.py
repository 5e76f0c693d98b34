"""`dfq demo`: every step on the embedded model."""

from __future__ import annotations

import argparse
from pathlib import Path

from dfq.commands.command import Command


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("dfq-demo"), metavar="DIR", help="folder (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> None:
    from dfq.demo import demo

    print(demo(arguments.out, progress=not arguments.quiet))


COMMAND = Command(
    "demo",
    "all of it on the small model that comes with dfq",
    "dfq demo",
    options,
    run,
)
