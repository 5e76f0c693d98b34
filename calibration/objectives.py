"""What inversion minimises: a weighted sum of terms over one step of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Step:
    """What a term may look at.

    images: [B, 3, H, W], normalised, not augmented; logits: [B, C] of the augmented images; labels: [B].
    """

    images: Tensor
    logits: Tensor
    labels: Tensor


# A term gives a value per image [B], or one for the whole batch [] where it is not a sum over images.
Term = Callable[[Step], Tensor]


def cross_entropy(step: Step) -> Tensor:
    """Cross-entropy to the wanted labels: [B]."""
    return F.cross_entropy(step.logits.float(), step.labels, reduction="none")


def total_variation(step: Step) -> Tensor:
    """Sum of the Frobenius norms of the horizontal, vertical and both diagonal differences, whole batch: [].

    DeepInversion (Yin et al., CVPR 2020, eq. 3), as used by SMI: on the unaugmented pixels of the whole image,
    patches that have stopped included.
    """
    x = step.images
    differences = (
        x[..., :, :-1] - x[..., :, 1:],
        x[..., :-1, :] - x[..., 1:, :],
        x[..., :-1, :-1] - x[..., 1:, 1:],
        x[..., :-1, 1:] - x[..., 1:, :-1],
    )
    return torch.stack([difference.norm() for difference in differences]).sum()


TERMS: dict[str, Term] = {"cross_entropy": cross_entropy, "total_variation": total_variation}


@dataclass(frozen=True)
class Objective:
    """sum of weight * term; `weights` maps names in `TERMS` to their weights."""

    weights: dict[str, float] = field(default_factory=lambda: {"cross_entropy": 1.0, "total_variation": 1e-4})

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(TERMS))
        if unknown:
            raise ValueError(f"unknown objective {unknown[0]!r}: choose from {', '.join(TERMS)}")

    def __call__(self, step: Step) -> tuple[Tensor, Tensor]:
        """(loss [], score [B]): the score ranks iterates of one image, by the terms that are its own."""
        loss = step.images.new_zeros(())
        score = step.images.new_zeros(step.images.shape[0])
        for name, weight in self.weights.items():
            value = TERMS[name](step)
            loss = loss + weight * value.mean()
            if value.dim():
                score = score + weight * value.detach()
        return loss, score

    def describe(self) -> dict[str, Any]:
        return dict(self.weights)
