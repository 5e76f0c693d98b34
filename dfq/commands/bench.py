"""`dfq bench`: speed beside full precision."""

from __future__ import annotations

import argparse
from pathlib import Path

from dfq.commands.command import Command
from dfq.commands.output_options import check_files
from dfq.commands.values import RUNTIMES, above_zero, positive


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        type=Path,
        metavar="DIR_OR_ONNX",
        help="a folder that `dfq quantize` made, or an ONNX file that `dfq export` made; inputs, and the weights "
        "of full precision, are random",
    )
    parser.add_argument(
        "-b",
        "--batch-size",
        type=positive,
        nargs="+",
        default=[1, 16],
        metavar="N",
        help="images at once; 1, for the latency, is always measured (default: 1 16)",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="of PyTorch and of every runtime (default: as many as PyTorch takes)",
    )
    parser.add_argument(
        "--runtimes",
        nargs="+",
        choices=RUNTIMES,
        metavar="NAME",
        help=f"only these of {', '.join(RUNTIMES)} (default: all that are installed)",
    )
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="turns of each (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=above_zero, default=0.5, metavar="X", help="that a turn lasts at least (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")


def run(arguments: argparse.Namespace) -> None:
    import dfq
    from calibration.files import write_json

    check_files(arguments, {"json": ""})
    result = dfq.bench(
        arguments.target,
        batch_sizes=arguments.batch_size,
        threads=arguments.threads,
        repeats=arguments.repeats,
        seconds=arguments.seconds,
        runtimes=arguments.runtimes,
        progress=not arguments.quiet,
    )
    print(result.table())
    if arguments.json is not None:
        write_json(arguments.json, result.to_dict())


COMMAND = Command(
    "bench",
    "measure the speed of a quantized model beside full precision, in every runtime that is installed",
    "dfq bench vit-w8a8.onnx --threads 4",
    options,
    run,
)
