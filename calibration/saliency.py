"""Which patches matter: the attention that carries them to the classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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

    def __init__(self, reading: _Reading) -> None:
        self.active = False
        self._reading = reading
        self._query: Tensor | None = None
        self._scores: dict[Any, Tensor] = {}

    def keep_query(self, attention: Any, query: Tensor) -> None:
        """query: what came out of `attention.q_norm`."""
        if self.active:
            self._query = _heads_first(attention, query.detach())[:, :, self._reading.queries]

    def score(self, attention: Any, key: Tensor) -> None:
        """key: what came out of `attention.k_norm`, which timm calls right after `q_norm`."""
        if self.active and self._query is not None:
            keys = _heads_first(attention, key.detach())
            logits = (self._query * attention.scale) @ keys.transpose(-2, -1)  # [B, heads, queries, tokens]
            received = logits.float().softmax(-1).mean((1, 2))
            self._scores[attention] = received[:, self._reading.num_prefix_keys :]
            self._query = None

    @property
    def scores(self) -> Tensor:
        """[B, K] in float32 of the last forward pass made while `active`, in the order of its tokens.

        Shares of attention: not negative, and with those of the prefix tokens they sum to 1.
        """
        if not self._scores:
            raise RuntimeError("no forward pass was made while the probe was active")
        return torch.stack(list(self._scores.values())).mean(0)


def _heads_first(attention: Any, vectors: Tensor) -> Tensor:
    """[B, heads, N, d], whichever of the two layouts the module has where it normalises queries and keys."""
    return vectors.transpose(1, 2) if isinstance(attention, ParallelScalingBlock) else vectors


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

    Queries and keys are taken as the model itself makes them, and only while the probe is `active`; no other part of
    the map is formed. Raises DfqError, with the reason, for any other model.
    """
    reading = _reading_of(vit)
    probe = SaliencyProbe(reading)
    with ExitStack() as hooks:
        for attention in reading.attentions:
            hooks.enter_context(_on_output(attention.q_norm, partial(probe.keep_query, attention)))
            hooks.enter_context(_on_output(attention.k_norm, partial(probe.score, attention)))
        yield probe


def _on_output(module: nn.Module, receive: Callable[[Tensor], None]) -> RemovableHandle:
    return module.register_forward_hook(lambda _module, _args, out: receive(out))
