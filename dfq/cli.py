"""The `dfq` command: parse, call, print. What it does is in the library; so is every error it reports.

Exit status: 0 done, 1 failed, 2 wrong usage, 3 finished but a gate failed (--max-drop), 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfq.options import build_parser

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
    arguments = build_parser(_COMMANDS).parse_args(argv)
    try:
        with _reporting(quiet=arguments.quiet, debug=arguments.debug):
            status = _in_team(arguments) if "WORLD_SIZE" in os.environ else int(arguments.command(arguments) or 0)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        goes_on = arguments.command in (_generate, _quantize, _distill)
        print(f"dfq: interrupted{'; the same command goes on where it stopped' if goes_on else ''}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (head, less) has gone: not a failure, and nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if arguments.debug:
            raise
        return _explain(error)


def _in_team(arguments: argparse.Namespace) -> int:
    """The command in one of the processes that `torchrun` started; gives the exit status."""
    from calibration.team import joined

    with joined() as team, ExitStack() as stack:
        if not team.leads:
            if arguments.command not in _SHARED:
                return 0
            arguments.quiet = True
            logging.getLogger("dfq").setLevel(logging.ERROR)
            stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        return int(arguments.command(arguments) or 0)


def _explain(error: Exception) -> int:
    """Say in one line what went wrong; gives the exit status."""
    from calibration.team import LeaderError
    from dfq.errors import DfqError, UsageError

    if isinstance(error, LeaderError):
        # torchrun ends all processes when one has failed: not before the first has said why.
        time.sleep(1)
        return 1
    if isinstance(error, DfqError):
        said = str(error)
    else:
        first_line = (str(error) or "no message").splitlines()[0]
        said = f"unexpected {type(error).__name__}: {first_line}; --debug shows where"
    rank = int(os.environ.get("RANK", "0"))
    who = f" in process {rank}" if rank else ""
    print(f"dfq: error{who}: {said}", file=sys.stderr)
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
    plan = _plan(arguments)
    model = _model(arguments)
    made = _generated(arguments, model, plan, arguments.out)
    print(_describe_set(made))
    also = ", trace.png how they came about" if (arguments.out / "trace.png").exists() else ""
    print(f"kept in {arguments.out}; preview.png there shows them{also}")


def _quantize(arguments: argparse.Namespace) -> None:
    import dfq
    from calibration import check_method
    from calibration.files import FolderLock, remove_file, take_folder
    from calibration.team import team
    from dfq.checkpoint import claim_directory
    from dfq.generation import describe_run
    from dfq.ptq.engine import check_calibration, prepare
    from dfq.ptq.resume import UNFINISHED
    from dfq.recipe import parse_bits

    # Everything that can be wrong is found here, before the folder is touched and images are made.
    widths = parse_bits(arguments.bits)
    bits = str(widths)
    recipe = dfq.load_recipe(arguments.recipe)
    if arguments.num_images is None:
        arguments.num_images = recipe.num_images
    plan = _plan(arguments)
    model = _model(arguments)
    prepare(model, widths, recipe)
    images = _given_images(arguments, model)
    if images is None:
        check_method(model.module, plan)
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
    held: list[FolderLock] = []

    def claim() -> bool:
        held.append(take_folder(arguments.out))
        return claim_directory(arguments.out, identity, overwrite=arguments.overwrite)

    shared = team()
    complete = shared.lead(claim)
    if images is None and not complete:
        images = _generated(arguments, model, plan, arguments.out / "calibration")
    if not shared.leads:
        # Images are made together; what comes after them is the leader's.
        return
    if complete:
        quantized = dfq.load(arguments.out, device=arguments.device)
        print(f"{arguments.out} already holds this model; nothing to do")
    else:
        # Without, it is a matter of seconds.
        resume = None if recipe.reconstruction is None else arguments.out / UNFINISHED
        quantized = dfq.quantize(
            model, bits, calibration=images, recipe=recipe, resume=resume, progress=not arguments.quiet
        )
        dfq.save(quantized, arguments.out)
    remove_file(arguments.out / UNFINISHED)
    print(
        f"{quantized.describe()}: {len(quantized.sites)} tensors quantized, "
        f"{quantized.weight_bytes / 1e6:.2f} MB ({model.weight_bytes / 1e6:.2f} MB in float32)"
    )
    print(f"kept in {arguments.out}; measure it with: dfq evaluate {arguments.out} --data-dir IMAGES --baseline")


def _sensitivity(arguments: argparse.Namespace) -> None:
    import dfq
    from calibration.files import write_json
    from dfq.chart import write_chart
    from dfq.errors import UsageError
    from dfq.generation import run_plan
    from dfq.ptq.engine import prepare
    from dfq.ptq.mixed_precision import write_recipe
    from dfq.recipe import parse_bits

    widths = parse_bits(arguments.bits)
    recipe = dfq.load_recipe(arguments.recipe)
    plan = _plan(arguments)
    target = {"target_size": arguments.target_size, "target_drop": arguments.target_drop}
    chosen = any(value is not None for value in target.values())
    if arguments.out is not None and not chosen:
        raise UsageError("--out is for a recipe with chosen bits: give --target-size or --target-drop too")
    _check_files(arguments, {"json": "", "chart": ".svg", "out": ".toml"})
    model = _model(arguments)
    prepare(model, widths, recipe)
    images = _given_images(arguments, model) or run_plan(model, plan, progress=not arguments.quiet)
    options: dict[str, Any] = {"calibration": images, "recipe": recipe, "num_images": arguments.num_images}
    options["progress"] = not arguments.quiet
    result: Any
    if chosen:
        result = dfq.mixed_precision(model, str(widths), **target, **options)
    else:
        result = dfq.sensitivity(model, str(widths), **options)
    print(result.table())
    if arguments.json is not None:
        write_json(arguments.json, result.to_dict())
    if arguments.chart is not None:
        write_chart(result.costs.sensitivity if chosen else result, arguments.chart)
    if arguments.out is not None:
        write_recipe(result.recipe, arguments.out)
        command = f"dfq quantize {arguments.model} --bits {widths} --recipe {arguments.out} --out DIR"
        print(f"recipe in {arguments.out}; use it with: {command}")


def _evaluate(arguments: argparse.Namespace) -> int:
    import dfq
    from calibration.files import write_json
    from calibration.team import team
    from dfq.architectures import REFERENCE
    from dfq.checkpoint import is_quantized_model
    from dfq.datasets import image_folder, reference_digits, timm_dataset
    from dfq.errors import DfqError, UsageError
    from dfq.runtime import RUNTIMES, is_onnx_file

    target = arguments.model
    baseline = None
    model: Any
    _check_files(arguments, {"json": ""})
    exported = is_onnx_file(target)
    complete = exported or is_quantized_model(target)
    if arguments.runtime is not None and not exported:
        raise UsageError(f"--runtime is for an exported model, and {target} is no .onnx file")
    if complete:
        given = [name for name in _MODEL_CHANGES if getattr(arguments, name) not in (None, False)]
        if given:
            kind = "an exported" if exported else "a quantized"
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(f"{target} is {kind} model and keeps its own preprocessing; leave out {options}")
        if exported:
            model = dfq.open_model(target, arguments.runtime or RUNTIMES[0])
        else:
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
        seed=model.seed if exported else getattr(model, "calibration", {}).get("run", {}).get("seed"),
        progress=not arguments.quiet,
    )
    if complete:
        print(model.describe())
    print(result.table())
    if arguments.json is not None and team().leads:
        write_json(arguments.json, result.to_dict())
    if arguments.max_drop is not None and result.comparison is not None:
        drop = result.comparison.drop
        if drop > arguments.max_drop:
            print(f"dfq: the drop of {drop:.2f} points exceeds --max-drop {arguments.max_drop:g}", file=sys.stderr)
            return GATE_FAILED
    return 0


def _export(arguments: argparse.Namespace) -> None:
    import dfq
    from dfq.checkpoint import save_plain
    from dfq.errors import UsageError

    _check_files(arguments, {"out": ".onnx" if arguments.format == "onnx" else ".safetensors"})
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


def _bench(arguments: argparse.Namespace) -> None:
    import dfq
    from calibration.files import write_json

    _check_files(arguments, {"json": ""})
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


def _distill(arguments: argparse.Namespace) -> None:
    import dfq
    from dfq.checkpoint import is_quantized_model
    from dfq.errors import UsageError
    from dfq.transfer.student import load_student
    from dfq.transfer.training import Training

    quantized = is_quantized_model(arguments.student)
    training = Training(
        part=arguments.train,
        steps=arguments.steps,
        windows=arguments.windows,
        batch_size=arguments.train_batch_size,
        temperature=arguments.temperature,
        optimizer=arguments.opt or ("adamw" if quantized else "sgd"),
        learning_rate=arguments.lr,
        momentum=arguments.momentum,
        weight_decay=arguments.weight_decay,
        decay=arguments.sched,
    )
    arguments.batch_size = arguments.num_images
    arguments.model = arguments.teacher
    plan = _plan(arguments)
    if quantized and (arguments.student_checkpoint or arguments.student_random_weights):
        raise UsageError(f"{arguments.student} is a quantized model and has its weights; leave out those for it")
    teacher = _model(arguments)
    student: Any
    if quantized:
        student = dfq.load(arguments.student, device=teacher.device)
    else:
        student = load_student(
            arguments.student,
            teacher,
            checkpoint=arguments.student_checkpoint,
            random_weights=arguments.student_random_weights,
            fresh_classifier=training.part == "linear",
            seed=arguments.seed,
        )
    result = dfq.distill(
        teacher,
        student,
        plan=plan,
        rounds=arguments.rounds,
        training=training,
        calibration=arguments.calibration,
        data=arguments.data_dir,
        seed=arguments.seed,
        out=arguments.out,
        overwrite=arguments.overwrite,
        progress=not arguments.quiet,
    )
    print(result.describe())
    print(f"kept in {arguments.out}; curve.svg there shows how it went")


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
        rows = _models(arguments.filter)
    width = max(len(name) for name, _ in rows)
    for name, summary in rows:
        print(f"{name:<{width}}  {summary}".rstrip())


def _models(filter: str) -> list[tuple[str, str]]:
    """Names and, where a filter keeps them few, what can be done with each: that takes building it."""
    from dfq.architectures import supported_names
    from dfq.errors import DfqError
    from dfq.support import describe_support

    names = supported_names(filter)
    if not names:
        raise DfqError(f"no model that dfq knows is called {filter!r}; wildcards help: 'vit_tiny*'")
    if not filter:
        return [(name, "") for name in names]
    return [(name, describe_support(name).describe()) for name in names]


_MODEL_CHANGES = ("random_weights", "image_size", "mean", "std", "interpolation", "crop_pct")


def _plan(arguments: argparse.Namespace) -> Plan:
    """How images are to be generated. Raises UsageError: it is made before anything else is done."""
    from calibration import Plan
    from dfq.errors import DfqError, UsageError
    from dfq.generation import chosen_schedule

    iterations = None if arguments.iterations == "auto" else arguments.iterations
    schedule = chosen_schedule(
        arguments.method,
        arguments.schedule,
        stops=arguments.stop_at,
        ratio=arguments.stop_ratio,
        division=arguments.division,
    )
    try:
        return Plan(
            method=arguments.method,
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


def _generated(arguments: argparse.Namespace, model: Model, plan: Plan, out: Path) -> CalibrationSet:
    from dfq.generation import run_plan

    return run_plan(
        model,
        plan,
        trace=arguments.trace,
        out=out,
        overwrite=arguments.overwrite,
        progress=not arguments.quiet,
    )


def _given_images(arguments: argparse.Namespace, model: Model) -> CalibrationSet | None:
    import dfq

    if arguments.calibration is not None:
        return dfq.load_calibration_set(arguments.calibration)
    if arguments.calibration_images is not None:
        return dfq.real_images(model, arguments.calibration_images, arguments.num_images, seed=arguments.seed)
    return None


def _check_files(arguments: argparse.Namespace, suffixes: dict[str, str]) -> None:
    """Raise UsageError where a file that is to be written in the end cannot be."""
    from dfq.errors import UsageError

    for option, suffix in suffixes.items():
        path = getattr(arguments, option)
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise UsageError(f"--{option} {path}: there is no folder {path.parent}")
        if not path.name.endswith(suffix):
            raise UsageError(f"--{option} {path}: the name must end in {suffix}")


def _describe_set(made: CalibrationSet) -> str:
    parts = [f"{len(made)} images"]
    if made.confidence is not None:
        parts.append(f"mean confidence {made.confidence.mean().item():.0%}")
    if made.is_sparse:
        kept = made.mask.flatten(1).sum(1).float().mean().item()
        parts.append(f"{kept:.0f} of {made.grid.num_patches} patches each")
    return ", ".join(parts)


_COMMANDS = {
    "generate": _generate,
    "quantize": _quantize,
    "sensitivity": _sensitivity,
    "evaluate": _evaluate,
    "export": _export,
    "bench": _bench,
    "distill": _distill,
    "list": _list,
    "demo": _demo,
}

# What the processes of a team do together; the rest their leader does.
_SHARED = (_generate, _quantize, _evaluate, _distill)
