"""Patch schedules: which patches are inverted, and when that is decided.

A schedule decides at the start of an iteration, from the patches still in play and a saliency score for each. It
holds no state, so one schedule serves any number of batches, under any objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class PatchSchedule(Protocol):
    """What the inversion loop asks of a schedule."""

    @property
    def decisions(self) -> tuple[int, ...]:
        """Iterations, from 0, at which patches are chosen; ascending."""
        ...

    def choose(self, keep: Tensor, scores: Tensor) -> Tensor:
        """keep: [B, K] patches in play, scores: [B, K] their saliency -> [B, K'], those that stay."""
        ...

    def describe(self) -> dict[str, Any]:
        """Name and parameters, for the manifest."""
        ...


@dataclass(frozen=True)
class Dense:
    """Every patch, all the time (DeepInversion; 'DMI' in the SMI paper)."""

    decisions: tuple[int, ...] = ()

    def choose(self, keep: Tensor, scores: Tensor) -> Tensor:
        return keep

    def describe(self) -> dict[str, Any]:
        return {"name": "dense"}


@dataclass(frozen=True)
class ProgressiveStop:
    """Sparse model inversion: the least attended patches stop for good (SMI, arXiv 2510.27186, section 3.2).

    iterations: when patches stop; ratio: the share of the patches still in play that stops each time, so that
    `int(remaining * (1 - ratio))` stay. The defaults are the published ones: 196 patches become 137, 95, 66, 46.
    """

    iterations: tuple[int, ...] = (50, 100, 200, 300)
    ratio: float = 0.3

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio < 1.0:
            raise ValueError(f"the ratio of patches that stop must lie in [0, 1), not {self.ratio}")
        if list(self.iterations) != sorted(set(self.iterations)) or (self.iterations and self.iterations[0] < 0):
            raise ValueError(f"the iterations at which patches stop must ascend from 0 or later, not {self.iterations}")

    @property
    def decisions(self) -> tuple[int, ...]:
        return self.iterations

    def choose(self, keep: Tensor, scores: Tensor) -> Tensor:
        count = max(1, int(keep.shape[1] * (1.0 - self.ratio)))
        best = scores.topk(count, dim=1).indices
        return keep.gather(1, best).sort(dim=1).values

    def describe(self) -> dict[str, Any]:
        return {"name": "progressive_stop", "iterations": list(self.iterations), "ratio": self.ratio}
