"""What each part of the recipe `fast` brings, and tuning on top of it: KL and agreement on your images.

    python tools/recipe_parts.py --images photographs --model deit_tiny_patch16_224=deit_tiny.safetensors

The parts are added in turn, to rounding to nearest by squared error with a range per tensor (per head for q, k and v,
per output channel for weights; patch embedding and classifier at 8 bits throughout), and each is left out alone.
`PARTS` says what they are. The last one, reconstruction, is in `accurate` only: it is added to `fast` as it is there,
on the calibration images of `fast`, and tried in place of compensation ("tuned").

Ranges, images, KL and agreement are those of site_kinds.py, and so are lines and --markdown; --write FILE.md puts the
tables into a page, between `<!-- recipe parts: RESULTS.jsonl -->` and `<!-- end -->`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import site_kinds
from accuracy_table import between_marks

from dfq.recipe import DEFAULT_RECIPE, Recipe, load_recipe


def main() -> None:
    arguments = site_kinds.parse_arguments(__doc__, results="recipe-parts", bits=("w4a8", "w4a4"))
    site_kinds.measure(arguments, recipes(), to_markdown, with_tables)


def drop_from_sites(recipe: Recipe, key: str, *values: str) -> Recipe:
    """`recipe` without `key` in any of its sites, where it has one of `values` if there are any: as all others then."""
    sites = {
        pattern: {k: v for k, v in changes.items() if k != key or (values and v not in values)}
        for pattern, changes in recipe.sites.items()
    }
    return replace(recipe, sites={pattern: changes for pattern, changes in sites.items() if changes})


def no_grids(recipe: Recipe) -> Recipe:
    return drop_from_sites(drop_from_sites(recipe, "quantizer"), "split")


def no_outliers_apart(recipe: Recipe) -> Recipe:
    return drop_from_sites(recipe, "outliers")


def no_errors_that_count_differently(recipe: Recipe) -> Recipe:
    """Not those of exponentials: they go with `no_late_normalization`."""
    return drop_from_sites(replace(recipe, weights=replace(recipe.weights, range="mse")), "range", "token_mse")


def no_tokens_by_gradient(recipe: Recipe) -> Recipe:
    """Where ranges are found. In compensation and in tuning they stay: those are parts of their own."""
    return replace(recipe, activations=replace(recipe.activations, gradient=0.0))


def no_stretching(recipe: Recipe) -> Recipe:
    tuning = recipe.reconstruction
    return replace(recipe, stretch=0.0, reconstruction=tuning and replace(tuning, stretch=0.0))


def no_rescaled_channels(recipe: Recipe) -> Recipe:
    # Not the ranges per head: those need no moving.
    return drop_from_sites(replace(recipe, reparametrize=None), "granularity", "channel")


def no_means_of_positions(recipe: Recipe) -> Recipe:
    return drop_from_sites(recipe, "position_rank")


def no_ranges_per_token(recipe: Recipe) -> Recipe:
    # Means of positions are kept apart nowhere else.
    return drop_from_sites(no_means_of_positions(recipe), "dynamic_up_to")


def no_rotation(recipe: Recipe) -> Recipe:
    return replace(recipe, rotate=None)


def no_late_normalization(recipe: Recipe) -> Recipe:
    return drop_from_sites(replace(recipe, softmax="normalized"), "range", "probability_mse")


def no_compensation(recipe: Recipe) -> Recipe:
    return replace(recipe, compensation=None)


def no_reconstruction(recipe: Recipe) -> Recipe:
    return replace(recipe, reconstruction=None)


# In the order in which they are added. No two take out the same key with the same value, so that any can go without
# the others, and in any order; but means of positions go with ranges per token, and where channels are rotated none are
# rescaled: the rotation takes the place of that when it is added, and leaves it to it when it goes.
PARTS: dict[str, Callable[[Recipe], Recipe]] = {
    "grids": no_grids,
    "outliers apart": no_outliers_apart,
    "errors that count differently": no_errors_that_count_differently,
    "tokens by gradient": no_tokens_by_gradient,
    "stretching": no_stretching,
    "rescaled channels": no_rescaled_channels,
    "ranges per token": no_ranges_per_token,
    "means of positions": no_means_of_positions,
    "rotation": no_rotation,
    "late normalization": no_late_normalization,
    "compensation": no_compensation,
    "reconstruction": no_reconstruction,
}


def without(recipe: Recipe, parts: Iterable[str]) -> Recipe:
    for part in parts:
        recipe = PARTS[part](recipe)
    return recipe


def recipes() -> dict[tuple[str, str], Recipe]:
    """By kind and setting, as the rows of a table have them."""
    whole = replace(load_recipe(DEFAULT_RECIPE), reconstruction=load_recipe("accurate").reconstruction)
    parts = list(PARTS)
    in_turn = {"nothing": without(whole, parts)}
    in_turn |= {f"+ {part}": without(whole, parts[count:]) for count, part in enumerate(parts, 1)}
    # All of `fast` is the row "+ compensation".
    alone = {f"- {part}": without(whole, (part, "reconstruction")) for part in parts if part != "reconstruction"}
    alone["- compensation, tuned"] = without(whole, ["compensation"])
    rows = {"added in turn": in_turn, "left out alone": alone}
    return {(kind, setting): recipe for kind, settings in rows.items() for setting, recipe in settings.items()}


def to_markdown(lines: list[dict[str, Any]]) -> str:
    return site_kinds.to_markdown(lines, heads=(f"parts of `{DEFAULT_RECIPE}`", "recipe"))


def with_tables(page: str, name: str, lines: list[dict[str, Any]]) -> str:
    """`page` with what stands between the marks for the results file `name` replaced by its tables."""
    return between_marks(page, f"<!-- recipe parts: {name} -->\n", to_markdown(lines))


if __name__ == "__main__":
    main()
