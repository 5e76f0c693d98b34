"""Quantized stand-ins for the layers of timm's ViT and Swin.

Each takes over the parameters of the layer it replaces and has *slots*: submodules through which one tensor passes,
`nn.Identity` until a fitted quantizer takes the place. A slot's dotted path is the name of its site.
"""

from __future__ import annotations

import torch
from timm.layers.attention import Attention
from timm.layers.classifier import ClassifierHead
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
    window_partition,
    window_reverse,
)
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


class PositionMean(nn.Module):
    """What each position has in common in all images, of what enters a linear: known beforehand, so never rounded.

    A low rank of the mean over images is subtracted in front of the slot `input`, and what the exact weights make of it
    is added to the product. Both are constants: only what differs from image to image passes the grid, and the errors
    of rounded weights meet nothing else.

    positions: [N, R]; taken: [R, in], their product is the mean; given: [R, out].
    """

    positions: Tensor
    taken: Tensor
    given: Tensor

    def __init__(self, positions: Tensor, taken: Tensor, given: Tensor) -> None:
        super().__init__()
        for name, tensor in (("positions", positions), ("taken", taken), ("given", given)):
            self.register_buffer(name, tensor)

    @classmethod
    def of(cls, positions: Tensor, taken: Tensor, weight: Tensor) -> PositionMean:
        """In float16, with what `weight` [out, in] makes of `taken` as it is then."""
        taken = taken.half()
        return cls(positions.half(), taken, (taken.to(weight.dtype) @ weight.T).half())

    def common(self) -> Tensor:
        """[N, in], fp32, or what autocast makes of it."""
        mean: Tensor = self.positions.float() @ self.taken.float()
        return mean

    def product(self) -> Tensor:
        """What the exact weights make of it: [N, out], likewise."""
        product: Tensor = self.positions.float() @ self.given.float()
        return product


