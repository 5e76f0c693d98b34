"""Accuracy of quantized models by calibration data, recipe and bits, on labelled images of your own.

    python tools/accuracy_table.py --images imagenet/val \\
        --model deit_tiny_patch16_224=deit_tiny.safetensors --model vit_tiny_patch16_224=vit_tiny.safetensors

Every cell is one line of JSON in --results, with seed, versions and seconds; cells that are there are not made again,
so a run that was stopped goes on. --markdown makes nothing and prints the tables of all lines in the file;
--write FILE.md puts them into a page, between `<!-- tables: RESULTS.jsonl -->` and `<!-- end -->`.
The `real` rows are calibrated on images drawn from --calibration-images (by default from --images themselves). Other
rows are METHOD[/SCHEDULE][@ITERATIONS], such as `natural`, `psaq/smi` or `smi@4000`; their sets lie beside --results.
SOURCE:N calibrates on N images; without it on as many as the recipe asks for.
A cell with lines of several seeds shows their mean, the least and the most.
What a line has as `mark` stands behind its cell, for a page that explains it.
--generate-only makes the sets and no cell: alone on a machine, for the seconds; the cells may then share it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import dfq
from calibration import METHODS
from dfq.datasets import image_folder

SOURCES = ("real", *METHODS)
KEY = ("model", "source", "recipe", "bits", "seed")
BATCH = 50


@dataclass
class Replayed:
    """A model whose logits for these images are known: the baseline need not run again for every cell."""

    model: dfq.Model
    logits: Tensor
    _at: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, images: Tensor) -> Tensor:
        start, self._at = self._at, self._at + len(images)
        return self.logits[start : self._at].to(images.device)


def main() -> None:
    arguments = parse_arguments()
    lines = read_lines(arguments.results)
    if shown(arguments, lines, to_markdown, with_tables):
        return
    wanted = [
        {"source": source, "recipe": recipe, "bits": bits, "seed": arguments.seed}
        for source in arguments.sources
        for bits in arguments.bits
        for recipe in arguments.recipes
    ]
    for name, model, missing in unfinished(arguments, wanted, lines, KEY):
        if arguments.generate_only:
            for cell in missing:
                _, made = calibration_set(cell, model, arguments)
                print(name, cell["source"], made, flush=True)
            continue
        images, labels = load_images(arguments.images, model, arguments.limit)
        logits = logits_of(model, images)
        for cell in missing:
            calibration, made = calibration_set(cell, model, arguments)
            quantized, cost = quantized_at_a_cost(cell, model, calibration)
            result = dfq.evaluate(
                quantized, TensorDataset(images, labels), baseline=Replayed(model, logits), batch_size=BATCH
            )
            line = (
                cell
                | result.to_dict()
                | made
                | cost
                | {
                    "model": name,
                    "seed": arguments.seed,
                    "machine": machine(),
                    "threads": torch.get_num_threads(),
                }
            )
            append(arguments.results, line)
            print(
                f"{name} {cell['source']} {cell['recipe']} {cell['bits']}: {line['top1']:.1f} "
                f"(drop {line['drop']:.2f}), {line['quantize_seconds']:.0f} s",
                flush=True,
            )


def quantized_at_a_cost(
    cell: dict[str, Any], model: dfq.Model, calibration: dfq.CalibrationSet
) -> tuple[dfq.QuantizedModel, dict[str, Any]]:
    """The model of a cell, and the seconds and the memory that quantizing it took."""
    made: list[dfq.QuantizedModel] = []

    def run() -> None:
        made.append(dfq.quantize(model, cell["bits"], calibration=calibration, recipe=cell["recipe"]))

    started = time.monotonic()
    memory = peak_memory(run, model.device)
    seconds = time.monotonic() - started
    return made[0], {"quantize_seconds": round(seconds, 1), "peak_memory_mb": round(memory / 1e6)}


def peak_memory(run: Callable[[], None], device: torch.device) -> int:
    """Bytes `run` needs at most beyond what is held already, on `device`; on a CPU, of the whole process (Linux).

    That includes the code it is the first to use, some tens of MB.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - held
    # Not getrusage's ru_maxrss: a process starts with that of the one which started it, and it cannot be reset.
    Path("/proc/self/clear_refs").write_text("5")
    held = _status("VmRSS")
    run()
    return _status("VmHWM") - held


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def calibration_set(
    cell: dict[str, Any], model: dfq.Model, arguments: argparse.Namespace
) -> tuple[dfq.CalibrationSet, dict[str, Any]]:
    """The set for a row, and how long it took when it was made."""
    source, _, wanted = cell["source"].partition(":")
    if wanted and not wanted.isdigit():
        raise SystemExit(f"{cell['source']}: after : comes a number of images")
    count = int(wanted) if wanted else dfq.load_recipe(cell["recipe"]).num_images
    if source == "real":
        folder = arguments.calibration_images or arguments.images
        real = dfq.real_images(model, folder, count, seed=arguments.seed)
        return real, {"iterations": 0, "generate_seconds": 0.0, "calibration_images": count}
    composition, _, iterations = source.partition("@")
    method, _, schedule = composition.partition("/")
    if iterations and not iterations.isdigit():
        raise SystemExit(f"{source}: after @ comes a number of iterations")
    out = arguments.results.parent / f"{model.name}-{source.replace('/', '-')}-{count}-seed{arguments.seed}"
    timing = out.with_suffix(".seconds")
    started = time.monotonic()
    images = dfq.generate(
        model,
        method,
        count,
        iterations=int(iterations) if iterations else "auto",
        schedule=schedule or None,
        seed=arguments.seed,
        out=out,
    )
    if not timing.exists():
        timing.write_text(f"{time.monotonic() - started:.1f}")
    return images, {
        "iterations": 0 if images.iterations is None else int(images.iterations.float().mean().round()),
        "generate_seconds": float(timing.read_text()),
        "calibration_images": count,
    }


