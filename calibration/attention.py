"""What attention layers compute, for the objectives that shape it: captured by hooks, differentiable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from timm.layers.attention import Attention as AttentionLayer
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.vision_transformer import ParallelScalingBlock
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
            receive = partial(_keep_class_attention, captured, block, prefix)
            stack.enter_context(attention_rows(layer, slice(0, 1), lambda: captured.active, receive))
        yield captured


def _output_hook(captured: Attention, num_heads: int, prefix: int) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def on_outputs(_module: nn.Module, args: tuple[Tensor]) -> None:
        if captured.active:
            batch, length, _ = args[0].shape
            heads = args[0].view(batch, length, num_heads, -1)[:, prefix:]
            captured.outputs.append(heads.mean(2, dtype=torch.float32))

    return on_outputs


def _keep_class_attention(captured: Attention, block: int, prefix: int, rows: Tensor) -> None:
    captured.class_attention[block] = rows[:, :, 0, prefix:]


@contextmanager
def attention_rows(
    layer: Any, queries: slice, active: Callable[[], bool], receive: Callable[[Tensor], None]
) -> Iterator[None]:
    """While it is open, `receive` gets rows of the layer's attention map from each pass made while `active()`.

    layer: a timm module with `q_norm`, `k_norm` and `scale`; queries: the tokens whose rows these are. Rows come as
    [B, heads, queries, tokens] in float32. Queries and keys are those the model itself makes: they pass the two norms
    in this order even where they are not normalised. Nothing is computed twice, and no other row is formed.
    """
    waiting: list[Tensor] = []

    def on_query(_module: nn.Module, _args: object, vectors: Tensor) -> None:
        if active():
            waiting[:] = [_heads_first(layer, vectors)[:, :, queries] * layer.scale]

    def on_key(_module: nn.Module, _args: object, vectors: Tensor) -> None:
        if active() and waiting:
            receive((waiting.pop() @ _heads_first(layer, vectors).transpose(-2, -1)).float().softmax(-1))

    with layer.q_norm.register_forward_hook(on_query), layer.k_norm.register_forward_hook(on_key):
        yield


def _heads_first(layer: Any, vectors: Tensor) -> Tensor:
    """[B, heads, N, d], whichever of the two layouts the layer has where it normalises queries and keys."""
    return vectors.transpose(1, 2) if isinstance(layer, ParallelScalingBlock) else vectors
