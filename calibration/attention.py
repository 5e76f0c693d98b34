"""What attention layers compute, for the objectives that shape it: captured by hooks, differentiable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from timm.layers.attention import Attention as AttentionLayer
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from torch import Tensor, nn

from calibration.errors import DfqError

Need = Literal["outputs", "class_attention"]

# The layers understood: all bring their heads' outputs side by side before `proj` mixes them.
_LAYERS = (AttentionLayer, WindowAttention, WindowAttentionV2)


@dataclass
class Attention:
    """The attention of the last forward pass made while `active`; what was not asked for stays empty.

    outputs: of each attention layer in order, attention @ values, mean over heads, in float32: [B, T, head_dim] without
    prefix tokens; a windowed layer gives [B * windows, T, head_dim], the windows of one image side by side.
    class_attention: for the blocks of `class_attention_layers`, the class token's row of the attention map, in float32:
    [B, heads, K], prefix tokens left out, so that it need not sum to 1.
    """

    outputs: list[Tensor] = field(default_factory=list)
    class_attention: dict[int, Tensor] = field(default_factory=dict)
    active: bool = True

    def clear(self) -> None:
        self.outputs.clear()
        self.class_attention.clear()


def class_attention_layers(vit: nn.Module) -> dict[int, AttentionLayer]:
    """Attention layers of the deeper half of the blocks, l >= L/2 with l from 1 to L, by the block's index l - 1.

    Raises DfqError where there is no class token, or where keys and queries cannot be seen as they meet.
    """
    name = type(vit).__name__
    if not getattr(vit, "has_class_token", False):
        raise DfqError(
            f"the objective attention_prior shapes the attention of a class token, and {name} has none: "
            "use a method without that objective"
        )
    blocks: Any = vit.blocks
    deeper = range((len(blocks) + 1) // 2 - 1, len(blocks))
    layers = {block: getattr(blocks[block], "attn", None) for block in deeper}
    for block, layer in layers.items():
        # Not merely any layer with q_norm and k_norm: rotary ones turn queries and keys after these.
        if not isinstance(layer, AttentionLayer):
            raise DfqError(
                f"the objective attention_prior needs timm's Attention layers, and block {block} of {name} has "
                f"{type(layer).__name__}: use a method without that objective"
            )
    return layers


def _output_layers(vit: nn.Module) -> list[Any]:
    layers = [module for module in vit.modules() if isinstance(module, _LAYERS)]
    if not layers:
        raise DfqError(
            f"the objective patch_similarity_entropy needs attention layers, and {type(vit).__name__} has none that "
            "dfq understands: use a method without that objective"
        )
    return layers


@contextmanager
def capture(vit: nn.Module, needs: frozenset[Need]) -> Iterator[Attention]:
    """While it is open, every forward pass of `vit` replaces what is in the Attention it yields, if that is `active`.

    Only the layers that give something needed are hooked, and nothing is computed twice. Raises DfqError for a model
    that lacks what is needed.
    """
    captured = Attention()
    prefix = getattr(vit, "num_prefix_tokens", 0)

    def clear(_module: nn.Module, _args: object) -> None:
        if captured.active:
            captured.clear()

    with ExitStack() as stack:
        stack.enter_context(vit.register_forward_pre_hook(clear))
        for layer in _output_layers(vit) if "outputs" in needs else ():
            # Where the heads' outputs are normalised before `proj`, they are to be had before that.
            exit_ = layer.norm if isinstance(layer, AttentionLayer) else layer.proj
            stack.enter_context(exit_.register_forward_pre_hook(_output_hook(captured, layer.num_heads, prefix)))
        for block, layer in class_attention_layers(vit).items() if "class_attention" in needs else ():
            on_query, on_key = _class_attention_hooks(captured, block, layer.scale, prefix)
            stack.enter_context(layer.q_norm.register_forward_hook(on_query))
            stack.enter_context(layer.k_norm.register_forward_hook(on_key))
        yield captured


def _output_hook(captured: Attention, num_heads: int, prefix: int) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def on_outputs(_module: nn.Module, args: tuple[Tensor]) -> None:
        if captured.active:
            batch, length, _ = args[0].shape
            heads = args[0].view(batch, length, num_heads, -1)[:, prefix:]
            captured.outputs.append(heads.mean(2, dtype=torch.float32))

    return on_outputs


_Hook = Callable[[nn.Module, tuple[Tensor], Tensor], None]


def _class_attention_hooks(captured: Attention, block: int, scale: float, prefix: int) -> tuple[_Hook, _Hook]:
    """For `q_norm` and `k_norm`, which queries and keys pass in this order even where they are not normalised."""
    query: list[Tensor] = []

    def on_query(_module: nn.Module, _args: tuple[Tensor], queries: Tensor) -> None:
        if captured.active:
            query[:] = [queries[:, :, :1] * scale]

    def on_key(_module: nn.Module, _args: tuple[Tensor], keys: Tensor) -> None:
        if captured.active:
            row = (query.pop() @ keys.transpose(-2, -1)).float().softmax(-1)
            captured.class_attention[block] = row[:, :, 0, prefix:]

    return on_query, on_key
