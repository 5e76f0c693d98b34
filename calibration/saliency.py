"""Which patches matter: the class token's attention in the last block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from calibration.errors import DfqError


def class_attention(attention: Attention, tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """Attention of the class token to each patch, mean over heads (SMI, section 3.1).

    attention: a timm `Attention`; tokens: [B, P + K, D], its input, class token first.
    Returns [B, K] in float32. Only the class token's row of the map is formed.
    """
    batch, length, _ = tokens.shape
    qkv = attention.qkv(tokens).view(batch, length, 3, attention.num_heads, -1)
    query = attention.q_norm(qkv[:, :1, 0].transpose(1, 2))
    key = attention.k_norm(qkv[:, :, 1].transpose(1, 2))
    logits = (query * attention.scale) @ key.transpose(-2, -1)
    scores: Tensor = logits.float().softmax(-1).mean(1)[:, 0, num_prefix_tokens:]
    return scores


class ClassAttentionProbe:
    """Remembers the class attention of the forward passes made while `active`."""

    def __init__(self, vit: VisionTransformer) -> None:
        self.active = False
        self._num_prefix_tokens = vit.num_prefix_tokens
        self._scores: Tensor | None = None

    def __call__(self, attention: Attention, args: tuple[Tensor, ...]) -> None:
        if self.active:
            with torch.no_grad():
                self._scores = class_attention(attention, args[0].detach(), self._num_prefix_tokens)

    @property
    def scores(self) -> Tensor:
        """[B, K] of the last forward pass made while `active`, in the order of its tokens."""
        if self._scores is None:
            raise RuntimeError("no forward pass was made while the probe was active")
        return self._scores


@contextmanager
def class_attention_probe(vit: VisionTransformer) -> Iterator[ClassAttentionProbe]:
    """A probe on the last block's attention; its map is formed at no other time and in no other block.

    Raises DfqError for a model without a class token.
    """
    if not vit.has_class_token:
        raise DfqError(
            f"this {type(vit).__name__} has no class token, whose attention says which patches matter: "
            "use a dense method for it"
        )
    probe = ClassAttentionProbe(vit)
    handle = vit.blocks[-1].attn.register_forward_pre_hook(probe)
    try:
        yield probe
    finally:
        handle.remove()
