"""The published tables of SMI, PSAQ-ViT, PTQ4ViT and RepQ-ViT made again on your ImageNet, ours beside theirs.

    python tools/reproduce.py --dry-run
    python tools/reproduce.py --imagenet imagenet/val --train imagenet/train --out runs/reproduction

Cells are model x method x bits x recipe, from tools/published.toml, in the published setting as far as dfq has it. Each
finished one is a line of JSON in OUT/results.jsonl; a run that was stopped goes on with what is missing, and tries
again what failed. OUT/reproduction.md is written after every cell. The exit status is 1 where a cell failed.

--dry-run makes nothing: it measures this device for a short while (docs/reproduction.md says what), prints what every
cell will take, and leaves that in OUT, so that the table can tell estimate and truth. It needs no images and no
weights. --checkpoint NAME=FILE gives the weights of a model; without, timm's pretrained ones are fetched. Cells that
calibrate on real images take 32 of --train, and are skipped without it. --limit, --iterations and --precision are for
trials, and the table says so.
--markdown prints the table of --results; --write FILE.md puts it into a page, between
`<!-- reproduction: RESULTS.jsonl -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accuracy_table import append, machine, shown
from cell_costs import Calibrated, calibrate
from cell_making import Workshop
from published import Cell, model_called, model_names, published_cells, table_names
from reproduction_tables import IMAGENET, to_markdown, with_tables

import dfq
from calibration.pictures import images_below

NO_TRAIN = "real images are needed: give --train DIR"


def run(cells: Sequence[Cell], arguments: argparse.Namespace) -> int:
    """Make what is missing; how many cells failed."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = finished_lines(arguments.results)
    done = {setting_of(line) for line in lines if "error" not in line}
    estimates = read_estimates(arguments.out)
    failed = 0
    workshop: Workshop | None = None
    # Cells of one model after another, so that it is loaded once.
    for planned in sorted(cells, key=lambda cell: model_names().index(cell.model)):
        cell = as_asked(planned, arguments)
        setting = setting_line(cell, arguments)
        if cell.kind == "none" or missing_train(cell, arguments) or setting_of(setting) in done:
            continue
        if workshop is None or workshop.timm != cell.timm:
            workshop = Workshop(cell.timm, arguments)
        line = attempt(workshop, cell) | setting
        failed += "error" in line
        if "error" not in line and estimate_name(cell, arguments) in estimates:
            line["estimated"] = estimates[estimate_name(cell, arguments)]
        append(arguments.results, line)
        lines.append(line)
        write_table(cells, lines, arguments)
        found = line.get("error") or (f"{line['top1']:.2f} %" if "top1" in line else f"{line['ratio']:.2f} times")
        print(f"{cell.model} {cell.name} {cell.bits or cell.kind}: {found}", flush=True)
    write_table(cells, lines, arguments)
    return failed


