from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers.diff_attention import DiffAttention
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from calibration.errors import DfqError
from calibration.saliency import saliency_kind, saliency_probe
from calibration.tokens import token_gather

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
GAP = {"class_token": False, "global_pool": "avg"}


@torch.no_grad()
def timm_map(vit: VisionTransformer, images: Tensor) -> Tensor:
    """The last block's attention [B, heads, T, T], as timm forms it where attention is not fused.

    The heads of parallel attentions stand side by side.
    """
    caught: list[Tensor] = []
    layers = [module for module in vit.blocks[-1].modules() if hasattr(module, "attn_drop")]
    fused = [layer.fused_attn for layer in layers]
    hooks = [layer.attn_drop.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0])) for layer in layers]
    for layer in layers:
        layer.fused_attn = False
    vit(images)
    for layer, before, hook in zip(layers, fused, hooks, strict=True):
        layer.fused_attn = before
        hook.remove()
    return torch.cat(caught, dim=1)


@torch.no_grad()
def pooling_map(vit: VisionTransformer, images: Tensor) -> Tensor:
    """What the pooling's latent query attends to, [B, heads, tokens], from its weights."""
    pool, tokens = vit.attn_pool, vit.forward_features(images)
    if not vit.pool_include_prefix:
        tokens = tokens[:, vit.num_prefix_tokens :]
    keys = (tokens @ pool.kv.weight.T + pool.kv.bias)[..., : vit.embed_dim]
    query = pool.latent[0, 0] @ pool.q.weight.T + pool.q.bias
    heads = (2, vit.embed_dim // 2)
    products = torch.einsum("bthd,hd->bht", keys.unflatten(-1, heads), query.unflatten(-1, heads))
    return torch.softmax(products / heads[1] ** 0.5, dim=-1)


def scores_of(vit: VisionTransformer, images: Tensor = IMAGES) -> Tensor:
    with saliency_probe(vit) as probe, torch.no_grad():
        probe.active = True
        vit(images)
    scores: Tensor = probe.scores
    return scores


def check(scores: Tensor, expected: Tensor) -> None:
    assert scores.shape == (3, 16)
    torch.testing.assert_close(scores, expected)
    assert expected.std(1).min() > 1e-3  # far from uniform: another row or block would be seen


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({}, id="plain"),
        pytest.param({"distilled": True}, id="distilled"),
        pytest.param({"qk_norm": True, "norm_layer": nn.LayerNorm}, id="q_norm"),
        pytest.param({"reg_tokens": 3}, id="registers"),
        pytest.param({"num_heads": 1}, id="one head"),
        pytest.param({"no_embed_class": True, "init_values": 0.5}, id="deit3"),
        pytest.param({"dynamic_img_size": True, "pre_norm": True}, id="any size"),
        pytest.param({"block_fn": ResPostBlock}, id="norms after"),
        pytest.param({"block_fn": ParallelScalingBlock, "qk_norm": True}, id="attention beside mlp"),
        pytest.param({"block_fn": partial(ParallelThingsBlock, num_parallel=3)}, id="three attentions"),
    ],
)
def test_the_row_of_the_class_token_in_timms_own_map(make_vit: Any, arguments: dict[str, Any], fused: bool) -> None:
    vit = make_vit(**arguments)
    for module in vit.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    assert saliency_kind(vit) == "class token"
    check(scores_of(vit), timm_map(vit, IMAGES).mean(1)[:, 0, vit.num_prefix_tokens :])


@pytest.mark.parametrize("pool", ["avg", "avgmax", "max"])
@pytest.mark.parametrize(
    ("arguments", "pooled"),
    [
        pytest.param({"class_token": False}, slice(0, None), id="patches only"),
        pytest.param({}, slice(1, None), id="class token left out"),
        pytest.param({"class_token": False, "reg_tokens": 2}, slice(2, None), id="registers left out"),
        pytest.param({"reg_tokens": 2, "pool_include_prefix": True}, slice(0, None), id="prefix pooled"),
        pytest.param({"class_token": False, "block_fn": ParallelScalingBlock}, slice(0, None), id="beside mlp"),
    ],
)
def test_the_mean_over_pooled_tokens_in_timms_own_map(
    make_vit: Any, pool: str, arguments: dict[str, Any], pooled: slice
) -> None:
    vit = make_vit(global_pool=pool, **arguments)
    assert saliency_kind(vit) == "pooled tokens"
    received = timm_map(vit, IMAGES).mean(1)[:, pooled].mean(1)
    check(scores_of(vit), received[:, vit.num_prefix_tokens :])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"class_token": False}, id="patches only"),
        pytest.param({"reg_tokens": 2}, id="prefix not pooled"),
        pytest.param({"reg_tokens": 2, "pool_include_prefix": True}, id="prefix pooled"),
    ],
)
def test_the_latent_query_of_a_pooling_by_attention(make_vit: Any, arguments: dict[str, Any], fused: bool) -> None:
    vit = make_vit(global_pool="map", **arguments)
    vit.attn_pool.fused_attn = fused
    assert saliency_kind(vit) == "attention pool"
    check(scores_of(vit), pooling_map(vit, IMAGES).mean(1)[:, -16:])


