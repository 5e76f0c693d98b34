"""A linear classifier in closed form, from what a teacher makes of images that nobody took."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Level = Literal["origin", "pool"]


def classifier_of(features: Tensor, logits: Tensor, shrinkage: float, level: Level) -> tuple[Tensor, Tensor]:
    """Weight [C, F] and bias [C] with the least squared error to `logits`, as far as they are not common to all images.

    features: [P, F] of the student; logits: [P, C] of the teacher, whose classes' mean is taken off. Both are centred
    over the P pictures: made images have more in common with each other than with photographs, and all of it would be
    learned. shrinkage: added to the second moment of the features, as a share of its mean diagonal.

    level: where all classes are to be equally likely. `origin`: where the features are zero. A LayerNorm in front of
    the classifier leaves the mean over the images that a student was pretrained on near it, and the mean of made images
    elsewhere; the bias is zero. `pool`: at the mean of these features, but for what the mean of `logits` says, which is
    ordinary ridge regression.
    """
    features, logits = features.double(), logits.double()
    logits = logits - logits.mean(1, keepdim=True)
    mean, common = features.mean(0), logits.mean(0)
    features, logits = features - mean, logits - common
    moment = features.T @ features
    # Fewer pictures than features leave directions that nothing is known of, whatever the shrinkage.
    added = (max(shrinkage, 1e-6) * moment.diagonal().mean()).clamp(min=torch.finfo(torch.float32).tiny)
    moment.diagonal().add_(added)
    weight = torch.linalg.solve(moment, features.T @ logits).T
    bias = torch.zeros_like(common) if level == "origin" else common - weight @ mean
    return weight.float(), bias.float()


def ends_in_layer_norm(network: nn.Module) -> bool:
    """Whether the last normalisation of a classifier is a LayerNorm: its features can have any sign."""
    norms = [module for module in network.modules() if "Norm" in type(module).__name__]
    return bool(norms) and isinstance(norms[-1], nn.LayerNorm)