class QuantizedLinear(QuantizedLayer):
    """`nn.Linear`; with a `position_mean` it takes tokens of as many positions alone."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.position_mean: PositionMean | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        mean = self.position_mean
        y = F.linear(self.input(x if mean is None else x - mean.common()), self.weight, self.bias)
        out: Tensor = self.output(y if mean is None else y + mean.product())
        return out


def takes_all_positions(network: nn.Module) -> bool:
    """Whether it cannot be shown some of the patches alone, having a `PositionMean` somewhere."""
    return any(isinstance(layer, QuantizedLinear) and layer.position_mean is not None for layer in network.modules())


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


class AttentionSlots(nn.Module):
    """What every attention has: slots on the operands of both matrix products, q, k, scores, softmax and v.

    deferred: through the slot `softmax` pass exponentials, the largest of each row one, and the product with v is
    divided by their sum as they come out of it, as fused kernels do (SageAttention, ICLR 2025, section 3): each row
    has the whole grid then, and its weights add up to one however coarse they are.
    """

    def __init__(self, num_heads: int, scale: float) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, scale
        self.deferred = False
        self.q: nn.Module = nn.Identity()
        self.k: nn.Module = nn.Identity()
        self.v: nn.Module = nn.Identity()
        self.scores: nn.Module = nn.Identity()
        self.softmax: nn.Module = nn.Identity()

    @property
    def projects_what_is_mixed(self) -> bool:
        """Whether the projection takes the mixed values as they are: no norm and no gate comes between."""
        return isinstance(getattr(self, "norm", nn.Identity()), nn.Identity) and getattr(self, "gate", None) is None

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """qkv: [B, N, 3 heads D] -> q, k, v: [B, heads, N, D]."""
        batch, length, _ = qkv.shape
        return qkv.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """q, k, v: [B, heads, N, D] -> [B, N, heads D]; bias: [W, heads, N, N], for each W rows of B.

        The bias is added in floating point: masked scores lie far below all others and would stretch their range.
        """
        q, k, v = self.q(q), self.k(k), self.v(v)
        # The scale follows the product, so that the product is one of integers.
        scores = self.scores((q @ k.transpose(-2, -1)) * self.scale)
        if bias is not None:
            scores = (scores.view(-1, len(bias), *scores.shape[1:]) + bias).flatten(0, 1)
        if self.deferred:
            exponentials = self.softmax((scores - scores.detach().amax(-1, keepdim=True)).exp())
            mixed: Tensor = (exponentials @ v) / exponentials.sum(-1, keepdim=True)
        else:
            mixed = self.softmax(scores.softmax(-1)) @ v
        return mixed.transpose(1, 2).flatten(2)


class QuantizedAttention(AttentionSlots):
    """timm's `Attention`."""

    def __init__(self, attention: Attention) -> None:
        super().__init__(attention.num_heads, attention.scale)
        self.qkv = attention.qkv
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.norm = getattr(attention, "norm", nn.Identity())
        self.gate = getattr(attention, "gate", None)
        self.proj = attention.proj

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x: [B, N, D] -> [B, N, D]. Raises DfqError for a mask, which no image classifier passes."""
        if attn_mask is not None or is_causal:
            raise DfqError("the attention of a quantized model takes no mask")
        q, k, v = self.split(self.qkv(x))
        mixed = self.norm(self.mix(self.q_norm(q), self.k_norm(k), v))
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


class QuantizedWindowAttention(AttentionSlots):
    """timm's `WindowAttention`, of Swin."""

    relative_position_index: Tensor

    def __init__(self, attention: WindowAttention) -> None:
        super().__init__(attention.num_heads, attention.scale)
        self.qkv, self.proj = attention.qkv, attention.proj
        self.relative_position_bias_table = attention.relative_position_bias_table
        self.register_buffer("relative_position_index", attention.relative_position_index, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x: [B W, N, D] of W windows per image, mask: [W, N, N], added to the scores -> [B W, N, D]."""
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).unsqueeze(0)
        if mask is not None:
            bias = bias + mask.unsqueeze(1)
        q, k, v = self.split(self.qkv(x))
        out: Tensor = self.proj(self.mix(q, k, v, bias))
        return out


class QuantizedSwinBlock(nn.Module):
    """timm's `SwinTransformerBlock`, with slots on both residual sums."""

    mask: Tensor | None

    def __init__(self, block: SwinTransformerBlock) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.attn = QuantizedWindowAttention(block.attn)
        self.mlp = block.mlp
        self.window_size, self.shift_size = block.window_size, block.shift_size
        mask = block.get_attn_mask()  # Blocks for images of any size do not keep it.
        self.register_buffer("mask", None if mask is None else mask.to(block.norm1.weight.device), persistent=False)
        self.residual_attn: nn.Module = nn.Identity()
        self.residual_mlp: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, D] -> [B, H, W, D]."""
        # The sums as rows of tokens: of four axes, the second would be taken for heads.
        tokens = self.residual_attn((x + self._attend(self.norm1(x))).flatten(1, 2))
        out: Tensor = self.residual_mlp(tokens + self.mlp(self.norm2(tokens)))
        return out.view(x.shape)

    def _attend(self, x: Tensor) -> Tensor:
        """x: [B, H, W, D] -> [B, H, W, D], each token attending to those of its window."""
        height, width = x.shape[1:3]
        (rows, columns), (down, right) = self.window_size, self.shift_size
        x = F.pad(x.roll((-down, -right), (1, 2)), (0, 0, 0, -width % columns, 0, -height % rows))
        windows = self.attn(window_partition(x, self.window_size).flatten(1, 2), self.mask)
        whole: Tensor = window_reverse(windows, self.window_size, *x.shape[1:3])
        return whole[:, :height, :width].roll((down, right), (1, 2))


class QuantizedPatchMerging(nn.Module):
    """timm's `PatchMerging`, of Swin."""

    def __init__(self, merging: PatchMerging) -> None:
        super().__init__()
        self.norm, self.reduction = merging.norm, merging.reduction

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, D] -> [B, H / 2, W / 2, 2 D], rounded up."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        batch, height, width, dim = x.shape
        merged = x.view(batch, height // 2, 2, width // 2, 2, dim).permute(0, 1, 3, 4, 2, 5)
        tokens: Tensor = self.reduction(self.norm(merged.reshape(batch, -1, 4 * dim)))
        return tokens.view(batch, height // 2, width // 2, -1)


class Slotted(nn.Module):
    """Any module, with a slot on what it gives."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.output: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output(self.module(x))
        return out


def understood_parts(network: VisionTransformer | SwinTransformer) -> dict[str, type[nn.Module]]:
    """What `adapt` takes each part for, by its path; a part comes after the one it is found in."""
    parts: dict[str, type[nn.Module]] = {}
    if isinstance(network, SwinTransformer):
        for number, layer in enumerate(network.layers):
            parts[f"layers.{number}.downsample"] = PatchMerging if number else nn.Identity
            for index in range(len(layer.blocks)):
                block = f"layers.{number}.blocks.{index}"
                parts |= {block: SwinTransformerBlock, f"{block}.attn": WindowAttention, f"{block}.mlp": Mlp}
        return parts | {"patch_embed": PatchEmbed, "head": ClassifierHead, "head.fc": nn.Linear}
    for index in range(len(network.blocks)):
        block = f"blocks.{index}"
        parts |= {block: Block, f"{block}.attn": Attention, f"{block}.mlp": Mlp}
    return parts | {"patch_embed": PatchEmbed, "head": nn.Linear}


def adapt(
    network: VisionTransformer | SwinTransformer, *, deferred: bool = False
) -> VisionTransformer | SwinTransformer:
    """Replace, in place, every layer that has sites; the network's function does not change.

    deferred: of every attention, see `AttentionSlots`.
    """
    if isinstance(network, SwinTransformer):
        for layer in network.layers:
            layer.blocks = nn.Sequential(*(QuantizedSwinBlock(block) for block in layer.blocks))
            if isinstance(layer.downsample, PatchMerging):
                layer.downsample = QuantizedPatchMerging(layer.downsample)
    else:
        network.blocks = nn.Sequential(*(QuantizedBlock(block) for block in network.blocks))
        if network.pos_embed is not None:  # Otherwise timm passes it by.
            network.pos_drop = Slotted(network.pos_drop)
    network.patch_embed.norm = Slotted(network.patch_embed.norm)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, QuantizedLinear(child))
            elif type(child) is nn.Conv2d:
                setattr(parent, name, QuantizedConv2d(child))
    for module in network.modules():
        if isinstance(module, AttentionSlots):
            module.deferred = deferred
    return network.eval()


@torch.no_grad()
def quantize_parameter(parameter: nn.Parameter, quantizer: Quantizer) -> None:
    """Put a parameter that acts like an activation (class token, position embedding) on the quantizer's grid."""
    parameter.copy_(quantizer(parameter))
