"""Mixed precision: how many bits each layer gets, so that a small model loses as little as it can.

What every layer costs at each width is measured on calibration images, one layer at a time. Which widths to take is an
integer program, as in HAWQ-V3 (Yao et al., ICML 2021): one width per layer, the summed cost minimised within a size, or
the size within a cost. To second order, costs of independent errors add.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from calibration import CalibrationSet
from calibration.files import replace_file
from dfq.errors import DfqError, UsageError
from dfq.models import Model
from dfq.ptq.layer_costs import WIDTHS, LayerCosts, layer_costs
from dfq.ptq.probe import Cost
from dfq.ptq.sensitivity import NUM_IMAGES, aligned, cost_to_dict
from dfq.ptq.sites import plan_sites
from dfq.recipe import DEFAULT_RECIPE, Recipe

POINTS_PER_NAT = 20.0
"""Points of accuracy lost per nat of KL; `MixedPrecision.drop` has the reasons."""


@dataclass(frozen=True)
class MixedPrecision:
    """Bits of each layer, as `mixed_precision` chose them.

    costs: what they were chosen from; bits: by layer; recipe: the base recipe with these bits; measured: what the whole
    model then costs, on the same images.
    """

    costs: LayerCosts
    target: str
    bits: dict[str, int]
    recipe: Recipe
    measured: Cost

    @property
    def kl(self) -> float:
        """Predicted for the whole model: the sum of what its sites and layers cost alone."""
        return self.costs.other_kl + sum(layer.costs[self.bits[layer.name]] for layer in self.costs.layers)

    @property
    def drop(self) -> float:
        """The drop in accuracy that `kl` makes likely, in points, where the images stand for those of the task.

        A rule of thumb. Suppose that the model's probabilities are right, and let two classes compete whose logits
        differ by m >= 0, m of density f near 0, with noise of variance s on m. Then p = sigmoid(m) gives a KL of
        f s / 4, the integral of f s p (1 - p) / 2; and answers that change, those whose noise exceeds m, lose 2 p - 1,
        about m / 2, of accuracy: f s / 8 in all. Half of the KL is lost, 50 points per nat. Noise on the many other
        classes adds to the KL only: white noise on all logits costs DeiT-Tiny 13 to 15 and ViT-Tiny 17 to 25 points per
        nat on photographs, from 0.005 to 0.4 nats alike.
        """
        return POINTS_PER_NAT * self.kl

    @property
    def weight_bytes(self) -> int:
        """Of the quantized model, as `QuantizedModel.weight_bytes` counts them."""
        return self.costs.other_bytes + sum(layer.sizes[self.bits[layer.name]] for layer in self.costs.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "target": self.target,
            "weight_bytes": self.weight_bytes,
            "kl_predicted": self.kl,
            "drop_predicted": self.drop,
            "measured": cost_to_dict(self.measured),
            "layers": [
                {
                    "name": layer.name,
                    "bits": self.bits[layer.name],
                    "options": [
                        {"bits": bits, "kl": kl, "bytes": layer.sizes[bits]} for bits, kl in layer.costs.items()
                    ],
                }
                for layer in self.costs.layers
            ],
            "sensitivity": self.costs.sensitivity.to_dict(),
        }

    def table(self) -> str:
        """Bits per layer, then size and cost: aligned plain text, without a newline at the end."""
        rows = [("layer", "bits", "kB", "KL, nats")]
        for layer in self.costs.layers:
            bits = self.bits[layer.name]
            rows.append((layer.name, str(bits), f"{layer.sizes[bits] / 1e3:.1f}", f"{layer.costs[bits]:.2e}"))
        rows.append(("all else", "", f"{self.costs.other_bytes / 1e3:.1f}", f"{self.costs.other_kl:.2e}"))
        rows.append(("sum", "", f"{self.weight_bytes / 1e3:.1f}", f"{self.kl:.2e}"))
        counts = Counter(self.bits.values())
        largest = self.costs.largest_bytes
        return "\n".join(
            [
                self.costs.sensitivity.describe(),
                *aligned(rows),
                "",
                f"target     {self.target}",
                f"layers     {', '.join(f'{counts[bits]} at {bits} bits' for bits in sorted(counts))}",
                f"size       {self.weight_bytes / 1e6:.2f} MB, {self.weight_bytes / largest:.0%} of the "
                f"{largest / 1e6:.2f} MB with {max(WIDTHS)} bits in each",
                f"predicted  KL {self.kl:.2e}, about {self.drop:.1f} points of accuracy, by rounding to nearest alone",
                f"measured   KL {self.measured.kl:.2e} all at once, {self.measured.changed:.0f} % of the images change "
                "class",
            ]
        )


def mixed_precision(
    model: Model,
    bits: str = "w4a4",
    *,
    target_size: float | None = None,
    target_drop: float | None = None,
    calibration: CalibrationSet | Path | str | None = None,
    recipe: Recipe | Path | str = DEFAULT_RECIPE,
    num_images: int = NUM_IMAGES,
    batch_size: int = 16,
    progress: bool = True,
) -> MixedPrecision:
    """Choose 4, 6 or 8 bits for every layer whose bits the recipe leaves to the run; `quantize` takes the result.

    Exactly one target is given. target_size: of the quantized model, in bytes, or up to 1 as a share of its size with
    8 bits in all these layers; the predicted KL is made as small as it can be. target_drop: of the whole model, in
    points; its size is made as small as it can be, and `MixedPrecision.drop` says what the prediction is worth.

    bits: of everything else; where activations have fewer than 8, the input of a layer gets the bits of its weights.
    The other arguments are those of `sensitivity`.

    Raises DfqError as `quantize` does, and where the target cannot be met.
    """
    _check_target(target_size, target_drop)
    costs = layer_costs(
        model,
        bits,
        calibration=calibration,
        recipe=recipe,
        num_images=num_images,
        batch_size=batch_size,
        progress=progress,
    )
    return choose_bits(costs, target_size=target_size, target_drop=target_drop)


def choose_bits(
    costs: LayerCosts, *, target_size: float | None = None, target_drop: float | None = None
) -> MixedPrecision:
    """`mixed_precision` on costs that have been measured: another target takes no more than a moment."""
    _check_target(target_size, target_drop)
    table = np.array([[layer.costs[width] for width in WIDTHS] for layer in costs.layers])
    sizes = np.array([[layer.sizes[width] for width in WIDTHS] for layer in costs.layers])
    if target_drop is not None:
        target = f"a predicted drop of at most {target_drop:g} points"
        picked = assign(table, sizes, max_cost=target_drop / POINTS_PER_NAT - costs.other_kl)
        if picked is None:
            raise DfqError(
                f"the predicted drop is {POINTS_PER_NAT * (costs.other_kl + table.min(1).sum()):.2f} points at least, "
                f"{POINTS_PER_NAT * costs.other_kl:.2f} of them for what is not to be chosen, and the target is "
                f"{target_drop:g}: allow a larger drop, or activations of more bits"
            )
    else:
        assert target_size is not None
        limit = target_size * costs.largest_bytes if target_size <= 1 else target_size
        target = f"a size of at most {limit / 1e6:.2f} MB"
        picked = assign(table, sizes, max_size=limit - costs.other_bytes)
        if picked is None:
            smallest = costs.other_bytes + int(sizes.min(1).sum())
            raise DfqError(
                f"the target is {limit / 1e6:.2f} MB, and at its smallest the model still takes "
                f"{smallest / 1e6:.2f} MB, {smallest / costs.largest_bytes:.0%} of its size with {max(WIDTHS)}; allow "
                "that much"
            )
    chosen = {layer.name: WIDTHS[index] for layer, index in zip(costs.layers, picked.tolist(), strict=True)}
    probe = costs.probe
    recipe = with_bits(probe.recipe, {site: chosen[layer.name] for layer in costs.layers for site in layer.sites})
    planned = plan_sites(probe.module, recipe, probe.bits)
    return MixedPrecision(
        costs=costs,
        target=target,
        bits=chosen,
        recipe=replace(recipe, summary=f"{recipe.summary}; bits of layers chosen for {probe.model}, {target}"),
        measured=probe.cost(tuple((p.site.name, p.bits) for p in planned)),
    )


def assign(
    costs: NDArray[np.float64],
    sizes: NDArray[np.int64],
    *,
    max_size: float | None = None,
    max_cost: float | None = None,
) -> NDArray[np.intp] | None:
    """One option per item: the cheapest within `max_size`, or the smallest within `max_cost` (of these the cheapest).

    costs, sizes: [items, options], not negative -> the index of each item's option [items], or None where the limit is
    not to be met.
    """
    if max_size is None:
        if max_cost is None:
            raise ValueError("give max_size or max_cost")
        smallest = _solve(sizes, costs, max_cost)
        if smallest is None:
            return None
        max_size = float(np.take_along_axis(sizes, smallest[:, None], 1).sum())
    return _solve(costs, sizes, max_size)


def _solve(objective: NDArray[Any], limited: NDArray[Any], limit: float) -> NDArray[np.intp] | None:
    """The option of each item that makes the sum of `objective` least, that of `limited` being at most `limit`."""
    if limited.min(1).sum() > limit:
        return None
    items, options = objective.shape
    # The solver's tolerances are absolute: to it, costs of 1e-7 would all be alike.
    unit = max(objective.max() / 1e6, np.finfo(np.float64).tiny)
    limited_unit = max(limited.max() / 1e3, np.finfo(np.float64).tiny)
    found = milp(
        objective.ravel() / unit,
        integrality=np.ones(items * options),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(np.kron(np.eye(items), np.ones(options)), 1, 1),
            LinearConstraint(limited.ravel() / limited_unit, ub=limit / limited_unit),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise RuntimeError(f"the integer program was not solved: {found.message}")
    picked: NDArray[np.intp] = found.x.reshape(items, options).argmax(1)
    return picked


def _check_target(target_size: float | None, target_drop: float | None) -> None:
    """Raise UsageError unless exactly one is given, and is a positive number."""
    if (target_size is None) == (target_drop is None):
        raise UsageError("give either a target size or a target drop")
    for what, value in (("size", target_size), ("drop", target_drop)):
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"the target {what} must be a positive number, not {value:g}")


def with_bits(recipe: Recipe, bits: Mapping[str, int]) -> Recipe:
    """The recipe with bits of single sites, by name."""
    sites = {name: dict(changes) for name, changes in recipe.sites.items()}
    for name, width in bits.items():
        sites[name] = sites.get(name, {}) | {"bits": width}
    return replace(recipe, name=f"{recipe.name}-mixed", sites=sites)


def recipe_to_toml(recipe: Recipe) -> str:
    """A recipe as the TOML file that `load_recipe` reads."""
    return "\n\n".join(_toml_tables(recipe.to_dict(), ())) + "\n"


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a file for `load_recipe`. Raises DfqError where it cannot be written."""
    text = recipe_to_toml(recipe)
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _toml_tables(content: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    tables = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    plain = [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in content.items() if key not in tables]
    if plain or (path and not tables):
        yield "\n".join([f"[{'.'.join(map(_toml_key, path))}]"] * bool(path) + plain)
    for key, table in tables.items():
        yield from _toml_tables(table, (*path, key))


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    """Booleans, numbers, strings and lists are written alike in TOML and JSON (but for DEL, which JSON lets stand)."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