def logits_of(model: Any, images: Tensor) -> Tensor:
    """[M, 3, H, W] -> [M, C]"""
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in torch.split(images, BATCH)])


def load_images(folder: Path, model: dfq.Model, limit: int | None) -> tuple[Tensor, Tensor]:
    """The images of the folder, evenly spaced, preprocessed once: float32 [M, 3, H, W], and labels [M]."""
    dataset = image_folder(folder, model)
    count = min(limit or len(dataset), len(dataset))
    pairs = [dataset[index * len(dataset) // count] for index in range(count)]
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def machine() -> str:
    """CPU and GPU, for the record."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {os.cpu_count()} cores{gpu}"


def unfinished(
    arguments: argparse.Namespace, wanted: list[dict[str, Any]], lines: list[dict[str, Any]], key: tuple[str, ...]
) -> Iterator[tuple[str, dfq.Model, list[dict[str, Any]]]]:
    """The models of --model that lack some of the cells `wanted` of each: name, model, those that no line has.

    Cells with one key, of which the model is a part, are the same. PyTorch gets --threads.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    done = {tuple(line[part] for part in key) for line in lines}
    for entry in arguments.model:
        name, _, checkpoint = entry.partition("=")
        cells = [{"model": name} | cell for cell in wanted]
        missing = [cell for cell in cells if tuple(cell[part] for part in key) not in done]
        if missing:
            yield name, dfq.load_model(name, checkpoint=checkpoint or None), missing


def shown(
    arguments: argparse.Namespace,
    lines: list[dict[str, Any]],
    to_markdown: Callable[[list[dict[str, Any]]], str],
    with_tables: Callable[[str, str, list[dict[str, Any]]], str],
) -> bool:
    """Whether --markdown or --write was given; then that is done, and nothing is to be made."""
    if arguments.markdown:
        print(to_markdown(lines))
    elif arguments.write:
        page = arguments.write.read_text()
        arguments.write.write_text(with_tables(page, arguments.results.name, lines))
    return bool(arguments.markdown or arguments.write)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def to_markdown(lines: list[dict[str, Any]]) -> str:
    """One table per model: a row for each recipe and kind of calibration data, a column for each pair of bits."""
    blocks = []
    for model in dict.fromkeys(line["model"] for line in lines):
        own = [line for line in lines if line["model"] == model]
        columns = sorted(
            dict.fromkeys(line["bits"] for line in own), key=lambda bits: [-int(w) for w in re.findall(r"\d+", bits)]
        )
        first = max(own, key=lambda line: line["num_images"])
        blocks.append(
            f"**{model}**: full precision {first['baseline_top1']:.1f} % on {first['num_images']} images. "
            "Drop in points [95 % interval]; agreement with full precision.\n"
        )
        blocks.append(f"| recipe | calibration | s | {' | '.join(map(str.upper, columns))} |")
        blocks.append("|---" * (len(columns) + 3) + "|")
        for recipe, source in dict.fromkeys((line["recipe"], line["source"]) for line in own):
            row = [line for line in own if (line["recipe"], line["source"]) == (recipe, source)]
            some = row[0]
            quantizing = max(line["quantize_seconds"] for line in row)
            cells = [cell_text([line for line in row if line["bits"] == bits], first["num_images"]) for bits in columns]
            making = "-" if some["generate_seconds"] is None else f"{some['generate_seconds']:.0f}"
            seconds = f"{making} + {quantizing:.0f}"
            blocks.append(f"| {' | '.join([f'`{Path(recipe).stem}`', calibration_text(some), seconds, *cells])} |")
        threads = sorted({line["threads"] for line in own if "threads" in line})
        seeds = sorted({line["seed"] for line in own})
        memory = max((line.get("peak_memory_mb", 0) for line in own), default=0)
        blocks.append(
            "\nSeconds: of making the images, and of quantizing, the most of a row"
            + (f"; its peak memory beyond the model is at most {memory} MB" if memory else "")
            + f". Seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}; {machines(own)}"
            + "".join(f", {count} of them used" for count in threads)
            + "; "
            + ", ".join(f"{name} {version}" for name, version in first["versions"].items())
            + ".\n"
        )
    return "\n".join(blocks)


def machines(lines: list[dict[str, Any]]) -> str:
    """Those that the lines were measured on, each once."""
    return " and ".join(dict.fromkeys(line["machine"] for line in lines))


def calibration_text(line: dict[str, Any]) -> str:
    source = line["source"].partition(":")[0]
    text = f"{line.get('calibration_images', 32)} `{source}`"
    return f"{text}, {line['iterations']} iterations" if line["iterations"] else text


def with_tables(page: str, name: str, lines: list[dict[str, Any]]) -> str:
    """`page` with what stands between the marks for the results file `name` replaced by its tables."""
    return between_marks(page, f"<!-- tables: {name} -->\n", to_markdown(lines))


def between_marks(page: str, mark: str, text: str) -> str:
    """`page` with what stands between `mark` and the next end mark replaced by `text`."""
    end = "<!-- end -->"
    before, found, rest = page.partition(mark)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"the page lacks the marks {mark.strip()} and {end}")
    return f"{before}{mark}\n{text}\n{end}{after}"


def cell_text(lines: list[dict[str, Any]], usual_images: int) -> str:
    """Of one seed the drop and its interval; of several their mean, the least and the most."""
    if not lines:
        return "-"
    drops = [line["drop"] for line in lines]
    some = lines[0]
    low, high = some["drop_ci95"]
    span = f"[{low:.1f}, {high:.1f}]"
    if len(lines) > 1:
        span = f"({min(drops):.1f} to {max(drops):.1f}, {len(lines)} seeds)"
    fewer = "" if some["num_images"] == usual_images else f" ({some['num_images']} images)"
    agreement = fmean(line["agreement"] for line in lines)
    return f"{fmean(drops):.1f} {span}; {agreement:.1f} %{fewer}{some.get('mark', '')}"


def argument_parser(description: str | None, *, results: str, images: str) -> argparse.ArgumentParser:
    """What every table of cells takes. results: the folder below runs/; images: what they are for."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], metavar="NAME[=CHECKPOINT]")
    parser.add_argument("--images", type=Path, metavar="DIR", help=images)
    parser.add_argument("--calibration-images", type=Path, metavar="DIR", help="for calibration on `real` images")
    parser.add_argument("--results", type=Path, default=Path("runs") / results / "results.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of PyTorch; all cores where it is not given")
    parser.add_argument("--markdown", action="store_true", help="print the tables of --results")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the tables of --results into a page")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of `argument_parser` and others; an error where there is nothing to do."""
    arguments = parser.parse_args()
    if not (arguments.markdown or arguments.write) and not (arguments.model and arguments.images):
        parser.error("give --model and --images, or --markdown, or --write")
    return arguments


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__, results="accuracy", images="labelled images to measure on")
    parser.add_argument("--sources", nargs="+", default=list(SOURCES), metavar="SOURCE")
    parser.add_argument("--recipes", nargs="+", default=["fast"])
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a8", "w4a4"])
    parser.add_argument("--limit", type=int, metavar="N", help="measure on N of the images, evenly spaced")
    parser.add_argument("--generate-only", action="store_true", help="make the calibration sets and stop")
    return parsed(parser)


if __name__ == "__main__":
    main()
