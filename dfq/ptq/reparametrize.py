"""Channels rescaled where it costs nothing at run time: in the layer that gives them and the layer that takes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfq.ptq.modules import (
    QuantizedAttention,
    QuantizedBlock,
    QuantizedLinear,
    QuantizedPatchMerging,
    QuantizedSwinBlock,
    QuantizedWindowAttention,
)


@dataclass(frozen=True)
class Exchange:
    """A giver and the takers of one activation [..., C], between which each channel's scale and offset can be moved.

    site: the name of the activation's site; takers: the linears it enters, by their paths; norm: the LayerNorm that
    gives it, or None where it is the mixed values of an attention; values: then the linear of q, k and v, whose last
    third gives it; takes_offset: not where values are mixed, with rounded probabilities whose sum is not quite 1, nor
    where windows are padded with zeros.
    """

    site: str
    takers: dict[str, QuantizedLinear]
    norm: nn.LayerNorm | None = None
    values: QuantizedLinear | None = None
    takes_offset: bool = False

    @torch.no_grad()
    def rescale(self, ratio: Tensor, offset: Tensor) -> None:
        """Have x / ratio + offset pass where x passed; the function of the network stays (RepQ-ViT, ICCV 2023, 3.2).

        ratio: [C], positive; offset: [C], zero unless `takes_offset`.
        """
        if self.norm is not None:
            self.norm.weight.div_(ratio)
            self.norm.bias.div_(ratio).add_(offset)
        elif self.values is not None:
            third = len(ratio)
            self.values.weight[-third:] /= ratio[:, None]
            if self.values.bias is not None:
                self.values.bias[-third:] /= ratio
        for linear in self.takers.values():
            # W x = W diag(r) (x' - d), x' = x / r + d.
            linear.weight = linear.weight * ratio
            if bool(offset.any()):
                lost = linear.weight @ offset
                bias = -lost if linear.bias is None else linear.bias - lost
                linear.bias = nn.Parameter(bias, requires_grad=False)


def exchanges(path: str, stage: nn.Module) -> Iterator[Exchange]:
    """Those within the module of a stage, `path` its name. Norms without scale and offset of their own have none."""
    blocks: Any = stage
    if isinstance(stage, QuantizedBlock | QuantizedSwinBlock):
        attention, mlp = blocks.attn, blocks.mlp
        gate = getattr(attention, "gate", None)
        if is_affine(blocks.norm1) and (gate is None or isinstance(gate, QuantizedLinear)):
            takers = {f"{path}.attn.qkv": attention.qkv}
            if gate is not None:
                takers[f"{path}.attn.gate"] = gate
            windowed = isinstance(stage, QuantizedSwinBlock)
            yield Exchange(f"{path}.attn.qkv.input", takers, norm=blocks.norm1, takes_offset=not windowed)
        plain = isinstance(attention, QuantizedWindowAttention) or (
            isinstance(attention, QuantizedAttention) and isinstance(attention.norm, nn.Identity)
        )
        if plain:
            yield Exchange(f"{path}.attn.proj.input", {f"{path}.attn.proj": attention.proj}, values=attention.qkv)
        if is_affine(blocks.norm2) and isinstance(mlp.fc1, QuantizedLinear):
            yield Exchange(f"{path}.mlp.fc1.input", {f"{path}.mlp.fc1": mlp.fc1}, norm=blocks.norm2, takes_offset=True)
    elif isinstance(stage, QuantizedPatchMerging) and is_affine(stage.norm):
        yield Exchange(
            f"{path}.reduction.input", {f"{path}.reduction": blocks.reduction}, norm=blocks.norm, takes_offset=True
        )


def is_affine(norm: nn.Module) -> bool:
    """Whether it is a LayerNorm with a scale and an offset of its own."""
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def equalizing(scale: Tensor, centre: Tensor, strength: float, *, offset: bool) -> tuple[Tensor, Tensor]:
    """How to rescale channels so that one grid serves them better: ratio [C] and offset [C], see `Exchange.rescale`.

    scale, centre: [C], the step of each channel's own grid and the middle of its range. At strength 1 all ranges
    become equally wide (RepQ-ViT), at 0 they stay as wide as they are; with `offset` their middles meet.
    """
    ratio = (scale / scale.mean()) ** strength
    middle = centre / ratio
    return ratio, middle.mean() - middle if offset else torch.zeros_like(middle)
