"""Sparse tokens: running a ViT on some of its patches.

timm's `VisionTransformer.forward_features` calls `self.patch_drop` right after the position embedding, which is
where SMI (arXiv 2510.27186, section 3) drops patches. A module put into that slot gathers the kept tokens; no line
of timm is touched, and a dropped patch costs nothing in any block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from calibration.errors import DfqError


@dataclass(frozen=True)
class PatchGrid:
    """The patches of one image: `rows` x `columns`, each `height` x `width` pixels; patch 0 is top left."""

    rows: int
    columns: int
    height: int
    width: int

    @classmethod
    def of(cls, vit: VisionTransformer) -> PatchGrid:
        rows, columns = vit.patch_embed.grid_size
        height, width = vit.patch_embed.patch_size
        return cls(rows, columns, height, width)

    @property
    def num_patches(self) -> int:
        return self.rows * self.columns

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.rows * self.height, self.columns * self.width

    def mask_of(self, keep: Tensor) -> Tensor:
        """keep: [B, K] patch indices -> mask: bool [B, rows, columns], True where kept."""
        mask = torch.zeros(keep.shape[0], self.num_patches, dtype=torch.bool, device=keep.device)
        return mask.scatter_(1, keep, True).view(-1, self.rows, self.columns)

    def to_pixels(self, mask: Tensor) -> Tensor:
        """mask: bool [B, rows, columns] -> bool [B, 1, H, W], every pixel of a kept patch True."""
        return mask.repeat_interleave(self.height, -2).repeat_interleave(self.width, -1).unsqueeze(1)


def keep_of_mask(mask: Tensor) -> Tensor:
    """mask: bool [B, rows, columns], the same number of patches in every image -> keep: [B, K], ascending.

    Raises ValueError where images keep different numbers of patches: they cannot share a batch.
    """
    flat = mask.flatten(1)
    counts = flat.sum(1)
    if not bool((counts == counts[0]).all()):
        raise ValueError(f"images of one batch keep {int(counts.min())} to {int(counts.max())} patches")
    return flat.nonzero()[:, 1].view(flat.shape[0], int(counts[0]))


class TokenGather(nn.Module):
    """Gathers `keep` out of the patch tokens, prefix tokens untouched; all tokens pass where `keep` is None."""

    def __init__(self, num_prefix_tokens: int) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.keep: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [B, P + N, D] -> [B, P + K, D], P prefix tokens."""
        if self.keep is None:
            return tokens
        prefix, patches = tokens.tensor_split([self.num_prefix_tokens], dim=1)
        index = self.keep.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
        return torch.cat([prefix, patches.gather(1, index)], dim=1)


@contextmanager
def token_gather(vit: VisionTransformer) -> Iterator[TokenGather]:
    """While it is open, `vit` sees only the patches in `.keep` of what it yields."""
    if not isinstance(getattr(vit, "patch_drop", None), nn.Module):
        raise DfqError(f"{type(vit).__name__} has no patch_drop slot, so it cannot run on some of its patches")
    slot = vit.patch_drop
    gather = TokenGather(vit.num_prefix_tokens)
    vit.patch_drop = gather
    try:
        yield gather
    finally:
        vit.patch_drop = slot
