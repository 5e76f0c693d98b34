"""`dfq evaluate`: accuracy, of a quantized model beside full precision."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfq.commands.command import GATE_FAILED, Command
from dfq.commands.model_options import MODEL_CHANGES, add_model_options, model_of
from dfq.commands.output_options import check_files
from dfq.commands.values import RUNTIMES, count, finite, positive

if TYPE_CHECKING:
    from dfq.models import Model


def options(parser: argparse.ArgumentParser) -> None:
    add_model_options(
        parser,
        "a folder that `dfq quantize` made, an ONNX file that `dfq export` made, or a model",
        weights_default="timm's pretrained ones; beside a quantized model, the file that it was made from",
    )
    group = parser.add_argument_group("images")
    group.add_argument("--data-dir", type=Path, metavar="DIR", help="one folder of images per class")
    group.add_argument(
        "--unlabelled",
        action="store_true",
        help="--data-dir is any folder of images, or a calibration set: the answers are compared with those of full "
        "precision, and no accuracy is measured",
    )
    group.add_argument("--dataset", metavar="NAME", help="a dataset as timm names it, such as torch/cifar10")
    group.add_argument("--split", default="validation", metavar="NAME", help="of --dataset (default: %(default)s)")
    group.add_argument(
        "--limit", type=positive, metavar="N", help="at most so many images, evenly spaced (default: all)"
    )
    group.add_argument(
        "-b", "--batch-size", type=positive, default=64, metavar="N", help="images at once (default: %(default)s)"
    )
    group.add_argument(
        "-j", "--workers", type=count, default=0, metavar="N", help="loading processes (default: %(default)s)"
    )
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--baseline", action="store_true", help="full precision too, on the same images; the next one implies it"
    )
    group.add_argument("--max-drop", type=finite, metavar="POINTS", help="exit with 3 if the drop is larger")
    group.add_argument(
        "--runtime",
        choices=RUNTIMES,
        help=f"what an ONNX file runs in, on the CPU (default: {RUNTIMES[0]})",
    )
    group.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        help="of what an ONNX file does not compute in integers; bf16 in openvino alone (default: fp32)",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")


def run(arguments: argparse.Namespace) -> int:
    import dfq
    from calibration.files import write_json
    from calibration.team import team
    from dfq.architectures import REFERENCE
    from dfq.checkpoint import is_quantized_model
    from dfq.datasets import image_folder, reference_digits, timm_dataset
    from dfq.errors import DfqError, UsageError
    from dfq.reporting.results import write_evaluation
    from dfq.runtime import is_onnx_file

    target = arguments.model
    if arguments.unlabelled and (arguments.data_dir is None or arguments.dataset is not None):
        raise UsageError("--unlabelled is for the images of a folder: give --data-dir, and no --dataset")
    if arguments.unlabelled and arguments.max_drop is not None:
        raise UsageError("--max-drop needs labelled images: without labels nobody knows the drop")
    compared = arguments.baseline or arguments.max_drop is not None or arguments.unlabelled
    baseline: Model | None = None
    model: Any
    check_files(arguments, {"json": ""})
    exported = is_onnx_file(target)
    complete = exported or is_quantized_model(target)
    for name in ("runtime", "precision"):
        if getattr(arguments, name) is not None and not exported:
            raise UsageError(f"--{name} is for an exported model, and {target} is no .onnx file")
    if complete:
        given = [name for name in MODEL_CHANGES if getattr(arguments, name) not in (None, False)]
        if given:
            kind = "an exported" if exported else "a quantized"
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(f"{target} is {kind} model and keeps its own preprocessing; leave out {options}")
        if exported:
            model = dfq.open_model(target, arguments.runtime or RUNTIMES[0], precision=arguments.precision or "fp32")
        else:
            model = dfq.load(target, device=arguments.device)
        if compared:
            baseline = _baseline_of(model, arguments)
    elif Path(target).is_dir():
        raise DfqError(f"{target} is a folder, but not of a quantized model: it lacks config.json or model.safetensors")
    else:
        if compared:
            raise UsageError("--baseline, --max-drop and --unlabelled compare a quantized model with its original")
        model = model_of(arguments)

    common = {
        "batch_size": arguments.batch_size,
        "workers": arguments.workers,
        "device": arguments.device,
        "limit": arguments.limit,
        "progress": not arguments.quiet,
    }
    if arguments.unlabelled:
        assert baseline is not None
        likeness = dfq.compare(model, baseline, arguments.data_dir, **common)
        print(model.describe())
        print(likeness.table())
        if arguments.json is not None and team().leads:
            write_json(arguments.json, likeness.to_dict())
        return 0

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
        seed=model.seed if exported else getattr(model, "calibration", {}).get("run", {}).get("seed"),
        **common,
    )
    if complete:
        print(model.describe())
    print(result.table())
    if arguments.json is not None and team().leads:
        write_evaluation(result, arguments.json, Path(target) if complete and not exported else None)
    if arguments.max_drop is not None and result.comparison is not None:
        drop = result.comparison.drop
        if drop > arguments.max_drop:
            print(f"dfq: the drop of {drop:.2f} points exceeds --max-drop {arguments.max_drop:g}", file=sys.stderr)
            return GATE_FAILED
    return 0


def _baseline_of(quantized: Any, arguments: argparse.Namespace) -> Model:
    """The full-precision model that `quantized` was made from, with its preprocessing."""
    from dfq.models import load_original

    return load_original(
        quantized.origin, quantized.preprocessing, checkpoint=arguments.checkpoint, device=arguments.device
    )


COMMAND = Command(
    "evaluate",
    "measure the accuracy of a quantized model, an exported or a full-precision one",
    "dfq evaluate vit-w4a8 --data-dir imagenet/val --baseline --max-drop 1",
    options,
    run,
    shared=True,
)
