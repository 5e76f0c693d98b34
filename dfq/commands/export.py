"""`dfq export`: a quantized model for other runtimes."""

from __future__ import annotations

import argparse
from pathlib import Path

from dfq.commands.command import Command
from dfq.commands.output_options import check_files
from dfq.commands.values import positive


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="DIR", help="a folder that `dfq quantize` made")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="to write; ends in .onnx, or for --format torch in .safetensors",
    )
    parser.add_argument(
        "--format",
        choices=("onnx", "torch"),
        default="onnx",
        help="onnx, or torch: rounded weights in float32, under timm's names, as safetensors (default: %(default)s)",
    )
    parser.add_argument(
        "--opset", type=positive, default=21, metavar="N", help="of ONNX, 21 to 23 (default: %(default)s)"
    )
    parser.add_argument(
        "--int8-weights", action="store_true", help="a byte for each weight of 4 bits or fewer, instead of half a byte"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")


def run(arguments: argparse.Namespace) -> None:
    import dfq
    from dfq.checkpoint import save_plain
    from dfq.errors import UsageError

    check_files(arguments, {"out": ".onnx" if arguments.format == "onnx" else ".safetensors"})
    if arguments.out.exists() and not arguments.overwrite:
        raise UsageError(f"{arguments.out} is there already; choose another --out or give --overwrite")
    quantized = dfq.load(arguments.model, device="cpu")
    if arguments.format == "torch":
        save_plain(quantized, arguments.out)
        print(f"kept in {arguments.out}; for timm.create_model({quantized.origin.architecture!r})")
        return
    exported = dfq.export(quantized, arguments.out, opset=arguments.opset, int4=not arguments.int8_weights)
    print(exported.describe())
    print(f"measure it with: dfq evaluate {arguments.out} --data-dir IMAGES --baseline; dfq bench {arguments.out}")


COMMAND = Command(
    "export",
    "write a quantized model as ONNX, with integers in it, for other runtimes",
    "dfq export vit-w8a8 --out vit.onnx",
    options,
    run,
)
