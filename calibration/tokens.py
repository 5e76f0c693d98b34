"""Sparse tokens: running a ViT on some of its patches.

timm's `VisionTransformer.forward_features` calls `self.patch_drop` right after the position embedding, which is
where SMI (arXiv 2510.27186, section 3) drops patches. A module put into that slot gathers the kept tokens; no line
of timm is touched, and a dropped patch costs nothing in any block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from calibration.errors import DfqError


@dataclass(frozen=True)
class PatchGrid:
    """The patches of one image: `rows` x `columns`, each `height` x `width` pixels; patch 0 is top left."""

    rows: int
    columns: int
    height: int
    width: int

    @classmethod
    def of(cls, vit: nn.Module) -> PatchGrid:
        """The grid of any model with a timm patch embedding, hierarchical ones (Swin) included."""
        patch_embed: Any = vit.patch_embed
        rows, columns = patch_embed.grid_size
        height, width = patch_embed.patch_size
        return cls(rows, columns, height, width)

    @classmethod
    def tiling(cls, images: Tensor, mask: Tensor) -> PatchGrid:
        """That of images [B, C, H, W] whose patches a mask [B, rows, columns] counts."""
        rows, columns = mask.shape[1:]
        return cls(rows, columns, images.shape[2] // rows, images.shape[3] // columns)

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

    def patches_of(self, images: Tensor) -> Tensor:
        """images: [B, C, H, W] -> view [B, rows, columns, C, height, width], no copy."""
        shape = (*images.shape[:2], self.rows, self.height, self.columns, self.width)
        return images.view(shape).permute(0, 2, 4, 1, 3, 5)


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


class _TakePatches(torch.autograd.Function):
    """The pixels of some patches. Its gradient is written, not added up: no pixel lies in two patches."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, keep: Tensor, grid: PatchGrid) -> Tensor:
        """images: [B, C, H, W], keep: [B, K], no patch twice -> [B, K, C, height, width]."""
        ctx.save_for_backward(keep)
        ctx.grid, ctx.shape = grid, images.shape
        return grid.patches_of(images)[_places(keep, grid)]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        whole = gradients[0].new_zeros(ctx.shape)
        ctx.grid.patches_of(whole)[_places(keep, ctx.grid)] = gradients[0]
        return whole, None, None


def _places(keep: Tensor, grid: PatchGrid) -> tuple[Tensor, Tensor, Tensor]:
    image = torch.arange(keep.shape[0], device=keep.device).unsqueeze(1)
    return image, keep // grid.columns, keep % grid.columns


class PatchProjection(nn.Module):
    """A patch embedding's convolution as the matrix product it is, and for the patches in play alone.

    The convolution steps by whole patches; as a product its gradient to the pixels takes a fraction of the time on a
    CPU. Patches that are out of play come out as 0. dtype: of the product.
    """

    def __init__(self, convolution: nn.Conv2d, grid: PatchGrid, gather: TokenGather | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.convolution = convolution
        self._grid, self._dtype = grid, dtype
        # In a tuple, so that the module does not become a submodule of two.
        self._gather = (gather,)

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, C, H, W] -> [B, D, rows, columns]."""
        grid, gather = self._grid, self._gather[0]
        keep = None if gather is None else gather.keep
        if keep is None:
            # Cast first: then the pixels are put in order and cast in one go.
            pixels = grid.patches_of(images).to(self._dtype).flatten(3).flatten(1, 2)
            tokens = self._project(pixels)
        else:
            kept = self._project(_TakePatches.apply(images, keep, grid).to(self._dtype).flatten(2))
            whole = kept.new_zeros(len(images), grid.num_patches, kept.shape[-1])
            tokens = whole.scatter(1, keep.unsqueeze(-1).expand_as(kept), kept)
        return tokens.transpose(1, 2).view(len(images), -1, grid.rows, grid.columns)

    def _project(self, pixels: Tensor) -> Tensor:
        weight, bias = self.convolution.weight.flatten(1), self.convolution.bias
        return F.linear(pixels, weight.to(self._dtype), None if bias is None else bias.to(self._dtype))


@contextmanager
def token_gather(vit: VisionTransformer) -> Iterator[TokenGather]:
    """While it is open, `vit` sees only the patches in `.keep` of what it yields."""
    if not isinstance(getattr(vit, "patch_drop", None), nn.Module):
        raise DfqError(
            f"{type(vit).__name__} has no patch_drop slot, so it cannot run on some of its patches: "
            "use a dense method for it"
        )
    slot = vit.patch_drop
    gather = TokenGather(vit.num_prefix_tokens)
    vit.patch_drop = gather
    try:
        yield gather
    finally:
        vit.patch_drop = slot


@contextmanager
def patch_projection(vit: nn.Module, gather: TokenGather | None, dtype: torch.dtype) -> Iterator[None]:
    """While it is open, `vit` embeds patches by matrix products in `dtype`, and no others than `gather` keeps.

    A patch embedding of another kind than a convolution by whole patches is left as it is.
    """
    patch_embed: Any = vit.patch_embed
    convolution = getattr(patch_embed, "proj", None)
    if not (
        type(patch_embed) is PatchEmbed
        and type(convolution) is nn.Conv2d
        and convolution.kernel_size == convolution.stride == tuple(patch_embed.patch_size)
        and (convolution.padding, convolution.groups, convolution.dilation) == ((0, 0), 1, (1, 1))
    ):
        yield
        return
    patch_embed.proj = PatchProjection(convolution, PatchGrid.of(vit), gather, dtype)
    try:
        yield
    finally:
        patch_embed.proj = convolution
