"""Quantized stand-ins for the layers of a timm ViT.

Each takes over the parameters of the layer it replaces and has *slots*: submodules through which one tensor passes,
`nn.Identity` until a fitted quantizer takes the place. A slot's dotted path is the name of its site.
"""

from __future__ import annotations

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from dfq.errors import DfqError
from quantizers import Quantizer


class QuantizedLayer(nn.Module):
    """What linear and convolution share: slots for input and output, and weights that become integers."""

    weight: Tensor
    integers: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight.detach().clone(), persistent=False)
        self.register_buffer("integers", None, persistent=False)
        self.bias = layer.bias
        self.input: nn.Module = nn.Identity()
        self.output: nn.Module = nn.Identity()
        self.weight_quantizer: Quantizer | None = None

    def set_integers(self, quantizer: Quantizer, integers: Tensor) -> None:
        """Replace the weights by what `integers`, of the weights' shape, stand for under `quantizer`."""
        self.weight_quantizer = quantizer
        self.integers = integers
        self.weight = quantizer.dequantize(integers)


class QuantizedLinear(QuantizedLayer):
    """`nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        out: Tensor = self.output(F.linear(self.input(x), self.weight, self.bias))
        return out


class QuantizedConv2d(QuantizedLayer):
    """`nn.Conv2d`, as the patch embedding uses it."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        self.stride, self.padding = layer.stride, layer.padding
        self.dilation, self.groups = layer.dilation, layer.groups

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, in, H, W] -> [B, out, H', W']."""
        y = F.conv2d(self.input(x), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        out: Tensor = self.output(y)
        return out


class QuantizedAttention(nn.Module):
    """timm's `Attention`, with slots on the operands of both matrix products: q, k, scores, softmax, v."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.scale = attention.scale
        self.qkv = attention.qkv
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.norm = getattr(attention, "norm", nn.Identity())
        self.gate = getattr(attention, "gate", None)
        self.proj = attention.proj
        self.q: nn.Module = nn.Identity()
        self.k: nn.Module = nn.Identity()
        self.v: nn.Module = nn.Identity()
        self.scores: nn.Module = nn.Identity()
        self.softmax: nn.Module = nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x: [B, N, D] -> [B, N, D]. Raises DfqError for a mask, which no image classifier passes."""
        if attn_mask is not None or is_causal:
            raise DfqError("the attention of a quantized model takes no mask")
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = self.q(self.q_norm(q)), self.k(self.k_norm(k)), self.v(v)
        # The scale follows the product, so that the product is one of integers.
        scores = self.scores((q @ k.transpose(-2, -1)) * self.scale)
        mixed = self.softmax(scores.softmax(-1)) @ v
        mixed = self.norm(mixed.transpose(1, 2).flatten(2))
        if self.gate is not None:
            mixed = mixed * self.gate(x).sigmoid()
        out: Tensor = self.proj(mixed)
        return out


class QuantizedBlock(nn.Module):
    """timm's `Block`, with slots on both residual sums."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.ls1, self.norm2, self.ls2 = block.norm1, block.ls1, block.norm2, block.ls2
        self.attn = QuantizedAttention(block.attn)
        self.mlp = block.mlp
        self.residual_attn: nn.Module = nn.Identity()
        self.residual_mlp: nn.Module = nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x: [B, N, D] -> [B, N, D]."""
        x = self.residual_attn(x + self.ls1(self.attn(self.norm1(x), attn_mask, is_causal)))
        out: Tensor = self.residual_mlp(x + self.ls2(self.mlp(self.norm2(x))))
        return out


class Slotted(nn.Module):
    """Any module, with a slot on what it gives."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.output: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output(self.module(x))
        return out


def adapt(vit: VisionTransformer) -> VisionTransformer:
    """Replace, in place, every layer of a timm `VisionTransformer` that has sites; its function does not change."""
    vit.blocks = nn.Sequential(*(QuantizedBlock(block) for block in vit.blocks))
    vit.patch_embed.norm = Slotted(vit.patch_embed.norm)
    if vit.pos_embed is not None:  # Otherwise timm passes it by.
        vit.pos_drop = Slotted(vit.pos_drop)
    for parent in list(vit.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, QuantizedLinear(child))
            elif type(child) is nn.Conv2d:
                setattr(parent, name, QuantizedConv2d(child))
    return vit.eval()


@torch.no_grad()
def quantize_parameter(parameter: nn.Parameter, quantizer: Quantizer) -> None:
    """Put a parameter that acts like an activation (class token, position embedding) on the quantizer's grid."""
    parameter.copy_(quantizer(parameter))
