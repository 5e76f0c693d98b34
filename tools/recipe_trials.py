"""What a change of a recipe does: KL on your images, and how far it is from that of the recipe as it is.

    python tools/recipe_trials.py --images photographs --model vit_tiny_patch16_224=vit_tiny.safetensors \\
        --recipe accurate --bits w4a4 --trials "static ranges" "no stretching"

A trial is the recipe with one of `CHANGES`. It and the recipe are given the same calibration images (--source, as in
accuracy_table.py; as many as the recipe asks for) and are measured on the same photographs, so that the difference of
their KL(full precision || quantized) is known better than either: its standard error is that of the mean over pairs.
No labels are needed.

Every trial is one line of JSON in --results; lines that are there are not made again, whatever has become of the recipe
since: it is known by its name. What the recipe as it is costs
on each image lies beside them. In the end all tables are printed; --markdown makes nothing and prints them; --write
FILE.md puts them into a page, between `<!-- recipe trials: RESULTS.jsonl -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import recipe_parts
import site_kinds
import torch
from accuracy_table import (
    append,
    argument_parser,
    between_marks,
    calibration_set,
    calibration_text,
    machine,
    machines,
    parsed,
    read_lines,
    shown,
    unfinished,
)
from torch import Tensor

import dfq
from dfq.ptq.probe import Cost
from dfq.recipe import Recipe, Reconstruction, load_recipe
from dfq.statistics import divergence
from dfq.versions import versions

KEY = ("model", "source", "recipe", "bits", "seed", "trial")
AS_IT_IS = "as it is"


def tuning_of(recipe: Recipe) -> Reconstruction:
    """Raises SystemExit where no blocks are tuned."""
    if recipe.reconstruction is None:
        raise SystemExit(f"the recipe {recipe.name} tunes no blocks: nothing of that can be tried otherwise")
    return recipe.reconstruction


def tuned(recipe: Recipe, **changes: Any) -> Recipe:
    """Blocks tuned with other settings."""
    return replace(recipe, reconstruction=replace(tuning_of(recipe), **changes))


def steps(recipe: Recipe, times: int) -> Recipe:
    return tuned(recipe, iterations=times * tuning_of(recipe).iterations)


def where_ranges_are_per_token(recipe: Recipe, **settings: int) -> Recipe:
    """Further settings for the sites that have ranges per token."""
    sites = {
        pattern: changes | (settings if "dynamic_up_to" in changes else {}) for pattern, changes in recipe.sites.items()
    }
    return replace(recipe, sites=sites)


CHANGES: dict[str, Callable[[Recipe], Recipe]] = {
    AS_IT_IS: lambda recipe: recipe,
    "static ranges": recipe_parts.no_ranges_per_token,
    "ranges per token at 8 bits too": lambda recipe: where_ranges_are_per_token(recipe, dynamic_up_to=8),
    "static ranges at 8 bits": lambda recipe: where_ranges_are_per_token(recipe, dynamic_up_to=7),
    "no means of positions": recipe_parts.no_means_of_positions,
    "tokens alike where ranges are found": recipe_parts.no_tokens_by_gradient,
    "tokens alike in tuning": lambda recipe: tuned(recipe, gradient=0.0),
    "no stretching": recipe_parts.no_stretching,
    "ranges not stretched": lambda recipe: replace(recipe, stretch=0.0),
    "tuning not stretched": lambda recipe: tuned(recipe, stretch=0.0),
    "twice the steps": lambda recipe: steps(recipe, 2),
    "three times the steps": lambda recipe: steps(recipe, 3),
    "four times the steps": lambda recipe: steps(recipe, 4),
    "no rotation": recipe_parts.no_rotation,
    "channels rescaled too": lambda recipe: replace(recipe, reparametrize="searched"),
    "no compensation": recipe_parts.no_compensation,
    "kept patches alone": lambda recipe: replace(recipe, background="none"),
    "weights in groups of 64": lambda recipe: recipe.grouped(64),
    "weights in groups of 32": lambda recipe: recipe.grouped(32),
}


def main() -> None:
    arguments = parse_arguments()
    lines = read_lines(arguments.results)
    if shown(arguments, lines, to_markdown, with_tables):
        return
    recipe = load_recipe(arguments.recipe)
    for name in arguments.trials:
        if name != AS_IT_IS and CHANGES[name](recipe) == recipe:
            raise SystemExit(f"{name!r} changes nothing in the recipe {recipe.name}: there is nothing to try")
    common = {"source": arguments.source, "seed": arguments.seed, "recipe": recipe.name}
    trials = [AS_IT_IS, *(name for name in arguments.trials if name != AS_IT_IS)]
    wanted = [common | {"bits": bits, "trial": trial} for bits in arguments.bits for trial in trials]
    for _, model, missing in unfinished(arguments, wanted, lines, KEY):
        images = dfq.real_images(model, arguments.images, arguments.limit, seed=arguments.seed)
        reference = site_kinds.logits_of(model, images)
        calibration, made = calibration_set(missing[0], model, arguments)
        for cell in missing:
            started = time.monotonic()
            quantized = dfq.quantize(
                model, cell["bits"], calibration=calibration, recipe=CHANGES[cell["trial"]](recipe)
            )
            seconds = time.monotonic() - started
            logits = site_kinds.logits_of(quantized, images)
            costs = divergence(logits.double(), reference.double())
            usual = arguments.results.parent / ("-".join(str(cell[part]) for part in KEY if part != "trial") + ".pt")
            if cell["trial"] == AS_IT_IS:
                usual.parent.mkdir(parents=True, exist_ok=True)
                torch.save(costs, usual)
            cost = Cost.of(reference, logits)
            line = cell | made | {"kl": cost.kl, "agreement": 100 - cost.changed, "num_images": len(images)}
            line |= paired(costs, torch.load(usual)) | {"quantize_seconds": round(seconds, 1)}
            line |= {"machine": machine(), "threads": torch.get_num_threads(), "versions": versions()}
            append(arguments.results, line)
            print(to_markdown([line]), flush=True)
    print(to_markdown(read_lines(arguments.results)))


def paired(costs: Tensor, usual: Tensor) -> dict[str, float]:
    """By how much the mean of `costs` is above that of `usual`, and its standard error: [M] of the same images."""
    if len(costs) != len(usual):
        raise SystemExit(f"the recipe as it is was measured on {len(usual)} images, not {len(costs)}: other --results")
    differences = costs - usual
    return {
        "difference": differences.mean().item(),
        "standard_error": (differences.std() / math.sqrt(len(costs))).item(),
    }


def to_markdown(lines: list[dict[str, Any]]) -> str:
    """One table per model: a row for each trial."""
    blocks = []
    for model in dict.fromkeys(line["model"] for line in lines):
        own = [line for line in lines if line["model"] == model]
        blocks.append(f"**{model}**, KL to full precision in nats on {own[0]['num_images']} photographs.\n")
        blocks.append("| recipe | bits | images | tried | KL | beside the recipe | same answer | seconds |")
        blocks.append("|---" * 8 + "|")
        for line in own:
            cells = [f"`{line['recipe']}`", line["bits"].upper(), calibration_text(line), line["trial"]]
            difference = f"{line['difference']:+.4f} ± {line['standard_error']:.4f}"
            cells += [f"{line['kl']:.4f}", "" if line["trial"] == AS_IT_IS else difference]
            cells += [f"{line['agreement']:.1f} %", f"{line['quantize_seconds']:.0f}"]
            blocks.append(f"| {' | '.join(cells)} |")
        first = own[0]
        blocks.append(
            f"\n±: standard error over pairs of images. Seed {first['seed']}; {machines(own)}, {first['threads']} "
            f"of them used; {', '.join(f'{name} {version}' for name, version in first['versions'].items())}.\n"
        )
    return "\n".join(blocks)


def with_tables(page: str, name: str, lines: list[dict[str, Any]]) -> str:
    """`page` with what stands between the marks for the results file `name` replaced by its tables."""
    return between_marks(page, f"<!-- recipe trials: {name} -->\n", to_markdown(lines))


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__, results="recipe-trials", images="a folder of images to measure on")
    parser.add_argument("--source", default="natural", help="as a source of accuracy_table.py (%(default)s)")
    parser.add_argument("--recipe", default="fast", help="a preset or a file (%(default)s)")
    parser.add_argument("--bits", nargs="+", default=["w4a4"])
    parser.add_argument(
        "--trials", nargs="+", default=[], choices=list(CHANGES), metavar="TRIAL", help="; ".join(CHANGES)
    )
    parser.add_argument("--limit", type=int, default=1000, metavar="N", help="measure on N of the images (%(default)s)")
    return parsed(parser)


if __name__ == "__main__":
    main()
