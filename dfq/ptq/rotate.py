"""Channels mixed by rotations that cancel between the layers that give an activation and those that take it.

A rotation spreads what a few channels hold over all of them, so that ranges per tensor lose less to outliers, and it
costs nothing at run time (QuaRot, NeurIPS 2024, section 4; SliceGPT, ICLR 2024, section 3.2, for the layer norms).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from scipy.linalg import hadamard
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import LayerScale, VisionTransformer
from torch import Tensor, nn

from dfq.ptq.fitting import joined_tokens
from dfq.ptq.modules import (
    QuantizedAttention,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedWindowAttention,
)
from dfq.ptq.reparametrize import is_affine
from dfq.recipe_values import Rotation


@torch.no_grad()
def rotate(network: VisionTransformer | SwinTransformer, which: Rotation) -> set[str]:
    """Rotate, in place, the channels of an adapted network; its function stays, up to rounding in fp32.

    heads: q and k of every attention head by one rotation, its values by another; full: also the residual stream, of
    a ViT whose layers allow it (`_Stream.of`). Rotations are random and the same for equal shapes in equal places.
    Returns the paths of the linears that rotated channels enter.
    """
    generator = torch.Generator().manual_seed(0)
    takers: set[nn.Module] = set()
    for module in network.modules():
        if isinstance(module, QuantizedAttention | QuantizedWindowAttention):
            takers |= _rotate_heads(module, generator)
    stream = _Stream.of(network) if which == "full" else None
    if stream is not None:
        takers |= stream.rotate(generator)
    return {path for path, module in network.named_modules() if module in takers}


def _rotate_heads(
    attention: QuantizedAttention | QuantizedWindowAttention, generator: torch.Generator
) -> set[nn.Module]:
    """Scores take q k^T, in which a rotation of both cancels, the projection takes v, mixed over tokens only.

    Returns the projection where what it takes is rotated.
    """
    qkv, heads = attention.qkv, attention.num_heads
    width = qkv.weight.shape[0] // (3 * heads)
    plain_scores = True
    if isinstance(attention, QuantizedAttention):
        plain_scores = isinstance(attention.q_norm, nn.Identity) and isinstance(attention.k_norm, nn.Identity)
    same = torch.eye(width, dtype=torch.float64, device=qkv.weight.device)
    for head in range(heads):
        # Drawn whether used or not: what one layer cannot take changes nothing for the others.
        drawn = [rotation(width, generator).to(same.device) for _ in range(2)]
        scores = drawn[0] if plain_scores else same
        values = drawn[1] if attention.projects_what_is_mixed else same
        for part, turn in enumerate((scores, scores, values)):
            start = (part * heads + head) * width
            _rotate_outputs(qkv, turn, slice(start, start + width))
        taken = attention.proj.weight[:, head * width : (head + 1) * width]
        taken.copy_(taken.double() @ values.T)
    return {attention.proj} if attention.projects_what_is_mixed else set()


@dataclass(frozen=True)
class _Stream:
    """The residual stream of a ViT: what is added to it, and the norms through which it is read.

    givers: layers whose outputs are added to it, each with the LayerScale between, if any; tokens: learned tensors
    [..., D] that are; readers: the norms, each with the linears that take what it gives.
    """

    givers: list[tuple[QuantizedLayer, LayerScale | None]]
    tokens: list[nn.Parameter]
    readers: list[tuple[nn.LayerNorm, list[QuantizedLinear]]]

    @classmethod
    def of(cls, network: nn.Module) -> _Stream | None:
        """That of a `VisionTransformer` where every norm is a LayerNorm and in front of linears; None for others."""
        if not isinstance(network, VisionTransformer) or network.attn_pool is not None:
            return None
        vit: Any = network
        if vit.global_pool not in ("", "token", "avg"):  # A maximum over tokens does not turn with them.
            return None
        last, unused = (vit.norm, vit.fc_norm) if isinstance(vit.fc_norm, nn.Identity) else (vit.fc_norm, vit.norm)
        in_between = [vit.patch_embed.norm.module, vit.norm_pre, unused]
        heads = [head for head in (vit.head, getattr(vit, "head_dist", None)) if head is not None]
        givers: list[tuple[Any, Any]] = [(getattr(vit.patch_embed, "proj", None), None)]
        readers: list[tuple[Any, list[Any]]] = [(last, heads)]
        for block in vit.blocks:
            attention = block.attn
            readers.append((block.norm1, [attention.qkv, *([] if attention.gate is None else [attention.gate])]))
            readers.append((block.norm2, [block.mlp.fc1]))
            for layer, scale in ((attention.proj, block.ls1), (block.mlp.fc2, block.ls2)):
                givers.append((layer, None if isinstance(scale, nn.Identity) else scale))
        if not (
            all(isinstance(module, nn.Identity) for module in in_between)
            and all(isinstance(layer, QuantizedLayer) for layer, _ in givers)
            and all(scale is None or isinstance(scale, LayerScale) for _, scale in givers)
            and all(is_affine(norm) for norm, _ in readers)
            and all(isinstance(linear, QuantizedLinear) for _, takers in readers for linear in takers)
        ):
            return None
        learned = [vit.pos_embed, *joined_tokens(vit)]
        return cls(givers, [token for token in learned if token is not None], readers)

    def rotate(self, generator: torch.Generator) -> set[nn.Module]:
        """By a rotation that keeps the mean over channels, which the norms take away: so their results turn with it.

        Returns the linears that take those.
        """
        turn = rotation_of_differences(self.readers[0][0].normalized_shape[0], generator)
        for layer, scale in self.givers:
            if scale is not None:
                _scale_outputs(layer, scale.gamma)
                scale.gamma.fill_(1)
            _rotate_outputs(layer, turn)
        for token in self.tokens:
            token.copy_(token.double() @ turn.T.to(token.device))
        for norm, linears in self.readers:
            for linear in linears:
                moved = linear.weight @ norm.bias
                linear.bias = nn.Parameter(moved if linear.bias is None else linear.bias + moved, requires_grad=False)
                linear.weight = ((linear.weight * norm.weight).double() @ turn.T.to(moved.device)).float()
            norm.weight.fill_(1)
            norm.bias.zero_()
        return {linear for _, linears in self.readers for linear in linears}


def _scale_outputs(layer: QuantizedLayer, factors: Tensor) -> None:
    layer.weight.mul_(factors.view(-1, *[1] * (layer.weight.dim() - 1)))
    if layer.bias is not None:
        layer.bias.mul_(factors)


def _rotate_outputs(layer: QuantizedLayer, turn: Tensor, rows: slice = slice(None)) -> None:
    """Turn the outputs `rows` of a layer; turn: [R, R]."""
    turn = turn.to(layer.weight.device)
    for tensor in (layer.weight, layer.bias):
        if tensor is not None:
            part = tensor[rows].flatten(1) if tensor.dim() > 1 else tensor[rows].unsqueeze(1)
            tensor[rows] = (turn @ part.double()).view_as(tensor[rows]).to(tensor.dtype)


def rotation(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix [size, size], fp64: where there is one, a Hadamard matrix with random signs."""
    if size & (size - 1) == 0:
        signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
        spread: Tensor = torch.from_numpy(hadamard(size, dtype=float)) * signs / size**0.5
        return spread
    orthogonal, upper = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    drawn: Tensor = orthogonal * upper.diagonal().sign()  # Only then are all rotations equally likely.
    return drawn


def rotation_of_differences(size: int, generator: torch.Generator) -> Tensor:
    """The same, but for the vector of ones, which it leaves as it is; size: at least 2."""
    # A reflection that exchanges the ones' direction with the first axis; in between, all other axes are rotated.
    axis = torch.full((size,), size**-0.5, dtype=torch.float64)
    axis[0] -= 1
    reflection = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(axis, axis) / axis.square().sum()
    inner = torch.eye(size, dtype=torch.float64)
    inner[1:, 1:] = rotation(size - 1, generator)
    return reflection @ inner @ reflection
