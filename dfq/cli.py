"""The `dfq` command: parse, call, print. What it does is in the library; so is every error it reports.

Exit status: 0 done, 1 failed, 2 wrong usage, 3 finished but a gate failed (--max-drop), 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfq import __version__

if TYPE_CHECKING:
    from calibration import CalibrationSet, Plan
    from dfq.models import Model

GATE_FAILED = 3
INTERRUPTED = 130


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        with _reporting(quiet=arguments.quiet, debug=arguments.debug):
            status = int(arguments.command(arguments) or 0)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("dfq: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (head, less) has gone: not a failure, and nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if arguments.debug:
            raise
        return _explain(error)


def _explain(error: Exception) -> int:
    """Say in one line what went wrong; gives the exit status."""
    from dfq.errors import DfqError, UsageError

    if isinstance(error, DfqError):
        said = str(error)
    else:
        first_line = (str(error) or "no message").splitlines()[0]
        said = f"unexpected {type(error).__name__}: {first_line}; --debug shows where"
    print(f"dfq: error: {said}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1


@contextmanager
def _reporting(*, quiet: bool, debug: bool) -> Iterator[None]:
    """While it is open, dfq's log lines go to stderr, and what other libraries say to their developers goes nowhere."""
    own, root = logging.getLogger("dfq"), logging.getLogger()
    level = own.level
    lines, nowhere = logging.StreamHandler(sys.stderr), logging.NullHandler()
    own.setLevel(logging.WARNING if quiet else logging.INFO)
    own.addHandler(lines)
    # Without any handler Python would print the warnings of timm and others.
    root.addHandler(nowhere)
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
            yield
    finally:
        own.removeHandler(lines)
        root.removeHandler(nowhere)
        own.setLevel(level)


def _generate(arguments: argparse.Namespace) -> None:
    import dfq

    _plan(arguments)
    model = _model(arguments)
    made = dfq.generate(
        model,
        arguments.method,
        arguments.num_images,
        iterations=arguments.iterations,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        precision=arguments.precision,
        out=arguments.out,
        overwrite=arguments.overwrite,
        progress=not arguments.quiet,
    )
    print(_describe_set(made))
    print(f"kept in {arguments.out}; its preview.png shows them")


def _quantize(arguments: argparse.Namespace) -> None:
    import dfq
    from dfq.checkpoint import claim_directory
    from dfq.generation import describe_run
    from dfq.ptq.engine import check_calibration, prepare
    from dfq.recipe import parse_bits

    # Everything that can be wrong is found here, before the folder is touched and images are made.
    widths = parse_bits(arguments.bits)
    bits = str(widths)
    recipe = dfq.load_recipe(arguments.recipe)
    plan = _plan(arguments)
    model = _model(arguments)
    prepare(model, widths, recipe)
    images = _given_images(arguments, model)
    if images is None:
        calibration = {"num_images": plan.num_images, "run": describe_run(model, plan)}
    else:
        check_calibration(model, images)
        calibration = {"num_images": len(images), "run": images.run}
    identity = {
        "bits": bits,
        "model": model.origin.to_dict(),
        "preprocessing": model.preprocessing.to_dict(),
        "recipe": recipe.to_dict(),
        "calibration": calibration,
    }
    if claim_directory(arguments.out, identity, overwrite=arguments.overwrite):
        quantized = dfq.load(arguments.out, device=arguments.device)
        print(f"{arguments.out} already holds this model; nothing to do")
    else:
        if images is None:
            images = dfq.generate(
                model,
                arguments.method,
                arguments.num_images,
                iterations=arguments.iterations,
                batch_size=arguments.batch_size,
                seed=arguments.seed,
                precision=arguments.precision,
                out=arguments.out / "calibration",
                overwrite=arguments.overwrite,
                progress=not arguments.quiet,
            )
        quantized = dfq.quantize(model, bits, calibration=images, recipe=recipe, progress=not arguments.quiet)
        dfq.save(quantized, arguments.out)
    print(
        f"{model.name}, {bits.upper()}, recipe {recipe.name}: {len(quantized.sites)} tensors quantized, "
        f"{quantized.weight_bytes / 1e6:.2f} MB ({model.weight_bytes / 1e6:.2f} MB in float32)"
    )
    print(f"kept in {arguments.out}; measure it with: dfq evaluate {arguments.out} --data-dir IMAGES --baseline")


