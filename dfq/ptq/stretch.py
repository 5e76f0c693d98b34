"""What enters a stage, moved away from its mean: made images lie closer together than photographs do."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor


def away(tokens: Tensor, mean: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """What to add to tokens [B, ..., D] to move each image's away from `mean` [..., D].

    By a share of their distance from it that is drawn for each image, evenly from 0 to `most`.
    """
    share = most * torch.rand(len(tokens), *[1] * mean.dim(), generator=generator).to(tokens.device)
    return share * (tokens - mean)


def stretched(batches: Sequence[Tensor], most: float, stage: str) -> list[Tensor]:
    """What enters a stage, batch by batch, moved away from the mean of its batch; drawn for this stage alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(stage.encode()))
    return [tokens + away(tokens, tokens.mean(0), most, generator) for tokens in batches]
