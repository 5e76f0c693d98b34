"""The options of the `dfq` command, named as in timm's `validate.py` where it has one."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dfq import __version__

Command = Callable[[argparse.Namespace], int | None]

# Those of dfq.runtime, which is slow to import.
_RUNTIMES = ("onnxruntime", "openvino")


def build_parser(functions: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of `dfq`; `functions` do the commands, by name."""
    parser = argparse.ArgumentParser(
        prog="dfq",
        description="Data-free quantization of Vision Transformers: from a pretrained timm ViT and not one real image "
        "to a low-bit model, measured beside full precision.",
        epilog="Try `dfq demo` first. `dfq COMMAND --help` tells more, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"dfq {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = _command(
        commands,
        "generate",
        functions["generate"],
        "make a calibration set by inverting a model",
        "dfq generate vit_tiny_patch16_224 --checkpoint vit.safetensors -n 32 --out images",
    )
    _model_options(generate)
    _generation_options(generate)
    _output_options(generate, "folder for the calibration set; one that was begun is continued")

    quantize = _command(
        commands,
        "quantize",
        functions["quantize"],
        "quantize a model, on generated images or on a set",
        "dfq quantize vit_tiny_patch16_224 --checkpoint vit.safetensors --bits w4a8 --out vit-w4a8",
    )
    _model_options(quantize)
    _bits_and_recipe(quantize, "w8a8")
    source = quantize.add_mutually_exclusive_group()
    source.add_argument("--calibration", type=Path, metavar="DIR", help="a set that `dfq generate` made")
    source.add_argument(
        "--calibration-images", type=Path, metavar="DIR", help="a folder of real images, of which -n are drawn"
    )
    _generation_options(quantize, num_images=None)
    _output_options(
        quantize,
        "folder for the quantized model; one that was begun is continued, a recipe that tunes blocks after the last "
        "finished one",
    )

    sensitivity = _command(
        commands,
        "sensitivity",
        functions["sensitivity"],
        "measure what quantizing each tensor costs, and choose the bits of each layer",
        "dfq sensitivity vit_tiny_patch16_224 --checkpoint vit.safetensors --target-size 70% --out mixed.toml",
    )
    _model_options(sensitivity)
    _bits_and_recipe(sensitivity, "w4a4")
    sensitivity.add_argument(
        "--calibration", type=Path, metavar="DIR", help="a set that `dfq generate` made; its first -n images are used"
    )
    target = sensitivity.add_mutually_exclusive_group()
    target.add_argument(
        "--target-size",
        type=_size,
        metavar="BYTES|RATIO",
        help="choose 4, 6 or 8 bits for each layer, so that the model takes so much (3.5MB), or so much of its size at "
        "8 bits (70%%), and loses as little as it can",
    )
    target.add_argument(
        "--target-drop",
        type=_above_zero,
        metavar="POINTS",
        help="choose them so that the model is as small as it can be and no larger drop is predicted: a rule of thumb",
    )
    sensitivity.add_argument("-o", "--out", type=Path, metavar="FILE.toml", help="write the recipe with these bits")
    sensitivity.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    sensitivity.add_argument("--chart", type=Path, metavar="FILE.svg", help="draw what each tensor costs")
    _generation_options(sensitivity, num_images=16, trace=False)
    sensitivity.set_defaults(calibration_images=None)

    evaluate = _command(
        commands,
        "evaluate",
        functions["evaluate"],
        "measure the accuracy of a quantized model, an exported or a full-precision one",
        "dfq evaluate vit-w4a8 --data-dir imagenet/val --baseline --max-drop 1",
    )
    _model_options(evaluate, "a folder that `dfq quantize` made, an ONNX file that `dfq export` made, or a model")
    evaluate.add_argument(
        "--runtime", choices=_RUNTIMES, help=f"what an ONNX file runs in, on the CPU ({_RUNTIMES[0]})"
    )
    evaluate.add_argument("--data-dir", type=Path, metavar="DIR", help="one folder of images per class")
    evaluate.add_argument("--dataset", metavar="NAME", help="a dataset as timm names it, such as torch/cifar10")
    evaluate.add_argument("--split", default="validation", help="of --dataset (%(default)s)")
    evaluate.add_argument("--baseline", action="store_true", help="measure full precision on the same images too")
    evaluate.add_argument("--max-drop", type=_finite, metavar="POINTS", help="exit with 3 if the drop is larger")
    evaluate.add_argument(
        "-b", "--batch-size", type=_positive, default=64, metavar="N", help="images at once (%(default)s)"
    )
    evaluate.add_argument("-j", "--workers", type=int, default=0, metavar="N", help="loading processes (%(default)s)")
    evaluate.add_argument("--limit", type=_positive, metavar="N", help="at most so many images, evenly spaced")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")

    export = _command(
        commands,
        "export",
        functions["export"],
        "write a quantized model as ONNX, with integers in it, for other runtimes",
        "dfq export vit-w8a8 --out vit.onnx",
    )
    export.add_argument("model", type=Path, metavar="DIR", help="a folder that `dfq quantize` made")
    export.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="to write: .onnx or .safetensors")
    export.add_argument(
        "--format",
        choices=("onnx", "torch"),
        default="onnx",
        help="onnx, or torch: rounded weights in float32, under timm's names, as safetensors (%(default)s)",
    )
    export.add_argument("--opset", type=int, default=21, metavar="N", help="of ONNX, 21 to 23 (%(default)s)")
    export.add_argument(
        "--int8-weights", action="store_true", help="a byte for each weight of 4 bits or fewer, instead of half a byte"
    )
    export.add_argument("--overwrite", action="store_true", help="replace the file if it is there")

    bench = _command(
        commands,
        "bench",
        functions["bench"],
        "measure the speed of a quantized model beside full precision, in every runtime that is installed",
        "dfq bench vit-w8a8.onnx --threads 4",
    )
    bench.add_argument(
        "target",
        type=Path,
        metavar="DIR_OR_ONNX",
        help="a folder that `dfq quantize` made, or an ONNX file that `dfq export` made; inputs, and the weights "
        "of full precision, are random",
    )
    bench.add_argument(
        "-b",
        "--batch-size",
        type=_positive,
        nargs="+",
        default=[1, 16],
        metavar="N",
        help="images at once; 1, for the latency, is always measured (1 16)",
    )
    bench.add_argument(
        "--threads", type=_positive, metavar="N", help="of PyTorch and of every runtime (as PyTorch has)"
    )
    bench.add_argument("--runtimes", nargs="+", choices=_RUNTIMES, help="only these (all that are installed)")
    bench.add_argument("--repeats", type=_positive, default=5, metavar="N", help="turns of each (%(default)s)")
    bench.add_argument(
        "--seconds", type=_above_zero, default=0.5, metavar="X", help="that a turn lasts at least (%(default)s)"
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")

    distill = _command(
        commands,
        "distill",
        functions["distill"],
        "teach a student what a teacher knows, without data",
        "dfq distill vit_tiny_patch16_224 deit_tiny_patch16_224 --checkpoint teacher.safetensors "
        "--student-checkpoint deit_tiny.safetensors --data-dir photographs --out student",
    )
    _model_options(distill, "the teacher", name="teacher")
    distill.add_argument(
        "student", metavar="STUDENT", help="a timm name of any classifier, or a folder that `dfq quantize` made"
    )
    weights = distill.add_mutually_exclusive_group()
    weights.add_argument("--student-checkpoint", type=Path, metavar="FILE", help="weights of the student")
    weights.add_argument("--student-random-weights", action="store_true", help="a student from scratch")
    distill.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="labelled images, one folder per class, to measure both on"
    )
    distill.add_argument(
        "--calibration", type=Path, metavar="DIR", help="train on a set that `dfq generate` made, and make no other"
    )
    training = distill.add_argument_group("training")
    training.add_argument(
        "--train",
        default="linear",
        metavar="PART",
        help="linear: a new classifier alone; last-K: also K layers below it; full (%(default)s)",
    )
    training.add_argument("--rounds", type=_positive, default=10, metavar="N", help="of images and steps (%(default)s)")
    training.add_argument("--steps", type=_positive, default=100, metavar="N", help="per round (%(default)s)")
    training.add_argument(
        "--train-batch-size", type=_positive, default=128, metavar="N", help="images per step (%(default)s)"
    )
    training.add_argument(
        "--windows",
        type=_count,
        default=9,
        metavar="N",
        help="random windows of each whole image that are shown besides it (%(default)s)",
    )
    training.add_argument(
        "--temperature", type=_above_zero, default=20.0, metavar="X", help="of both distributions (%(default)s)"
    )
    training.add_argument("--opt", choices=("sgd", "adamw"), help="optimizer (sgd; of a quantized student adamw)")
    training.add_argument("--lr", type=_above_zero, metavar="X", help="learning rate (one that suits the rest)")
    training.add_argument("--momentum", type=_finite, default=0.9, metavar="X", help="of sgd (%(default)s)")
    training.add_argument("--weight-decay", type=_finite, default=1e-4, metavar="X", help="(%(default)s)")
    training.add_argument("--sched", choices=("cosine", "constant"), default="cosine", help="of the rate (%(default)s)")
    _generation_options(distill, num_images=64, trace=False, method="smi", round_by_round=True)
    _output_options(distill, "folder for the student, the pool, log and curve; one that was begun is continued")

    listing = _command(commands, "list", functions["list"], "say what there is", "dfq list methods")
    listing.add_argument("what", choices=("models", "methods", "recipes"))
    listing.add_argument(
        "filter",
        nargs="?",
        default="",
        metavar="FILTER",
        help="models: names like this one, such as 'vit_tiny*', and what can be done with each",
    )

    demo = _command(commands, "demo", functions["demo"], "all of it on the small model that comes with dfq", "dfq demo")
    demo.add_argument("-o", "--out", type=Path, default=Path("dfq-demo"), metavar="DIR", help="folder (%(default)s)")
    return parser


def _command(commands: Any, name: str, function: Command, summary: str, example: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example: {example}",
        allow_abbrev=False,
    )
    command.set_defaults(command=function)
    command.add_argument("--quiet", action="store_true", help="results and errors only")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def _bits_and_recipe(parser: argparse.ArgumentParser, bits: str) -> None:
    parser.add_argument("--bits", default=bits, metavar="wXaY", help="bits of weights and activations (%(default)s)")
    parser.add_argument(
        "--recipe", default="fast", metavar="NAME|FILE.toml", help="how; see `dfq list recipes` (%(default)s)"
    )


def _model_options(command: argparse.ArgumentParser, what: str = "a model", *, name: str = "model") -> None:
    command.add_argument(
        name, metavar=name.upper(), help=f"{what}: a timm name, hf-hub:USER/REPO, local-dir:FOLDER, or reference"
    )
    weights = command.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights: safetensors or a PyTorch state dict")
    weights.add_argument("--random-weights", action="store_true", help="untrained, for trials and timing")
    command.add_argument("--image-size", type=_positive, metavar="N", help="other than the model's own")
    command.add_argument("--mean", type=float, nargs=3, metavar="X", help="of the normalisation, red green blue")
    command.add_argument("--std", type=float, nargs=3, metavar="X", help="of the normalisation")
    command.add_argument("--interpolation", help="of the resize")
    command.add_argument("--crop-pct", type=float, metavar="X", help="share of the resized image in the crop")
    command.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (CUDA where there is one)")
    command.add_argument("--seed", type=_seed, default=0, metavar="N", help="of all randomness (%(default)s)")


def _generation_options(
    command: argparse.ArgumentParser,
    *,
    num_images: int | None = 32,
    trace: bool = True,
    method: str = "natural",
    round_by_round: bool = False,
) -> None:
    """num_images, method: the defaults, None for the number that the recipe says."""
    group = command.add_argument_group("images, where they are made")
    group.add_argument("--method", default=method, metavar="NAME", help="see `dfq list methods` (%(default)s)")
    group.add_argument(
        "-n",
        "--num-images",
        type=_positive,
        default=num_images,
        metavar="N",
        help=f"how many{' per round' * round_by_round} ({num_images or 'as the recipe says'})",
    )
    group.add_argument(
        "--iterations",
        type=_iterations,
        default="auto",
        metavar="N",
        help="of inversion, per batch; auto: until its images are good enough, at most the method's own (%(default)s)",
    )
    if not round_by_round:  # Those of a round are.
        group.add_argument(
            "-b",
            "--batch-size",
            type=_positive,
            default=32,
            metavar="N",
            help="canvases inverted together (%(default)s)",
        )
    group.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the model's passes (%(default)s)"
    )
    group.add_argument(
        "--init", choices=("noise", "pink", "leaves"), help="where inversion starts (the method's own start)"
    )
    group.add_argument(
        "--schedule", choices=("dense", "smi", "pri"), help="which patches are inverted when (the method's own)"
    )
    group.add_argument(
        "--stop-at",
        type=_count,
        nargs="+",
        metavar="N",
        help="smi: iterations at which patches stop (1/80 to 3/40 of all)",
    )
    group.add_argument("--stop-ratio", type=_finite, metavar="X", help="smi: share that stops each time (0.3)")
    group.add_argument("--division", type=_positive, metavar="V", help="pri: images of one canvas (4)")
    group.add_argument("--learning-rate", type=_finite, metavar="X", help="of Adam on the pixels (the method's own)")
    if trace:  # It lies in the folder of the set.
        group.add_argument("--trace", action="store_true", help="also draw how the first images came about: trace.png")


def _output_options(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help=what)
    command.add_argument("--overwrite", action="store_true", help="replace what another run left there")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {value}")
    return value


def _iterations(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number or auto, not {text!r}")
    return _positive(text)


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2^63 - 1, not {value}")
    return value


def _above_zero(text: str) -> float:
    value = _finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def _size(text: str) -> float:
    """Bytes, or up to 1 a share."""
    match = re.fullmatch(r"([0-9.]+) *(%|[kKMG]?i?B)?", text)
    try:
        value = float(match[1]) * _UNITS[match[2] or ""] if match else 0.0
    except (ValueError, KeyError):
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a size such as 3.5MB, or a share such as 0.7 or 70%, not {text!r}")
    return value


_UNITS = {"": 1.0, "%": 0.01, "B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9}
_UNITS |= {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
    return value
