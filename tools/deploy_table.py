"""Exported models in onnxruntime and OpenVINO against the quantized model they were exported from.

    python tools/deploy_table.py --images imagenet/val --threads 1 \\
        --model deit_tiny_patch16_224=deit_tiny.safetensors --model vit_tiny_patch16_224=vit_tiny.safetensors

For every model and --bits one line of JSON in --results: accuracy of the quantized folder and of the exported file in
both runtimes on the same images, how often each gives the class that the folder gives, products computed in integers,
and bytes. Lines that are there are not made again. Calibrated on generated images, which lie beside --results.
--markdown prints the table of all lines; --write FILE.md puts it into a page, between
`<!-- deployed: RESULTS.jsonl -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from accuracy_table import (
    BATCH,
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
from torch import Tensor
from torch.utils.data import TensorDataset

import dfq
from dfq.machine import this_machine
from dfq.runtime import RUNTIMES, integer_products

KEY = ("model", "recipe", "bits", "seed")


def main() -> None:
    arguments = parse_arguments()
    lines = read_lines(arguments.results)
    if shown(arguments, lines, to_markdown, with_tables):
        return
    wanted = [
        {"recipe": arguments.recipe, "bits": bits, "seed": arguments.seed, "source": "natural"}
        for bits in arguments.bits
    ]
    for name, model, missing in unfinished(arguments, wanted, lines, KEY):
        images, labels = load_images(arguments.images, model, arguments.limit)
        data = TensorDataset(images, labels)
        full = Replayed(model, logits_of(model, images))
        for cell in missing:
            calibration, made = calibration_set(cell, model, arguments)
            quantized = dfq.quantize(model, cell["bits"], calibration=calibration, recipe=cell["recipe"])
            with tempfile.TemporaryDirectory() as folder:
                measured = deployed(quantized, Path(folder), images, data, full)
            line = cell | made | measured
            line |= {"model": name, "machine": machine(), "instruction_sets": this_machine().instruction_sets}
            line |= {"threads": torch.get_num_threads()}
            append(arguments.results, line)
            print(to_markdown([line]), flush=True)


def deployed(
    quantized: dfq.QuantizedModel, folder: Path, images: Tensor, data: TensorDataset, full: Replayed
) -> dict[str, Any]:
    """One model saved, exported and run: bytes, and by where it ran, how it fared."""
    dfq.save(quantized, folder / "quantized")
    exported = dfq.export(quantized, folder / "model.onnx")
    wide = dfq.export(quantized, folder / "wide.onnx", int4=False)
    threads = torch.get_num_threads()
    models: dict[str, Any] = {"dfq": quantized}
    models |= {name: dfq.open_model(exported.path, name, threads=threads) for name in RUNTIMES}
    logits = {name: logits_of(model, images) for name, model in models.items()}
    rows, versions = {}, {}
    for name, model in models.items():
        result = evaluated(model, logits[name], data, full)
        beside = evaluated(model, logits[name], data, Replayed(quantized, logits["dfq"]))
        versions |= result["versions"]
        rows[name] = {key: result[key] for key in ("top1", "drop", "drop_ci95", "baseline_top1", "num_images")}
        rows[name] |= {"agreement_with_dfq": beside["agreement"], "sqnr_with_dfq_db": beside["logit_sqnr_db"]}
        if name in RUNTIMES:
            rows[name]["products"] = integer_products(model).describe()
            in_bytes = integer_products(dfq.open_model(wide.path, name, threads=threads))
            rows[name]["products_int8_weights"] = in_bytes.describe()
    saved = sum(path.stat().st_size for path in (folder / "quantized").iterdir())
    sizes = {"folder_bytes": saved, "onnx_bytes": exported.size, "onnx_int8_weights_bytes": wide.size}
    return {"where": rows, "check": exported.agreement.__dict__, "versions": versions} | sizes


def evaluated(model: Any, logits: Tensor, data: TensorDataset, baseline: Replayed) -> dict[str, Any]:
    """`Evaluation.to_dict` of a model whose logits are known."""
    again = Replayed(baseline.model, baseline.logits)
    return dfq.evaluate(Replayed(model, logits), data, baseline=again, batch_size=BATCH).to_dict()


def to_markdown(lines: list[dict[str, Any]]) -> str:
    """One table: a row for each model, bits and place."""
    text = ["| model | bits | MB | in | drop, points | the class `dfq evaluate` gives | products |", "|---" * 7 + "|"]
    for line in lines:
        for number, (where, row) in enumerate(line["where"].items()):
            low, high = row["drop_ci95"]
            drop = f"{row['drop']:.1f} [{low:.1f}, {high:.1f}]"
            size = line["onnx_bytes"] if number else line["folder_bytes"]
            name = "the folder" if where == "dfq" else where
            agreement = "" if where == "dfq" else f"{row['agreement_with_dfq']:.1f} %"
            cells = [f"{size / 1e6:.2f}", name, drop, agreement, row.get("products", "")]
            text.append(f"| {' | '.join([line['model'], line['bits'].upper(), *cells])} |")
    first = lines[0]
    row = next(iter(first["where"].values()))
    sets = ", ".join(first["instruction_sets"] or ["instruction sets unknown"])
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    text.append(
        f"\nRecipe `{first['recipe']}`, {first['calibration_images']} made images, {row['num_images']} photographs, "
        f"seed {first['seed']}. {first['machine']} ({sets}), {first['threads']} threads; {versions}.\n"
    )
    return "\n".join(text)


def with_tables(page: str, name: str, lines: list[dict[str, Any]]) -> str:
    """`page` with what stands between the marks for the results file `name` replaced by its table."""
    return between_marks(page, f"<!-- deployed: {name} -->\n", to_markdown(lines))


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__, results="deploy", images="labelled images to measure on")
    parser.add_argument("--recipe", default="deploy")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w7a8", "w4a8"])
    parser.add_argument("--limit", type=int, metavar="N", help="measure on N of the images, evenly spaced")
    return parsed(parser)


if __name__ == "__main__":
    main()