def attempt(workshop: Workshop, cell: Cell) -> dict[str, Any]:
    """The line of a cell; of one that fails its error, so that the rest can go on."""
    try:
        return workshop.make(cell)
    except dfq.DfqError as error:
        return {"error": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def write_table(cells: Sequence[Cell], lines: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    text = to_markdown(cells, lines, "" if arguments.train else NO_TRAIN)
    beside = arguments.out / "reproduction.md.part"
    beside.write_text(text)
    beside.replace(arguments.out / "reproduction.md")


def as_asked(cell: Cell, arguments: argparse.Namespace) -> Cell:
    """The cell with the iterations of a trial, where there are any."""
    return replace(cell, iterations=arguments.iterations) if arguments.iterations and cell.iterations else cell


def missing_train(cell: Cell, arguments: argparse.Namespace) -> bool:
    return cell.kind == "accuracy" and cell.images == "real" and arguments.train is None


def setting_line(cell: Cell, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a cell is, for its line: with the same, nothing is made again."""
    line: dict[str, Any] = {name: getattr(cell, name) for name in ("table", "model", "kind", "name", "bits")}
    line |= {"timm": cell.timm, "images": cell.images, "recipe": cell.recipe, "iterations": cell.iterations}
    line |= {"limit": arguments.limit, "precision": arguments.precision, "seed": arguments.seed}
    weights = arguments.checkpoint.get(cell.model)
    line["weights"] = "of timm" if weights is None else weights.name
    if cell.images == "real" and arguments.train is not None and arguments.imagenet is not None:
        line["calibrated_on_measured"] = arguments.train.resolve() == arguments.imagenet.resolve()
    return line


def setting_of(line: dict[str, Any]) -> tuple[Any, ...]:
    """Accuracy hangs on how many images, speed does not."""
    keys = ["table", "model", "kind", "name", "bits", "iterations", "precision", "seed", "weights"]
    return tuple(line[key] for key in keys) + ((line["limit"],) if line["kind"] == "accuracy" else ())


def finished_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of the results. What a run that was killed left of its last one is cut off: its cell is made again."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    return [json.loads(line) for line in content[:whole].splitlines()]


def foretell(cells: Sequence[Cell], arguments: argparse.Namespace) -> None:
    """Print what every missing cell will take, and keep it in OUT."""
    lines = finished_lines(arguments.results)
    done = {setting_of(line) for line in lines if "error" not in line}
    asked = [as_asked(cell, arguments) for cell in cells]
    possible = [cell for cell in asked if cell.kind != "none"]
    to_do = [cell for cell in possible if setting_of(setting_line(cell, arguments)) not in done]
    count = image_count(arguments)
    calibrated = calibrate(to_do, arguments.device, arguments.calibration_batch, arguments.precision)
    estimates = read_estimates(arguments.out)
    print("| table | model | images by | bits | generate | quantize | evaluate | sum |\n" + "|---" * 8 + "|")
    for cell in asked:
        row = [cell.table, cell.model, cell.name, "speed" if cell.kind == "speed" else cell.bits]
        if cell not in to_do:
            print(f"| {' | '.join(row)} | | | | {cell.cannot or 'done'} |")
            continue
        seconds = calibrated.of(cell, count, arguments.workers)
        estimates[estimate_name(cell, arguments)] = {part: round(value, 1) for part, value in seconds.items()}
        parts = [duration(seconds[part]) if part in seconds else "" for part in ("generate", "quantize", "evaluate")]
        note = f" ({NO_TRAIN})" if missing_train(cell, arguments) else ""
        print(f"| {' | '.join([*row, *parts, duration(sum(seconds.values()))])}{note} |")
    keep_estimates(arguments.out, estimates)
    print(told(calibrated, to_do, count, arguments))


def told(calibrated: Calibrated, cells: Sequence[Cell], count: int, arguments: argparse.Namespace) -> str:
    """Totals by table and for everything, and how they came about."""
    text = []
    for table in [*dict.fromkeys(cell.table for cell in cells), None]:
        own = [cell for cell in cells if table in (None, cell.table)]
        parts = calibrated.totals(own, count, arguments.workers)
        listed = ", ".join(f"{part} {duration(value)}" for part, value in parts.items())
        whole = duration(sum(parts.values()))
        text.append(f"{table or 'all of it'}: {len(own)} cells, {whole} ({listed}).")
    rates = [
        f"{name}: a forward pass {1000 * rate.forward:.1f} ms per image"
        + "".join(f", an iteration of `{method}` {1000 * value:.1f} ms" for method, value in rate.iteration.items())
        for name, rate in calibrated.models.items()
    ]
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return "\n".join(
        [
            "",
            *text,
            "",
            f"An estimate, from {duration(calibrated.seconds)} of measuring with random weights, inversion in "
            f"{arguments.precision}, on {device} ({machine()}, {torch.get_num_threads()} threads); {count:,} images "
            f"are measured on, read by {max(1, arguments.workers)} processes. In the totals images that cells share "
            "are made once, and full precision is measured once for each model. Fetching weights is not in it.",
            *rates,
        ]
    )


def image_count(arguments: argparse.Namespace) -> int:
    """Of the photographs, where they are there; else of ImageNet's."""
    there = arguments.imagenet is not None and arguments.imagenet.is_dir()
    count = len(images_below(arguments.imagenet)) if there else IMAGENET
    return min(arguments.limit or count, count)


def duration(seconds: float) -> str:
    for unit, size in (("d", 86_400.0), ("h", 3_600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def estimate_name(cell: Cell, arguments: argparse.Namespace) -> str:
    return "/".join(map(str, (*cell.key, cell.iterations, image_count(arguments), arguments.precision)))


def read_estimates(out: Path) -> dict[str, dict[str, float]]:
    path = out / "estimates.json"
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    return found


def keep_estimates(out: Path, estimates: dict[str, dict[str, float]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    beside = out / "estimates.json.part"
    beside.write_text(json.dumps(estimates, indent=1) + "\n")
    beside.replace(out / "estimates.json")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imagenet", type=Path, metavar="DIR", help="ImageNet val, one folder of images per class")
    parser.add_argument("--train", type=Path, metavar="DIR", help="ImageNet train: 32 images of it for calibration")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduction"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--tables", nargs="+", choices=table_names(), default=table_names())
    parser.add_argument("--models", nargs="+", type=_model, metavar="MODEL", help=", ".join(model_names()))
    parser.add_argument(
        "--checkpoint", nargs="+", action="extend", type=_checkpoint, default=[], metavar="NAME=FILE", help="weights"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N; by default CUDA where there is one")
    parser.add_argument("--dry-run", action="store_true", help="estimate the time and make nothing")
    parser.add_argument("--limit", type=_positive, metavar="N", help="measure on N of the images, evenly spaced")
    parser.add_argument("--iterations", type=_positive, metavar="N", help="of every inversion, for a trial")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of inversion (%(default)s)")
    parser.add_argument("--batch-size", "-b", type=_positive, default=64, help="measured at once (%(default)s)")
    parser.add_argument("--workers", "-j", type=int, default=0, metavar="N", help="loading processes (%(default)s)")
    parser.add_argument("--calibration-batch", type=_positive, metavar="N", help="images of what a dry run times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, metavar="FILE", help="(OUT/results.jsonl)")
    parser.add_argument("--markdown", action="store_true", help="print the table of --results and make nothing")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the table of --results into a page")
    arguments = parser.parse_args(argv)
    arguments.results = arguments.results or arguments.out / "results.jsonl"
    arguments.checkpoint = dict(arguments.checkpoint)
    for label, file in arguments.checkpoint.items():
        if not file.is_file():
            parser.error(f"there is no file {file}, the weights of {label}")
    if not (arguments.dry_run or arguments.markdown or arguments.write):
        if arguments.imagenet is None:
            parser.error("give --imagenet, or --dry-run, --markdown or --write")
        for folder in filter(None, (arguments.imagenet, arguments.train)):
            if not folder.is_dir():
                parser.error(f"there is no folder {folder}")
    return arguments


def _model(text: str) -> str:
    try:
        return model_called(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _checkpoint(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=FILE, not {text!r}")
    return _model(name), Path(file)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    cells = published_cells(arguments.tables, arguments.models)
    if shown(arguments, finished_lines(arguments.results), partial(to_markdown, cells), with_tables):
        return 0
    if not cells:
        print("no table has a cell of these models", file=sys.stderr)
        return 2
    if arguments.dry_run:
        foretell(cells, arguments)
        return 0
    failed = run(cells, arguments)
    skipped = sum(missing_train(cell, arguments) for cell in cells)
    print(f"{arguments.out / 'reproduction.md'}: {failed} cells failed, {skipped} were skipped", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
