"""What generation costs, by arithmetic and by the clock: FLOPs and bytes per image, processes, memory.

    python tools/scaling.py --results docs/scaling.jsonl
    python tools/scaling.py --results docs/scaling.jsonl --write docs/scaling.md

The first measures what --parts names, and adds lines to --results:

- speed: for each of --models (random weights) the FLOPs of an iteration by `flops`, by counting, and seconds per
  iteration, dense and with --kept patches.
- processes: the same `dfq generate` and `dfq evaluate` in each number of --processes, started by torchrun with one
  thread each: checksums, counts and seconds.
- memory: the peak of a process that generates so many images of --memory-model, and of one that then quantizes on
  them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accuracy_table import append, between_marks, machine, peak_memory, read_lines, shown
from bench_inversion import Bench, Phase, contenders

import dfq
from calibration.memory import activation_bytes
from calibration.passes import resolve_precision
from calibration.tokens import PatchGrid
from dfq.architectures import without_weights

GENERATE = "generate {model} --method smi -n 64 --batch-size 8 --iterations {iterations} --seed 0"
EVALUATE = "evaluate reference --batch-size 16 --json {out}"
HOUR = 3600.0


def flops(vit: Any, kept: int) -> float:
    """Of one iteration on one image with `kept` patches: forward, and backward to the image but to no weight.

    N tokens of width D in L blocks: each product with a weight, 12 N D^2 in a block where the MLP is four times as
    wide, is run once and its gradient once; of each attention product, 2 N^2 D in a block, there are two gradients. The
    patch embedding takes all patches that are kept. 2 FLOPs for a multiplication and an addition.
    """
    width, blocks = vit.embed_dim, len(vit.blocks)
    tokens = kept + vit.num_prefix_tokens
    hidden = vit.blocks[0].mlp.fc1.out_features
    with_weights = tokens * width * (4 * width + 2 * hidden)
    attention = 2 * tokens**2 * width
    pixels = vit.patch_embed.proj.weight[0].numel()
    return 2.0 * (blocks * (2 * with_weights + 3 * attention) + 2 * kept * pixels * width)


def speed(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    model = dfq.load_model(name, random_weights=True, device=arguments.device)
    bench = Bench.of(model, arguments.batch_size, "auto", 0)
    everything = PatchGrid.of(model.module).num_patches
    line: dict[str, Any] = {"part": "speed", "model": name, "batch_size": arguments.batch_size, "phases": []}
    for kept in (everything, arguments.kept):
        phase = Phase(kept, looks=False)
        line["phases"].append(
            {
                "kept": kept,
                "flops": flops(model.module, kept),
                "counted": bench.flops(phase),
                "seconds": bench.seconds(phase, arguments.steps) / arguments.batch_size,
            }
        )
    dtype = resolve_precision("auto", model.device)
    line["activation_bytes"] = activation_bytes(model.module, dtype)
    line["weight_bytes"] = model.weight_bytes
    line["canvas_bytes"] = 3 * 4 * PatchGrid.of(model.module).image_size[0] * PatchGrid.of(model.module).image_size[1]
    return line


def processes(name: str, count: int, iterations: int) -> dict[str, Any]:
    """The same two commands in `count` processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "dfq"]
    weights = "" if name == "reference" else " --random-weights"
    line: dict[str, Any] = {"part": "processes", "model": name, "processes": count, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as where:
        out = Path(where) / "set"
        generate = GENERATE.format(model=name, iterations=iterations) + weights
        line["generating_seconds"] = timed([*command, *shlex.split(generate), "--quiet", "--out", str(out)])
        line["command"] = generate
        files = sorted([*out.glob("shard-*"), out / "preview.png"])
        line["sha256"] = sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        if name == "reference":
            result = Path(where) / "result.json"
            evaluate = EVALUATE.format(out=result)
            line["evaluating_seconds"] = timed([*command, *shlex.split(evaluate), "--quiet"])
            found = json.loads(result.read_text())
            line["counts"] = {key: found[key] for key in ("num_images", "top1", "top5")}
    return line


def timed(command: list[str]) -> float:
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return time.monotonic() - started


def memory(name: str, count: int, quantized: bool) -> dict[str, Any]:
    """Peaks of processes of their own: memory that was freed is not given back, and would hide the next peak."""
    line: dict[str, Any] = {"part": "memory", "model": name, "images": count, "quantizing": None}
    for what in ("generating", "quantizing")[: 1 + quantized]:
        done = subprocess.run(
            [sys.executable, __file__, "--peak", what, name, str(count)], check=True, capture_output=True, text=True
        )
        line |= json.loads(done.stdout)
    return line


def peak(what: str, name: str, count: int) -> dict[str, Any]:
    model = dfq.load_model(name, random_weights=name != "reference", device="cpu")
    if what == "generating":
        made: list[dfq.CalibrationSet] = []

        def generate() -> None:
            made.append(dfq.generate(model, "dense", count, iterations=1, batch_size=32, progress=False))

        return {what: peak_memory(generate, model.device), "images_bytes": made[0].images.numel()}
    images = dfq.generate(model, "gaussian", count, progress=False)

    def quantize() -> None:
        dfq.quantize(model, "w4a8", calibration=images, recipe="fast", progress=False)

    return {what: peak_memory(quantize, model.device)}


def to_markdown(lines: list[dict[str, Any]]) -> str:
    """The tables of all parts."""
    tables = []
    for part, table in (("speed", _speed_table), ("processes", _processes_table), ("memory", _memory_table)):
        found = [line for line in lines if line["part"] == part]
        if found:
            tables.append(table(found))
    last = lines[-1]
    footer = f"{last['machine']}, one thread per process; torch {last['torch']}; seed 0."
    return "\n\n".join([*tables, footer])


def _speed_table(found: list[dict[str, Any]]) -> str:
    # One rate, of the first model, all patches, foretells the others.
    first = found[0]["phases"][0]
    rate = first["flops"] / first["seconds"]
    rows = [
        "| model | patches | GFLOP per image and iteration: formula | counted | s per image and iteration | GFLOP/s "
        "| s by the rate of the first row | kept for the backward pass, MB per image |",
        "|---" * 8 + "|",
    ]
    for line in found:
        for phase in line["phases"]:
            kept = f"{line['activation_bytes'] / 1e6:.0f}" if phase is line["phases"][0] else ""
            rows.append(
                f"| {line['model']} | {phase['kept']} | {phase['flops'] / 1e9:.2f} | {phase['counted'] / 1e9:.2f} "
                f"| {phase['seconds']:.3f} | {phase['flops'] / phase['seconds'] / 1e9:.0f} "
                f"| {phase['flops'] / rate:.3f} | {kept} |"
            )
    return "\n".join(rows)


def _processes_table(found: list[dict[str, Any]]) -> str:
    rows = [
        "| model | processes | generating, s | SHA-256 of the set | evaluating, s | images, top-1, top-5 |",
        "|---" * 6 + "|",
    ]
    for line in found:
        counts = line.get("counts")
        told = "-" if counts is None else f"{counts['num_images']}, {counts['top1']:.3f} %, {counts['top5']:.3f} %"
        seconds = "-" if counts is None else f"{line['evaluating_seconds']:.1f}"
        rows.append(
            f"| {line['model']} | {line['processes']} | {line['generating_seconds']:.1f} | `{line['sha256'][:12]}` "
            f"| {seconds} | {told} |"
        )
    return "\n".join(rows)


def _memory_table(found: list[dict[str, Any]]) -> str:
    rows = [
        "| model | images | the images themselves, MB | peak of generating, MB | peak of quantizing, MB |",
        "|---" * 5 + "|",
    ]
    rows += [
        f"| {line['model']} | {line['images']} | {line['images_bytes'] / 1e6:.0f} | {line['generating'] / 1e6:.0f} "
        f"| {'-' if line['quantizing'] is None else round(line['quantizing'] / 1e6)} |"
        for line in found
    ]
    return "\n".join(rows)


def projection(name: str = "deit_base_patch16_224", images: int = 1_000_000, sustained: float = 100e12) -> str:
    """Arithmetic, no measurement: hours for so many images at so many FLOP/s per GPU."""
    vit: Any = without_weights(name)
    everything = vit.patch_embed.num_patches
    rows = ["| method | iterations | TFLOP per image | 1 GPU, h | 8 GPUs, h | 64 GPUs, h |", "|---" * 6 + "|"]
    known = {contender.name: contender for contender in contenders(4)}
    runs = [(method, known[method], 4000) for method in ("dense", "smi", "pri")]
    runs.append(("natural", known["dense"], 40))
    for method, contender, iterations in runs:
        phases = contender.phases(everything, iterations)
        work = sum(flops(vit, phase.kept) * count for phase, count in phases.items()) / contender.images_per_canvas
        alone = images * work / sustained / HOUR
        hours = [f"{alone / gpus:,.1f}" for gpus in (1, 8, 64)]
        rows.append(f"| `{method}` | {iterations:,} | {work / 1e12:.2f} | {' | '.join(hours)} |")
    return "\n".join(rows)


def with_tables(page: str, name: str, lines: list[dict[str, Any]]) -> str:
    """`page` with what stands between the marks for the results file `name` replaced by its tables."""
    page = between_marks(page, f"<!-- scaling: {name} -->\n", to_markdown(lines))
    return between_marks(page, "<!-- projection -->\n", projection())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["speed", "processes", "memory"])
    parser.add_argument(
        "--models", nargs="+", default=["deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"]
    )
    parser.add_argument("--batch-size", type=int, default=8, help="of the speed")
    parser.add_argument("--kept", type=int, default=46)
    parser.add_argument("--steps", type=int, default=10, help="iterations that are timed")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--shared-models", nargs="+", default=["reference", "deit_tiny_patch16_224"])
    parser.add_argument("--iterations", type=int, default=10, help="of what processes share")
    parser.add_argument("--memory-model", default="deit_tiny_patch16_224")
    parser.add_argument("--images", nargs="+", type=int, default=[64, 256, 1024], help="of the memory")
    parser.add_argument("--quantize-up-to", type=int, default=256, help="images of the memory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=Path("runs/scaling.jsonl"))
    parser.add_argument("--markdown", action="store_true", help="print the tables of --results")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="put the tables of --results into a page")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.peak:
        what, name, count = arguments.peak
        print(json.dumps(peak(what, name, int(count))))
        return
    if shown(arguments, read_lines(arguments.results), to_markdown, with_tables):
        return

    def keep(line: dict[str, Any]) -> None:
        line |= {"machine": machine(), "torch": torch.__version__}
        append(arguments.results, line)
        print(to_markdown([line]), flush=True)

    torch.set_num_threads(1)
    if "speed" in arguments.parts:
        for name in arguments.models:
            keep(speed(name, arguments))
    if "processes" in arguments.parts:
        for name in arguments.shared_models:
            for count in arguments.processes:
                keep(processes(name, count, arguments.iterations))
    if "memory" in arguments.parts:
        for count in arguments.images:
            keep(memory(arguments.memory_model, count, count <= arguments.quantize_up_to))


if __name__ == "__main__":
    main()
