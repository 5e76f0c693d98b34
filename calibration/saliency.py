"""Which patches matter: the attention that carries them to the classifier."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, VisionTransformer
from torch import Tensor, nn

from calibration.attention import attention_rows
from calibration.errors import DfqError


@dataclass(frozen=True)
class _Reading:
    """Where the scores are read.

    attentions: modules with `q_norm`, `k_norm` and `scale`, of which the mean counts; queries: the tokens whose
    attention it is; num_prefix_keys: how many tokens attended to stand before the patches.
    """

    kind: str
    attentions: tuple[Any, ...]
    queries: slice
    num_prefix_keys: int


def _reading_of(vit: nn.Module) -> _Reading:
    """Raises DfqError for a model that cannot leave patches out, or does not show which."""
    if not isinstance(vit, VisionTransformer):
        raise _refusal(vit, "is no timm VisionTransformer, the one kind of model that can leave patches out")
    prefix, pool = vit.num_prefix_tokens, vit.global_pool
    pooled_prefix = prefix if vit.pool_include_prefix else 0
    if pool == "token":
        reading = _Reading("class token", _attentions_of(vit.blocks[-1]), slice(0, 1), prefix)
    elif pool == "map":
        reading = _Reading("attention pool", (vit.attn_pool,), slice(None), pooled_prefix)
    elif pool in ("avg", "avgmax", "max"):
        reading = _Reading("pooled tokens", _attentions_of(vit.blocks[-1]), slice(prefix - pooled_prefix, None), prefix)
    else:
        raise _refusal(vit, f"pools its tokens by {pool!r}, which does not tell which patches matter")
    for attention in reading.attentions:
        # The exact types: a subclass may do something else with its queries and keys.
        if type(attention) not in (Attention, ParallelScalingBlock, AttentionPoolLatent):
            raise _refusal(vit, f"attends by {type(attention).__name__}, which does not tell which patches matter")
    return reading


def _refusal(vit: nn.Module, reason: str) -> DfqError:
    return DfqError(f"this {type(vit).__name__} {reason}: use a dense method for it, such as `dense`")


def _attentions_of(block: Any) -> tuple[Any, ...]:
    if isinstance(block, ParallelThingsBlock):
        return tuple(branch.attn for branch in block.attns)
    return (getattr(block, "attn", block),)  # a ParallelScalingBlock is its own attention


def saliency_kind(vit: nn.Module) -> str:
    """What says which patches of `vit` matter: `class token`, `attention pool` or `pooled tokens` (`saliency_probe`).

    Raises DfqError, with the reason, for a model that has none of them.
    """
    return _reading_of(vit).kind


class SaliencyProbe:
    """Remembers how much attention each patch got in the forward passes made while `active`."""

    def __init__(self, num_prefix_keys: int) -> None:
        self.active = False
        self._num_prefix_keys = num_prefix_keys
        self._scores: dict[Any, Tensor] = {}

    def score(self, attention: Any, rows: Tensor) -> None:
        """rows: of the attention map of `attention`, [B, heads, queries, tokens]."""
        self._scores[attention] = rows.detach().mean((1, 2))[:, self._num_prefix_keys :]

    @property
    def scores(self) -> Tensor:
        """[B, K] in float32 of the last forward pass made while `active`, in the order of its tokens.

        Shares of attention: not negative, and with those of the prefix tokens they sum to 1.
        """
        if not self._scores:
            raise RuntimeError("no forward pass was made while the probe was active")
        return torch.stack(list(self._scores.values())).mean(0)


@contextmanager
def saliency_probe(vit: nn.Module) -> Iterator[SaliencyProbe]:
    """A probe on the attention through which patches reach the classifier of `vit`.

    A patch's score is the attention it receives, mean over heads, from what the classifier reads:

    - `class token`: the class token's in the last block (SMI, section 3.1). Of a distilled model too, whose other
      head's token is left aside.
    - `attention pool`: the latent query's, in the pooling itself: the class token of models pooled by attention.
    - `pooled tokens`: the mean over the tokens that are averaged, in the last block. Nothing is published for such
      models. It is the same quantity: there, too, a patch reaches the classifier by what the tokens read by it attend
      to, and each of those counts alike. The share a patch has in the mean by its own token is left out: it is the
      same for all.

    The map is formed only while the probe is `active`, and no more of it than this takes. Raises DfqError, with the
    reason, for any other model.
    """
    reading = _reading_of(vit)
    probe = SaliencyProbe(reading.num_prefix_keys)
    with ExitStack() as hooks:
        for attention in reading.attentions:
            receive = partial(probe.score, attention)
            hooks.enter_context(attention_rows(attention, reading.queries, lambda: probe.active, receive))
        yield probe
