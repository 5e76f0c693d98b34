"""How far the features of photographs lie from their mean, relative to those of made images, at the entry of blocks.

    python tools/feature_spread.py --images photographs --model vit_tiny_patch16_224=vit_tiny.safetensors

In full precision, by the root mean square distance over images, token by token; patches and class token apart, since
not all models read both. Above 1 photographs are spread further than the images of --source (as in accuracy_table.py).
Every model is one line of JSON in --results. In the end all lines are printed as a table; --markdown makes nothing and
prints it; --write FILE.md puts it into a page, between `<!-- feature spread: RESULTS.jsonl -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from typing import Any

import torch
from accuracy_table import (
    append,
    argument_parser,
    between_marks,
    calibration_set,
    machine,
    parsed,
    read_lines,
    shown,
    unfinished,
)
from torch import Tensor

import dfq
from dfq.ptq.modules import adapt
from dfq.ptq.stages import stages
from dfq.recipe import DEFAULT_RECIPE
from dfq.versions import versions

KEY = ("model", "source", "seed")


def main() -> None:
    arguments = parse_arguments()
    lines = read_lines(arguments.results)
    if shown(arguments, lines, to_markdown, with_tables):
        return
    source = f"{arguments.source}:{arguments.count}"
    wanted = [{"source": source, "seed": arguments.seed, "recipe": DEFAULT_RECIPE}]
    for _, model, (cell,) in unfinished(arguments, wanted, lines, KEY):
        made, how = calibration_set(cell, model, arguments)
        photographs = dfq.real_images(model, arguments.images, arguments.count, seed=arguments.seed)
        prefix = int(getattr(model.module, "num_prefix_tokens", 0))
        spreads = [list(spreads_of(model, images, prefix)) for images in (photographs, made)]
        ratios = [
            {part: one[part] / other[part] for part in one if other[part] > 0}
            for one, other in zip(*spreads, strict=True)
        ]
        line = cell | how | {"num_images": arguments.count, "ratios": ratios}
        append(
            arguments.results, line | {"machine": machine(), "threads": torch.get_num_threads(), "versions": versions()}
        )
    print(to_markdown(read_lines(arguments.results)))


@torch.inference_mode()
def spreads_of(model: dfq.Model, images: dfq.CalibrationSet, prefix: int) -> Iterator[dict[str, float]]:
    """At the entry of each block, how far the patches and the first of `prefix` other tokens lie from their means."""
    chain = stages(adapt(copy.deepcopy(model.module)))
    entering: list[Any] = list(images.batches(32, model.device))
    for stage in chain:
        if stage.name.startswith("blocks."):
            features = torch.cat(entering)
            parts = {"patches": features[:, prefix:]} | ({"class token": features[:, :1]} if prefix else {})
            yield {name: spread(tokens) for name, tokens in parts.items()}
        entering = [stage.run(batch) for batch in entering]


def spread(tokens: Tensor) -> float:
    """Root mean square distance from the mean over images: [M, N, D]."""
    return float((tokens - tokens.mean(0)).square().sum(-1).mean().sqrt())


def to_markdown(lines: list[dict[str, Any]]) -> str:
    """A row for each model and part, a column for every third block and the last."""
    blocks = len(lines[0]["ratios"]) if lines else 0
    columns = sorted({*range(0, blocks, 3), max(blocks - 1, 0)})
    text = [f"| entering block | | {' | '.join(map(str, columns))} |", "|---" * (len(columns) + 2) + "|"]
    for line in lines:
        for part in line["ratios"][-1]:
            # What all images share, as the class token before the first block, has no spread.
            cells = [f"{line['ratios'][at][part]:.2f}" if part in line["ratios"][at] else "" for at in columns]
            text.append(f"| {' | '.join([line['model'], part, *cells])} |")
    if lines:
        first = lines[0]
        text.append(
            f"\nOf {first['num_images']} photographs, relative to as many images of "
            f"`{first['source'].partition(':')[0]}`. Seed {first['seed']}; {first['machine']}; "
            f"{', '.join(f'{name} {version}' for name, version in first['versions'].items())}.\n"
        )
    return "\n".join(text)


def with_tables(page: str, name: str, lines: list[dict[str, Any]]) -> str:
    """`page` with what stands between the marks for the results file `name` replaced by its table."""
    return between_marks(page, f"<!-- feature spread: {name} -->\n", to_markdown(lines))


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__, results="feature-spread", images="a folder of photographs")
    parser.add_argument("--source", default="natural", help="as a source of accuracy_table.py (%(default)s)")
    parser.add_argument("--count", type=int, default=64, metavar="N", help="images of either kind (%(default)s)")
    return parsed(parser)


if __name__ == "__main__":
    main()
