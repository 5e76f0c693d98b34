"""What quantizing each site costs: how far the logits move when it is the only one that is quantized.

Every cost is that of rounding to nearest. What an engine then does against it (reparametrisation, compensation,
reconstruction) is left out: the question is where precision is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration import CalibrationSet, load_calibration_set
from dfq.errors import UsageError
from dfq.models import Model
from dfq.ptq.probe import Cost, Probe, Trial
from dfq.recipe import DEFAULT_RECIPE, Recipe, load_recipe, parse_bits

NUM_IMAGES = 16

KINDS = {
    "weight": "weights",
    "input": "inputs of layers",
    "attention": "q, k, v and attention maps",
    "other": "outputs, sums and embeddings",
}
"""What sorts of tensors sites are, in words."""

_KIND_OF_SLOT = {"weight": "weight", "input": "input"} | dict.fromkeys(
    ("q", "k", "v", "scores", "softmax"), "attention"
)


@dataclass(frozen=True)
class SiteCost:
    """A site, its bits, and what they cost while all else is in full precision."""

    name: str
    bits: int
    cost: Cost

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return _KIND_OF_SLOT.get(self.name.rpartition(".")[2], "other")


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` found on `num_images` images that `method` made.

    sites: each alone, in the order of the network; together: all of them at once.
    """

    model: str
    bits: str
    recipe: str
    num_images: int
    method: str
    sites: tuple[SiteCost, ...]
    together: Cost

    @property
    def kl(self) -> float:
        """Sum over the sites: the KL of the whole model, were their errors small and independent."""
        return sum(site.cost.kl for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "model": self.model,
            "bits": self.bits,
            "recipe": self.recipe,
            "num_images": self.num_images,
            "method": self.method,
            "kl_sum": self.kl,
            "together": cost_to_dict(self.together),
            "sites": [
                {"name": site.name, "kind": site.kind, "bits": site.bits, **cost_to_dict(site.cost)}
                for site in self.sites
            ],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Sensitivity:
        """What `to_dict` gave. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            model=str(content["model"]),
            bits=str(content["bits"]),
            recipe=str(content["recipe"]),
            num_images=int(content["num_images"]),
            method=str(content["method"]),
            sites=tuple(SiteCost(str(s["name"]), int(s["bits"]), _cost_of(s)) for s in content["sites"]),
            together=_cost_of(content["together"]),
        )

    def describe(self) -> str:
        """One line for people: what was measured on what."""
        return f"{self.model}  {self.bits}  recipe {self.recipe}  {self.num_images} images ({self.method})"

    def table(self, limit: int = 20) -> str:
        """The `limit` costliest sites, then sums by kind: aligned plain text, without a newline at the end."""
        costliest = sorted(self.sites, key=lambda site: site.cost.kl, reverse=True)[:limit]
        rows = [("site, alone", "bits", "KL, nats", "SQNR, dB")]
        rows += [(site.name, str(site.bits), *_numbers(site.cost)) for site in costliest]
        if len(self.sites) > limit:
            rows.append((f"and {len(self.sites) - limit} that cost less", "", "", ""))
        rows.append(("", "", "", ""))
        for kind, what in KINDS.items():
            costs = [site.cost.kl for site in self.sites if site.kind == kind]
            if costs:
                rows.append((f"{what} ({len(costs)})", "", f"{sum(costs):.2e}", ""))
        rows.append(("sum", "", f"{self.kl:.2e}", ""))
        rows.append(("all at once, measured", "", *_numbers(self.together)))
        return "\n".join([self.describe(), *aligned(rows)])


def sensitivity(
    model: Model,
    bits: str = "w4a4",
    *,
    calibration: CalibrationSet | Path | str | None = None,
    recipe: Recipe | Path | str = DEFAULT_RECIPE,
    num_images: int = NUM_IMAGES,
    batch_size: int = 16,
    progress: bool = True,
) -> Sensitivity:
    """What each site that the recipe quantizes costs alone; the model itself is left as it is.

    bits, recipe: as for `quantize`. calibration: a set, or the folder of one, whose first `num_images` images are used;
    None inverts the model for as many now. Ranges are found and costs are measured on the same images.

    Raises DfqError as `quantize` does.
    """
    probe = make_probe(model, bits, calibration, recipe, num_images, batch_size)
    return summarize(probe, probe.costs(site_trials(probe).values(), progress=progress))


def make_probe(
    model: Model,
    bits: str,
    calibration: CalibrationSet | Path | str | None,
    recipe: Recipe | Path | str,
    num_images: int,
    batch_size: int,
) -> Probe:
    """See `sensitivity` for the arguments."""
    if num_images < 1:
        raise UsageError(f"the number of images is {num_images}; it must be 1 or more")
    widths = parse_bits(bits)
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if calibration is None:
        from dfq.generation import generate

        calibration = generate(model, num_images=num_images)
    images = calibration if isinstance(calibration, CalibrationSet) else load_calibration_set(calibration)
    return Probe(model, widths, chosen, images.first(num_images), batch_size)


def site_trials(probe: Probe) -> dict[str, Trial]:
    """For each planned site by name, it alone."""
    return {p.site.name: ((p.site.name, p.bits),) for p in probe.planned}


def summarize(probe: Probe, costs: Mapping[Trial, Cost]) -> Sensitivity:
    """costs: at least of every site alone; what they cost together is measured now."""
    trials = site_trials(probe)
    return Sensitivity(
        model=probe.model,
        bits=str(probe.bits),
        recipe=probe.recipe.name,
        num_images=len(probe.images),
        method=str(probe.images.run.get("method", "unknown")),
        sites=tuple(SiteCost(p.site.name, p.bits, costs[trials[p.site.name]]) for p in probe.planned),
        together=probe.cost(tuple((p.site.name, p.bits) for p in probe.planned)),
    )


def cost_to_dict(cost: Cost) -> dict[str, float | None]:
    """JSON has no infinity: `sqnr_db` is None (null) where the logits are identical."""
    sqnr = cost.sqnr_db if math.isfinite(cost.sqnr_db) else None
    return {"kl": cost.kl, "sqnr_db": sqnr, "changed": cost.changed}


def _cost_of(content: Mapping[str, Any]) -> Cost:
    sqnr = content["sqnr_db"]
    return Cost(float(content["kl"]), math.inf if sqnr is None else float(sqnr), float(content["changed"]))


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines


def _numbers(cost: Cost) -> tuple[str, str]:
    return f"{cost.kl:.2e}", f"{cost.sqnr_db:.1f}" if math.isfinite(cost.sqnr_db) else "identical"
