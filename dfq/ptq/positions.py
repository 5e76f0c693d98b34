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


def set_positions_apart(
    network: nn.Module, sites: Sequence[PlannedSite], inputs: Sequence[Any], run: Callable[[Any], Tensor]
) -> None:
    """Give linears of a stage in full precision a `PositionMean` where the recipe says so; its function stays.

    sites: those of the stage; inputs, run: what enters it, batch by batch, all positions of each image, and what it
    does with it. Of the mean over images [N, C], as much of the singular value decomposition is taken as the recipe's
    rank allows and as is worth it.
    """
    means: dict[QuantizedLinear, tuple[MeanOverImages, int]] = {}
    for p in sites:
        if p.settings.position_rank and p.settings.is_dynamic(p.bits):
            layer = network.get_submodule(p.site.owner)
            if isinstance(layer, QuantizedLinear):
                means[layer] = MeanOverImages(), p.settings.position_rank
    if not means:
        return
    with recording({layer.input: mean for layer, (mean, _) in means.items()}):
        for batch in inputs:
            run(batch)
    for layer, (mean, rank) in means.items():
        found, energy = mean.values(), mean.energy()
        # A classifier takes [B, C], what has become of all positions.
        if found.dim() != 2 or not bool(found.isfinite().all()):
            continue
        left, sizes, right = torch.linalg.svd(found, full_matrices=False)
        worth = sizes[:rank].square() >= _LEAST_SHARE * energy
        kept = int(worth.sum())
        if kept:
            apart = PositionMean.of(left[:, :kept] * sizes[:kept], right[:kept], layer.weight)
            if all(bool(tensor.isfinite().all()) for tensor in apart.buffers()):  # float16 ends at 65,504.
                layer.position_mean = apart
