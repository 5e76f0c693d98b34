"""What tokens of one position have in common in all images, kept from rounding.

The first blocks of a ViT see the position embedding as well as the picture: much of the energy of what enters their
linears is the same in every image. It is a constant, so it takes no grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfq.ptq.capture import MeanOverImages, recording
from dfq.ptq.modules import PositionMean, QuantizedLinear
from dfq.ptq.sites import PlannedSite

# Of the energy of what enters the layer: what brings less is not worth its bytes, or is chance.
_LEAST_SHARE = 2e-3
# What fewer have in common says little of others.
_FEWEST_IMAGES = 4


def set_positions_apart(
    network: nn.Module, sites: Sequence[PlannedSite], inputs: Sequence[Any], run: Callable[[Any], Tensor]
) -> None:
    """Give linears of a stage in full precision a `PositionMean` where they have ranges per token; its function stays.

    The arguments are those of `means_of_positions`.
    """
    dynamic = [p for p in sites if p.settings.is_dynamic(p.bits)]
    for path, mean in means_of_positions(network, dynamic, inputs, run).items():
        linear(network, path).position_mean = mean


def means_of_positions(
    network: nn.Module, sites: Sequence[PlannedSite], inputs: Sequence[Any], run: Callable[[Any], Tensor]
) -> dict[str, PositionMean]:
    """What to keep apart in a stage in full precision where the recipe has a rank, whatever the bits; by linear's path.

    sites: those of the stage; inputs, run: what enters it, batch by batch, all positions of each image, and what it
    does with it. Of the mean over images [N, C], as much of the singular value decomposition is taken as the recipe's
    rank allows and as is worth it.
    """
    means = {
        p.site.owner: (MeanOverImages(), p.settings.position_rank)
        for p in sites
        if p.settings.position_rank and isinstance(network.get_submodule(p.site.owner), QuantizedLinear)
    }
    if not means:
        return {}
    with recording({linear(network, path).input: mean for path, (mean, _) in means.items()}):
        for batch in inputs:
            run(batch)
    found: dict[str, PositionMean] = {}
    for path, (mean, rank) in means.items():
        common = mean.values()
        # A classifier takes [B, C], what has become of all positions.
        if mean.num_images < _FEWEST_IMAGES or common.dim() != 2 or not bool(common.isfinite().all()):
            continue
        left, sizes, right = torch.linalg.svd(common, full_matrices=False)
        kept = int((sizes[:rank].square() >= _LEAST_SHARE * mean.energy()).sum())
        if kept:
            apart = PositionMean.of(left[:, :kept] * sizes[:kept], right[:kept], linear(network, path).weight)
            if all(bool(tensor.isfinite().all()) for tensor in apart.buffers()):  # float16 ends at 65,504.
                found[path] = apart
    return found


def linear(network: nn.Module, path: str) -> QuantizedLinear:
    """The linear of an adapted network at a path."""
    layer = network.get_submodule(path)
    assert isinstance(layer, QuantizedLinear)
    return layer
