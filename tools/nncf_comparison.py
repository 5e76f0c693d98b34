"""dfq against NNCF's own post-training quantization, both in OpenVINO, both calibrated on the same generated images.

    pip install nncf
    python tools/nncf_comparison.py --images imagenet/val \\
        --model deit_tiny_patch16_224=deit_tiny.safetensors --model vit_tiny_patch16_224=vit_tiny.safetensors

For every model one line of JSON in --results: accuracy on the same images, and milliseconds at --batch-sizes, the three
networks (full precision, NNCF, dfq at each of --bits) taking turns. NNCF gets the full-precision network and
`model_type=TRANSFORMER`, all else as it is by default. Lines that are there are not made again; --markdown prints the
table of all lines, --write FILE.md puts it into a page, between `<!-- nncf: RESULTS.jsonl -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from accuracy_table import (
    Replayed,
    append,
    argument_parser,
    between_marks,
    calibration_set,
    load_images,
    logits_of,
    machine,
    parsed,
    read_lines,
    shown,
    unfinished,
)
from deploy_table import evaluated
from torch import Tensor
from torch.utils.data import TensorDataset

import dfq
from dfq.machine import this_machine
from dfq.onnx_export import export_network

Run = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    arguments = parse_arguments()
    lines = read_lines(arguments.results)
    if shown(arguments, lines, to_markdown, with_tables):
        return
    wanted = [{"recipe": "deploy", "seed": arguments.seed, "source": "natural"}]
    for name, model, (cell,) in unfinished(arguments, wanted, lines, ("model", "seed")):
        calibration, made = calibration_set(cell, model, arguments)
        images, labels = load_images(arguments.images, model, arguments.limit)
        with tempfile.TemporaryDirectory() as folder:
            rows = networks(model, calibration, arguments.bits, Path(folder))
            full = Replayed(model, logits_of(model, images))
            result = {
                row: fared(run, model, images, TensorDataset(images, labels), full) for row, (run, _) in rows.items()
            }
            for row, times in in_turns({row: run for row, (run, _) in rows.items()}, arguments).items():
                result[row] |= {"milliseconds": times, "quantize_seconds": rows[row][1]}
        line = cell | made | {"rows": result, "machine": machine(), "threads": torch.get_num_threads()}
        line |= {"instruction_sets": this_machine().instruction_sets, "repeats": arguments.repeats}
        line |= {"versions": {name: version(name) for name in ("openvino", "nncf", "torch", "timm")}}
        append(arguments.results, line)
        print(to_markdown([line]), flush=True)


def networks(
    model: dfq.Model, calibration: dfq.CalibrationSet, all_bits: list[str], folder: Path
) -> dict[str, tuple[Run, float]]:
    """By row: a network compiled by OpenVINO, and the seconds that quantizing it took."""
    import nncf

    core = openvino.Core()
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(torch.get_num_threads())}

    def compiled(network: openvino.Model) -> Run:
        request = core.compile_model(network, "CPU", config).create_infer_request()
        return lambda images: np.array(request.infer({0: images})[0])

    export_network(model, folder / "full.onnx")
    full = core.read_model(folder / "full.onnx")
    found = {"full precision": (compiled(full), 0.0)}
    batches = [pixels.numpy() for pixels, _ in calibration.batches(1, torch.device("cpu"))]
    started = time.monotonic()
    theirs = nncf.quantize(full, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches))
    found["NNCF int8"] = (compiled(theirs), time.monotonic() - started)
    for bits in all_bits:
        started = time.monotonic()
        quantized = dfq.quantize(model, bits, calibration=calibration, recipe="deploy", progress=False)
        seconds = time.monotonic() - started
        exported = dfq.export(quantized, folder / f"{bits}.onnx")
        found[f"dfq {bits.upper()}"] = (compiled(core.read_model(exported.path)), seconds)
    return found


def fared(run: Run, model: dfq.Model, images: Tensor, data: TensorDataset, full: Replayed) -> dict[str, Any]:
    """Accuracy beside full precision in PyTorch."""
    logits = torch.from_numpy(np.concatenate([run(batch.numpy()) for batch in torch.split(images, 16)]))
    result = evaluated(model, logits, data, full)
    return {key: result[key] for key in ("top1", "drop", "drop_ci95", "agreement", "logit_sqnr_db", "num_images")}


def in_turns(runs: dict[str, Run], arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median milliseconds of a pass, by row and batch size."""
    generator = np.random.default_rng(arguments.seed)
    times: dict[str, dict[str, float]] = {row: {} for row in runs}
    for size in arguments.batch_sizes:
        images = generator.standard_normal((size, 3, 224, 224), dtype=np.float32)
        seconds: dict[str, list[float]] = {row: [] for row in runs}
        for number in range(arguments.repeats + 2):
            for row, run in runs.items():
                started = time.perf_counter()
                run(images)
                if number > 1:  # The first passes lay out memory and choose kernels.
                    seconds[row].append(time.perf_counter() - started)
        for row, values in seconds.items():
            times[row][str(size)] = round(1000 * float(np.median(values)), 2)
    return times


def to_markdown(lines: list[dict[str, Any]]) -> str:
    """One table: a row for each model and network."""
    sizes = list(next(iter(lines[0]["rows"].values()))["milliseconds"])
    heads = ["model", "in OpenVINO", "drop, points", "same class as full precision", "SQNR, dB"]
    heads += [f"ms, batch {size}" for size in sizes]
    text = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for line in lines:
        for name, row in line["rows"].items():
            low, high = row["drop_ci95"]
            cells = [line["model"], name, f"{row['drop']:.1f} [{low:.1f}, {high:.1f}]", f"{row['agreement']:.1f} %"]
            cells += [f"{row['logit_sqnr_db']:.1f}", *(f"{row['milliseconds'][size]:.1f}" for size in sizes)]
            text.append(f"| {' | '.join(cells)} |")
    first = lines[0]
    sets = ", ".join(first["instruction_sets"] or ["instruction sets unknown"])
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    count = next(iter(first["rows"].values()))["num_images"]
    text.append(
        f"\n{first['calibration_images']} made images to calibrate both on, {count} photographs, seed {first['seed']}; "
        f"medians of {first['repeats']} passes in turns, {first['threads']} threads; {first['machine']} ({sets}); "
        f"{versions}.\n"
    )
    return "\n".join(text)


def with_tables(page: str, name: str, lines: list[dict[str, Any]]) -> str:
    """`page` with what stands between the marks for the results file `name` replaced by its table."""
    return between_marks(page, f"<!-- nncf: {name} -->\n", to_markdown(lines))


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__, results="nncf", images="labelled images to measure on")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w7a8"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--limit", type=int, metavar="N", help="measure on N of the images, evenly spaced")
    return parsed(parser)


if __name__ == "__main__":
    main()