def _evaluate(arguments: argparse.Namespace) -> int:
    import dfq
    from dfq.checkpoint import is_quantized_model
    from dfq.datasets import image_folder, reference_digits, timm_dataset
    from dfq.errors import DfqError, UsageError
    from dfq.models import REFERENCE

    target = arguments.model
    baseline = None
    model: Any
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise UsageError(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    if is_quantized_model(target):
        given = [name for name in _MODEL_CHANGES if getattr(arguments, name) not in (None, False)]
        if given:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(f"{target} is a quantized model and keeps its own preprocessing; leave out {options}")
        model = dfq.load(target, device=arguments.device)
        if arguments.baseline or arguments.max_drop is not None:
            baseline = _baseline_of(model, arguments)
    elif Path(target).is_dir():
        raise DfqError(f"{target} is a folder, but not of a quantized model: it lacks config.json or model.safetensors")
    else:
        if arguments.baseline or arguments.max_drop is not None:
            raise UsageError("--baseline and --max-drop compare a quantized model with its original")
        model = _model(arguments)

    if arguments.dataset is not None:
        data: Any = timm_dataset(arguments.dataset, arguments.data_dir, arguments.split, model)
    elif arguments.data_dir is not None:
        data = image_folder(arguments.data_dir, model)
    elif model.origin.architecture == REFERENCE:
        data = reference_digits(model)
    else:
        raise UsageError("give --data-dir FOLDER (one folder of images per class) or --dataset NAME")

    result = dfq.evaluate(
        model,
        data,
        baseline=baseline,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        device=arguments.device,
        limit=arguments.limit,
        seed=getattr(model, "calibration", {}).get("run", {}).get("seed"),
        progress=not arguments.quiet,
    )
    print(result.table())
    if arguments.json is not None:
        from calibration.files import write_json

        write_json(arguments.json, result.to_dict())
    if arguments.max_drop is not None and result.comparison is not None:
        drop = result.comparison.drop
        if drop > arguments.max_drop:
            print(f"dfq: the drop of {drop:.2f} points exceeds --max-drop {arguments.max_drop:g}", file=sys.stderr)
            return GATE_FAILED
    return 0


def _demo(arguments: argparse.Namespace) -> None:
    from dfq.demo import demo

    print(demo(arguments.out, progress=not arguments.quiet))


def _list(arguments: argparse.Namespace) -> None:
    if arguments.what == "methods":
        from calibration import METHODS

        rows = [(name, method.summary) for name, method in METHODS.items()]
    elif arguments.what == "recipes":
        from dfq.recipe import load_recipe, preset_names

        rows = [(name, load_recipe(name).summary) for name in preset_names()]
    else:
        from dfq.models import supported_names

        rows = [(name, "") for name in supported_names()]
    width = max(len(name) for name, _ in rows)
    for name, summary in rows:
        print(f"{name:<{width}}  {summary}".rstrip())


_MODEL_CHANGES = ("random_weights", "image_size", "mean", "std", "interpolation", "crop_pct")


def _plan(arguments: argparse.Namespace) -> Plan:
    """How images are to be generated. Raises UsageError: it is made before anything else is done."""
    from calibration import Plan
    from dfq.errors import DfqError, UsageError

    try:
        return Plan(
            arguments.method,
            arguments.num_images,
            arguments.iterations,
            arguments.batch_size,
            arguments.seed,
            arguments.precision,
        )
    except DfqError as error:
        raise UsageError(str(error)) from error


def _model(arguments: argparse.Namespace) -> Model:
    import dfq

    return dfq.load_model(
        arguments.model,
        checkpoint=arguments.checkpoint,
        random_weights=arguments.random_weights,
        image_size=arguments.image_size,
        mean=None if arguments.mean is None else tuple(arguments.mean),
        std=None if arguments.std is None else tuple(arguments.std),
        interpolation=arguments.interpolation,
        crop_pct=arguments.crop_pct,
        device=arguments.device,
        seed=arguments.seed,
    )


def _baseline_of(quantized: Any, arguments: argparse.Namespace) -> Model:
    """The full-precision model that `quantized` was made from, with its preprocessing."""
    from dfq.models import load_original

    return load_original(
        quantized.origin, quantized.preprocessing, checkpoint=arguments.checkpoint, device=arguments.device
    )


def _given_images(arguments: argparse.Namespace, model: Model) -> CalibrationSet | None:
    import dfq
    from calibration.tokens import PatchGrid

    if arguments.calibration is not None:
        return dfq.load_calibration_set(arguments.calibration)
    if arguments.calibration_images is not None:
        preprocessing = model.preprocessing
        return dfq.real_images(
            arguments.calibration_images,
            PatchGrid.of(model.module),
            preprocessing.transform(),
            mean=preprocessing.mean,
            std=preprocessing.std,
            num_images=arguments.num_images,
            seed=arguments.seed,
        )
    return None


def _describe_set(made: CalibrationSet) -> str:
    parts = [f"{len(made)} images"]
    if made.confidence is not None:
        parts.append(f"mean confidence {made.confidence.mean().item():.0%}")
    if made.is_sparse:
        kept = made.mask.flatten(1).sum(1).float().mean().item()
        parts.append(f"{kept:.0f} of {made.grid.num_patches} patches each")
    return ", ".join(parts)


def _parser() -> argparse.ArgumentParser:
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
        _generate,
        "make a calibration set by inverting a model",
        "dfq generate vit_tiny_patch16_224 --checkpoint vit.safetensors -n 32 --out images",
    )
    _model_options(generate)
    _generation_options(generate)
    _output_options(generate, "folder for the calibration set")

    quantize = _command(
        commands,
        "quantize",
        _quantize,
        "quantize a model, on generated images or on a set",
        "dfq quantize vit_tiny_patch16_224 --checkpoint vit.safetensors --bits w4a8 --out vit-w4a8",
    )
    _model_options(quantize)
    quantize.add_argument(
        "--bits", default="w8a8", metavar="wXaY", help="bits of weights and activations (%(default)s)"
    )
    quantize.add_argument(
        "--recipe", default="default", metavar="NAME|FILE.toml", help="how; see `dfq list recipes` (%(default)s)"
    )
    source = quantize.add_mutually_exclusive_group()
    source.add_argument("--calibration", type=Path, metavar="DIR", help="a set that `dfq generate` made")
    source.add_argument("--calibration-images", type=Path, metavar="DIR", help="a folder of real images")
    _generation_options(quantize)
    _output_options(quantize, "folder for the quantized model")

    evaluate = _command(
        commands,
        "evaluate",
        _evaluate,
        "measure the accuracy of a quantized model, or of a full-precision one",
        "dfq evaluate vit-w4a8 --data-dir imagenet/val --baseline --max-drop 1",
    )
    _model_options(evaluate, "a folder that `dfq quantize` made, or a model")
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

    listing = _command(commands, "list", _list, "say what there is", "dfq list methods")
    listing.add_argument("what", choices=("models", "methods", "recipes"))

    demo = _command(commands, "demo", _demo, "all of it on the small model that comes with dfq", "dfq demo")
    demo.add_argument("-o", "--out", type=Path, default=Path("dfq-demo"), metavar="DIR", help="folder (%(default)s)")
    return parser


def _command(commands: Any, name: str, function: Any, summary: str, example: str) -> argparse.ArgumentParser:
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


def _model_options(command: argparse.ArgumentParser, what: str = "a model") -> None:
    command.add_argument(
        "model", metavar="MODEL", help=f"{what}: a timm name, hf-hub:USER/REPO, local-dir:FOLDER, or reference"
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


def _generation_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", default="smi", metavar="NAME", help="see `dfq list methods` (%(default)s)")
    command.add_argument("-n", "--num-images", type=_positive, default=32, metavar="N", help="(%(default)s)")
    command.add_argument(
        "--iterations", type=_positive, default=500, metavar="N", help="of inversion; published: 4000 (%(default)s)"
    )
    command.add_argument(
        "-b", "--batch-size", type=_positive, default=32, metavar="N", help="images inverted together (%(default)s)"
    )
    command.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the model's passes (%(default)s)"
    )


def _output_options(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument(
        "-o", "--out", type=Path, required=True, metavar="DIR", help=f"{what}; one that was begun is continued"
    )
    command.add_argument("--overwrite", action="store_true", help="replace what another run left there")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2^63 - 1, not {value}")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
    return value
