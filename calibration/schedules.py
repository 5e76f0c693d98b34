"""Patch schedules: which patches are inverted, and when that is decided.

A schedule decides at the start of an iteration, from the patches still in play and a saliency score for each. It
holds no state, so one schedule serves any number of batches, under any objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Choice(NamedTuple):
    """stay: [B, K'], the patches that stay in play; finished: [B, E], those that leave as images of their own."""

    stay: Tensor
    finished: Tensor | None = None


class PatchSchedule(Protocol):
    """What the inversion loop asks of a schedule."""

    @property
    def images_per_canvas(self) -> int:
        """How many images come of one optimised canvas."""
        ...

    def decisions(self, iterations: int) -> tuple[int, ...]:
        """Iterations, from 0, at which patches are chosen in a run of so many; ascending, all within the run."""
        ...

    def choose(self, keep: Tensor, scores: Tensor, decision: int) -> Choice:
        """keep: [B, K] patches in play, scores: [B, K] their saliency; decision: its number, from 0."""
        ...

    def describe(self) -> dict[str, Any]:
        """Name and parameters, for the manifest."""
        ...


@dataclass(frozen=True)
class Dense:
    """Every patch, all the time (DeepInversion; 'DMI' in the SMI paper)."""

    @property
    def images_per_canvas(self) -> int:
        return 1

    def decisions(self, iterations: int) -> tuple[int, ...]:
        return ()

    def choose(self, keep: Tensor, scores: Tensor, decision: int) -> Choice:
        return Choice(keep)

    def describe(self) -> dict[str, Any]:
        return {"name": "dense"}


PUBLISHED_ITERATIONS = 4000
PUBLISHED_STOPS = (50, 100, 200, 300)


@dataclass(frozen=True)
class ProgressiveStop:
    """Sparse model inversion: the least attended patches stop for good (SMI, arXiv 2510.27186, section 3.2).

    stops: iterations at which patches stop, or None for the published 50, 100, 200 and 300 of 4,000 in proportion to
    the length of the run: kept where they are, most of a short run would be dense. ratio: the share of the patches
    still in play that stops each time, so that `int(remaining * (1 - ratio))` stay: of 196 patches 137, 95, 66, 46.
    """

    stops: tuple[int, ...] | None = None
    ratio: float = 0.3

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"the ratio of patches that stop must lie in [0, 1), not {self.ratio}")
        stops = list(self.stops or ())
        if stops != sorted(set(stops)) or (stops and stops[0] < 0):
            raise ValueError(f"the iterations at which patches stop must ascend from 0 or later, not {self.stops}")

    @property
    def images_per_canvas(self) -> int:
        return 1

    @property
    def num_stops(self) -> int:
        """How often patches stop in a run that is long enough."""
        return len(PUBLISHED_STOPS if self.stops is None else self.stops)

    def decisions(self, iterations: int) -> tuple[int, ...]:
        stops = list(self.stops or ())
        if self.stops is None:
            for published in PUBLISHED_STOPS:
                # At least one step before each: a map of untouched noise says nothing about an image.
                earliest = stops[-1] + 1 if stops else 1
                stops.append(max(earliest, round(published * iterations / PUBLISHED_ITERATIONS)))
        return tuple(stop for stop in stops if stop < iterations)

    def choose(self, keep: Tensor, scores: Tensor, decision: int) -> Choice:
        # Rounded before it is cut off: 100 * (1 - 0.9) is a little less than 10 in floating point.
        count = max(1, int(round(keep.shape[1] * (1.0 - self.ratio), 6)))
        best = scores.topk(count, dim=1).indices
        return Choice(keep.gather(1, best).sort(dim=1).values)

    def describe(self) -> dict[str, Any]:
        stops = "in proportion" if self.stops is None else list(self.stops)
        return {"name": "progressive_stop", "stops": stops, "ratio": self.ratio}


@dataclass(frozen=True)
class Rebirth:
    """Patch rebirth inversion: `division` sparse images of one canvas (PRI, arXiv 2509.23235).

    After each `division`-th part of the run the most attended share of the patches in play leaves as a finished image;
    the others go on, and grow what the finished ones had. The last share leaves at the end.
    """

    division: int = 4

    def __post_init__(self) -> None:
        if self.division < 1:
            raise ValueError(f"a canvas is divided into at least 1 image, not {self.division}")

    @property
    def images_per_canvas(self) -> int:
        return self.division

    def decisions(self, iterations: int) -> tuple[int, ...]:
        part = iterations // self.division
        if part == 0 and self.division > 1:
            raise ValueError(f"{iterations} iterations cannot be divided into {self.division} parts")
        return tuple(part * number for number in range(1, self.division))

    def choose(self, keep: Tensor, scores: Tensor, decision: int) -> Choice:
        # An equal share for each image still to come, whatever the remainder.
        count = keep.shape[1] // (self.division - decision)
        if count == 0:
            raise ValueError(f"{keep.shape[1]} patches cannot be divided into {self.division - decision} images")
        order = scores.argsort(dim=1, descending=True, stable=True)
        ranked = keep.gather(1, order)
        finished, stay = ranked.tensor_split([count], dim=1)
        return Choice(stay.sort(dim=1).values, finished.sort(dim=1).values)

    def describe(self) -> dict[str, Any]:
        return {"name": "rebirth", "division": self.division}