@pytest.mark.parametrize(
    "arguments", [{}, GAP, {"class_token": False, "global_pool": "map"}], ids=["token", "avg", "map"]
)
def test_a_score_for_each_kept_patch_in_their_order(make_vit: Any, arguments: dict[str, Any]) -> None:
    vit = make_vit(**arguments)
    keep = torch.tensor([[4, 9, 2], [0, 1, 2], [15, 3, 7]])
    with token_gather(vit) as gather, saliency_probe(vit) as probe, torch.no_grad():
        probe.active = True
        gather.keep = keep
        vit(IMAGES)
        scores = probe.scores
        gather.keep = keep.flip(1)
        vit(IMAGES)
    assert scores.shape == (3, 3)
    torch.testing.assert_close(probe.scores, scores.flip(1))
    # Nobody else attends, or is attended to: with the class token's own share they sum to 1.
    total = scores.sum(1)
    assert torch.all(total < 1 - 1e-4) if vit.has_class_token else torch.allclose(total, torch.ones(3))


def test_the_scores_are_of_the_last_pass_made_while_active(make_vit: Any) -> None:
    vit = make_vit(block_fn=ParallelThingsBlock)
    with saliency_probe(vit) as probe, torch.no_grad():
        vit(IMAGES)
        with pytest.raises(RuntimeError, match="no forward pass was made while the probe was active"):
            _ = probe.scores
        probe.active = True
        vit(-IMAGES)
        vit(IMAGES)
        probe.active = False
        vit(-IMAGES)
    torch.testing.assert_close(probe.scores, scores_of(vit))
    assert not torch.allclose(probe.scores, scores_of(vit, -IMAGES))


def test_nothing_is_computed_twice(make_vit: Any) -> None:
    vit = make_vit()
    calls: list[nn.Module] = []
    for module in vit.modules():
        module.register_forward_hook(lambda module, _args, _out: calls.append(module))
    scores_of(vit)
    assert len(calls) == len(set(calls))


def test_scores_are_float32_without_a_gradient_whatever_the_model_runs_in(make_vit: Any) -> None:
    vit = make_vit()
    with saliency_probe(vit) as probe:
        probe.active = True
        vit(IMAGES)
        exact = probe.scores
        with torch.autocast("cpu", dtype=torch.bfloat16):
            vit(IMAGES)
    assert probe.scores.dtype == torch.float32
    assert not probe.scores.requires_grad
    assert not torch.equal(probe.scores, exact)
    assert (probe.scores - exact).abs().max() < 0.05


def test_no_hook_is_left(make_vit: Any) -> None:
    vit = make_vit(block_fn=ParallelThingsBlock)
    with pytest.raises(KeyError), saliency_probe(vit):
        raise KeyError
    assert not any(module._forward_hooks for module in vit.modules())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"attn_layer": DiffAttention}, "attends by DiffAttention, which does not tell"),
        ({"block_fn": DiffParallelScalingBlock}, "attends by DiffParallelScalingBlock, which does not tell"),
        ({"global_pool": "prr"}, "pools its tokens by 'prr', which does not tell"),
    ],
)
def test_attention_that_tells_nothing_is_refused(make_vit: Any, arguments: dict[str, Any], reason: str) -> None:
    vit = make_vit(**arguments)
    message = rf"^this VisionTransformer {reason} which patches matter: use a dense method for it, such as `dense`$"
    with pytest.raises(DfqError, match=message), saliency_probe(vit):
        pass
    with pytest.raises(DfqError, match=message):
        saliency_kind(vit)


def test_models_that_cannot_leave_patches_out_are_refused() -> None:
    # SAM's has a patch_drop slot as well, but its tokens stay in their grid.
    for name, kind in [("swin_tiny_patch4_window7_224", "SwinTransformer"), ("samvit_base_patch16", ".*SAM")]:
        with torch.device("meta"):
            module = timm.create_model(name)
        with pytest.raises(DfqError, match=f"this {kind} is no timm VisionTransformer, .* use a dense method"):
            saliency_kind(module)
