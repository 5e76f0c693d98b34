from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from calibration.errors import DfqError
from calibration.saliency import class_attention_probe
from calibration.tokens import token_gather

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def timm_map(vit: VisionTransformer, images: Tensor) -> Tensor:
    """The last block's attention [B, heads, T, T], as timm forms it where attention is not fused."""
    attention, caught = vit.blocks[-1].attn, []
    hook = attention.attn_drop.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    fused, attention.fused_attn = attention.fused_attn, False
    vit(images)
    attention.fused_attn = fused
    hook.remove()
    return caught[0]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({}, id="plain"),
        pytest.param({"distilled": True}, id="distilled"),
        pytest.param({"qk_norm": True, "norm_layer": nn.LayerNorm}, id="q_norm"),
        pytest.param({"reg_tokens": 3}, id="registers"),
        pytest.param({"num_heads": 1}, id="one head"),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_the_row_of_the_class_token_in_timms_own_map(make_vit: Any, arguments: dict[str, Any], fused: bool) -> None:
    vit = make_vit(**arguments)
    for block in vit.blocks:
        block.attn.fused_attn = fused
    expected = timm_map(vit, IMAGES).mean(1)[:, 0, vit.num_prefix_tokens :]
    with class_attention_probe(vit) as probe, torch.no_grad():
        probe.active = True
        vit(IMAGES)
    assert probe.scores.shape == (3, 16)
    torch.testing.assert_close(probe.scores, expected)
    assert expected.std(1).min() > 1e-3  # far from uniform: another row or block would be seen


def test_a_score_for_each_kept_patch_in_their_order(make_vit: Any) -> None:
    vit = make_vit()
    keep = torch.tensor([[4, 9, 2], [0, 1, 2], [15, 3, 7]])
    with token_gather(vit) as gather, class_attention_probe(vit) as probe, torch.no_grad():
        gather.keep = keep
        expected = timm_map(vit, IMAGES).mean(1)[:, 0, 1:]
        probe.active = True
        vit(IMAGES)
        assert probe.scores.shape == (3, 3)
        torch.testing.assert_close(probe.scores, expected)


def test_the_map_is_formed_only_while_the_probe_is_active(make_vit: Any) -> None:
    vit = make_vit()
    with class_attention_probe(vit) as probe, torch.no_grad():
        vit(IMAGES)
        with pytest.raises(RuntimeError, match="no forward pass was made while the probe was active"):
            _ = probe.scores
        probe.active = True
        vit(IMAGES)
        probe.active = False
        scores = probe.scores
        vit(-IMAGES)
        assert probe.scores is scores


def test_scores_are_float32_without_a_gradient_whatever_the_model_runs_in(make_vit: Any) -> None:
    vit = make_vit()
    with class_attention_probe(vit) as probe:
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
    vit = make_vit()
    with pytest.raises(KeyError), class_attention_probe(vit):
        raise KeyError
    assert not any(module._forward_pre_hooks for module in vit.modules())


def test_a_model_without_a_class_token_is_refused(make_vit: Any) -> None:
    vit = make_vit(class_token=False, global_pool="avg")
    with (
        pytest.raises(DfqError, match=r"this VisionTransformer has no class token, .*use a dense method"),
        class_attention_probe(vit),
    ):
        pass
