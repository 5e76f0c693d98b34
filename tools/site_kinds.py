"""What each way of quantizing one kind of tensor costs, all else in floating point: KL and agreement on your images.

    python tools/site_kinds.py --images photographs --model deit_tiny_patch16_224=deit_tiny.safetensors

A kind is, say, what softmax gives, in every block; `KINDS` lists them with the settings that are tried, as a recipe has
them. Ranges come from --source (as in accuracy_table.py), costs from --limit of the images, drawn by --seed: KL(full
precision || quantized) of the prediction in nats, and the share of equal answers. No labels are needed.

Every cell is one line of JSON in --results; cells that are there are not made again. In the end all tables are
printed; --markdown makes nothing and prints them; --write FILE.md puts them into a page, between
`<!-- site kinds: RESULTS.jsonl -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accuracy_table import (
    append,
    argument_parser,
    between_marks,
    calibration_set,
    calibration_text,
    machine,
    parsed,
    read_lines,
    shown,
    unfinished,
)
from torch import Tensor

import dfq
from dfq.ptq.probe import Cost
from dfq.recipe import DEFAULT_RECIPE, Recipe, recipe_from_dict
from dfq.versions import versions

KEY = ("model", "source", "bits", "seed", "kind", "setting")
MSE = {"range": "mse"}
# By kind: patterns of its sites, and settings by what a table calls them.
KINDS: dict[str, tuple[tuple[str, ...], dict[str, dict[str, Any]]]] = {
    "after softmax": (
        ("*blocks.*.attn.softmax",),
        {
            "uniform": MSE,
            "twin-uniform": {"quantizer": "twin_uniform", "split": "magnitude"},
            "log, base 2": {"quantizer": "log", "split": "magnitude", "base": "2"},
            "log, base sqrt 2": {"quantizer": "log", "split": "magnitude", "base": "sqrt2"},
            "log, base searched": {"quantizer": "log", "split": "magnitude"},
        },
    ),
    "after GELU": (
        ("*blocks.*.mlp.fc2.input",),
        {
            "uniform": MSE,
            "uniform, tokens weighted": {"range": "token_mse"},
            "twin-uniform, tokens weighted": {"quantizer": "twin_uniform", "split": "sign", "range": "token_mse"},
            "log, tokens weighted": {"quantizer": "log", "split": "sign", "range": "token_mse"},
            "log, outliers apart": {"quantizer": "log", "split": "sign", "range": "token_mse", "outliers": 20},
        },
    ),
    "after LayerNorm": (
        ("*.attn.qkv.input", "*.mlp.fc1.input"),
        {"per tensor": MSE, "per channel": MSE | {"granularity": "channel"}},
    ),
    "q, k and v": (
        ("*blocks.*.attn.[qkv]",),
        {"per tensor": MSE, "per head": MSE | {"granularity": "head"}},
    ),
    "weights of blocks": (
        ("*blocks.*.weight",),
        {
            "symmetric, squared error": MSE | {"granularity": "channel", "symmetric": True},
            "affine, squared error": MSE | {"granularity": "channel"},
            "affine, output error": {"range": "output_mse", "granularity": "channel"},
        },
    ),
}


def main() -> None:
    recipes = {(kind, setting): alone(kind, setting) for kind, (_, settings) in KINDS.items() for setting in settings}
    measure(parse_arguments(), recipes, to_markdown, with_tables)


def measure(
    arguments: argparse.Namespace,
    recipes: Mapping[tuple[str, str], Recipe],
    to_markdown: Callable[[list[dict[str, Any]]], str],
    with_tables: Callable[[str, str, list[dict[str, Any]]], str],
) -> None:
    """Do what the arguments of `parse_arguments` ask for, with a recipe for each kind and setting of it."""
    lines = read_lines(arguments.results)
    if shown(arguments, lines, to_markdown, with_tables):
        return
    common = {"source": arguments.source, "seed": arguments.seed, "recipe": DEFAULT_RECIPE}
    wanted = [
        common | {"bits": bits, "kind": kind, "setting": setting}
        for bits in arguments.bits
        for kind, setting in recipes
    ]
    for name, model, missing in unfinished(arguments, wanted, lines, KEY):
        images = dfq.real_images(model, arguments.images, arguments.limit, seed=arguments.seed)
        reference = logits_of(model, images)
        calibration, made = calibration_set(missing[0], model, arguments)
        for cell in missing:
            recipe = recipes[cell["kind"], cell["setting"]]
            quantized = dfq.quantize(model, cell["bits"], calibration=calibration, recipe=recipe)
            cost = Cost.of(reference, logits_of(quantized, images))
            line = cell | made | {"kl": cost.kl, "agreement": 100 - cost.changed, "num_images": len(images)}
            line |= {"machine": machine(), "threads": torch.get_num_threads(), "versions": versions()}
            append(arguments.results, line)
            print(f"{name} {cell['bits']} {cell['kind']}, {cell['setting']}: KL {cost.kl:.4f}", flush=True)
    print(to_markdown(read_lines(arguments.results)))


def alone(kind: str, setting: str) -> Recipe:
    """The recipe that quantizes this kind of site in this way, and nothing else."""
    patterns, settings = KINDS[kind]
    off = {"quantize": False}
    sites = {pattern: {"quantize": True, **settings[setting]} for pattern in patterns}
    return recipe_from_dict({"weights": off, "activations": off, "sites": sites}, name=setting, where=kind)


def logits_of(model: Any, images: dfq.CalibrationSet) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(batch) for batch, _ in images.batches(50, model.device)])


def to_markdown(lines: list[dict[str, Any]], heads: tuple[str, str] = ("tensors", "quantizer")) -> str:
    """One table per model: a row for each setting of each kind, `heads` above them, a column for each pair of bits."""
    blocks = []
    for model in dict.fromkeys(line["model"] for line in lines):
        own = [line for line in lines if line["model"] == model]
        first = own[0]
        columns = list(dict.fromkeys(line["bits"] for line in own))
        blocks.append(
            f"**{model}**, ranges from {calibration_text(first)}: KL to full precision in nats and share of equal "
            f"answers on {first['num_images']} photographs.\n"
        )
        blocks.append(f"| {' | '.join([*heads, *map(str.upper, columns)])} |")
        blocks.append("|---" * (len(columns) + 2) + "|")
        for kind, setting in dict.fromkeys((line["kind"], line["setting"]) for line in own):
            row = {line["bits"]: line for line in own if (line["kind"], line["setting"]) == (kind, setting)}
            cells = [f"{row[b]['kl']:.3f}; {row[b]['agreement']:.1f} %" if b in row else "-" for b in columns]
            blocks.append(f"| {' | '.join([kind, setting, *cells])} |")
        blocks.append(
            f"\nSeed {first['seed']}; {first['machine']}, {first['threads']} of them used; "
            f"{', '.join(f'{name} {version}' for name, version in first['versions'].items())}.\n"
        )
    return "\n".join(blocks)


def with_tables(page: str, name: str, lines: list[dict[str, Any]]) -> str:
    """`page` with what stands between the marks for the results file `name` replaced by its tables."""
    return between_marks(page, f"<!-- site kinds: {name} -->\n", to_markdown(lines))


def parse_arguments(
    description: str | None = __doc__, *, results: str = "site-kinds", bits: Sequence[str] = ("w4a4",)
) -> argparse.Namespace:
    """results: the folder below runs/; bits: where none are given."""
    parser = argument_parser(description, results=results, images="a folder of images to measure on")
    parser.add_argument("--source", default="natural", help="as a source of accuracy_table.py (%(default)s)")
    parser.add_argument("--bits", nargs="+", default=list(bits))
    parser.add_argument("--limit", type=int, default=150, metavar="N", help="measure on N of the images (%(default)s)")
    return parsed(parser)


if __name__ == "__main__":
    main()
