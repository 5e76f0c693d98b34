from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from timm.layers.attention import AttentionRope
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from calibration.attention import Need, capture, class_attention_layers
from calibration.errors import DfqError

BOTH: frozenset[Need] = frozenset({"outputs", "class_attention"})
OUTPUTS: frozenset[Need] = frozenset({"outputs"})
CLASS: frozenset[Need] = frozenset({"class_attention"})


def images_of(count: int = 3, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def by_hand(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, T, D] -> (attention map [B, heads, T, T], attention @ values [B, heads, T, head_dim]), in float64."""
    batch, length, width = tokens.shape
    weight, bias = attention.qkv.weight.double(), attention.qkv.bias.double()
    qkv = (tokens.double() @ weight.T + bias).view(batch, length, 3, attention.num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    head_dim = width // attention.num_heads
    if isinstance(attention.q_norm, nn.LayerNorm):
        query, key = (
            (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + norm.eps) ** 0.5 * norm.weight
            + norm.bias
            for x, norm in ((query, attention.q_norm), (key, attention.k_norm))
        )
    probabilities = (query @ key.mT / head_dim**0.5).softmax(-1)
    return probabilities, probabilities @ value


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("arguments", "prefix"),
    [
        ({}, 1),
        ({"distilled": True}, 2),
        ({"reg_tokens": 3}, 4),
        ({"qk_norm": True}, 1),
        ({"scale_attn_norm": True}, 1),
    ],
)
def test_what_is_captured_is_what_the_weights_say(
    make_vit: Any, fused: bool, arguments: dict[str, Any], prefix: int
) -> None:
    vit = make_vit(**arguments)
    tokens: list[Tensor] = []
    for block in vit.blocks:
        block.attn.fused_attn = fused
        block.attn.register_forward_pre_hook(lambda _, args: tokens.append(args[0]))
    with torch.no_grad(), capture(vit, BOTH) as attention:
        vit(images_of())
        assert len(attention.outputs) == 2
        assert list(attention.class_attention) == [0, 1]
        for index, block in enumerate(vit.blocks):
            probabilities, outputs = by_hand(block.attn, tokens[index])
            row = probabilities[:, :, 0, prefix:].float()
            assert row.std() > 0.005, "attention too even to tell patches apart"
            torch.testing.assert_close(attention.outputs[index], outputs.mean(1)[:, prefix:].float())
            torch.testing.assert_close(attention.class_attention[index], row)


@pytest.mark.parametrize(("depth", "deeper"), [(1, [0]), (2, [0, 1]), (3, [1, 2]), (4, [1, 2, 3])])
def test_class_attention_is_of_the_deeper_half(make_vit: Any, depth: int, deeper: list[int]) -> None:
    """Blocks counted from 1: l >= L/2."""
    vit = make_vit(depth=depth)
    assert {block: layer is vit.blocks[block].attn for block, layer in class_attention_layers(vit).items()} == (
        dict.fromkeys(deeper, True)
    )
    with capture(vit, CLASS) as attention:
        vit(images_of())
    assert list(attention.class_attention) == deeper


def test_only_what_is_needed_is_hooked_and_only_while_open(make_vit: Any) -> None:
    vit = make_vit(depth=4)

    def hooked() -> set[str]:
        return {name for name, m in vit.named_modules() if name and (m._forward_hooks or m._forward_pre_hooks)}

    with capture(vit, frozenset()):
        assert hooked() == set()
    with capture(vit, CLASS):
        assert hooked() == {f"blocks.{block}.attn.{norm}" for block in (1, 2, 3) for norm in ("q_norm", "k_norm")}
    with capture(vit, OUTPUTS):
        assert hooked() == {f"blocks.{block}.attn.norm" for block in range(4)}
    assert hooked() == set()
    assert not vit._forward_pre_hooks


def test_each_pass_replaces_the_one_before(make_vit: Any) -> None:
    vit = make_vit()
    with torch.no_grad(), capture(vit, BOTH) as attention:
        vit(images_of(3))
        vit(images_of(2))
        assert [len(output) for output in attention.outputs] == [2, 2]
        assert [len(row) for row in attention.class_attention.values()] == [2, 2]


def test_inactive_passes_leave_it_alone(make_vit: Any) -> None:
    vit = make_vit()
    with torch.no_grad(), capture(vit, BOTH) as attention:
        attention.active = False
        vit(images_of(3))
        assert attention.outputs == []
        assert attention.class_attention == {}
        attention.active = True
        vit(images_of(2))
        kept = attention.outputs[0]
        attention.active = False
        vit(images_of(3))
        assert attention.outputs[0] is kept
        assert len(attention.class_attention[1]) == 2


def test_capturing_does_not_change_the_model(make_vit: Any) -> None:
    vit, images = make_vit(), images_of()
    expected = vit(images)
    with capture(vit, BOTH):
        assert torch.equal(vit(images), expected)


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_reach_the_pixels(make_vit: Any, fused: bool) -> None:
    vit, images = make_vit(), images_of().requires_grad_()
    for block in vit.blocks:
        block.attn.fused_attn = fused
    with capture(vit, BOTH) as attention:
        vit(images)
        for captured in (attention.outputs[-1], attention.class_attention[1]):
            (gradient,) = torch.autograd.grad(captured.square().sum(), images, retain_graph=True)
            assert gradient.isfinite().all()
            assert gradient.any()


def test_float32_under_autocast(make_vit: Any) -> None:
    vit, images = make_vit(depth=1), images_of()
    with torch.no_grad(), capture(vit, BOTH) as attention:
        vit(images)
        outputs, row = attention.outputs[0], attention.class_attention[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            vit(images)
    assert attention.outputs[0].dtype == attention.class_attention[0].dtype == torch.float32
    # bfloat16 has 8 bits: 0.4 % of each value, a few times over.
    assert (attention.outputs[0] - outputs).abs().max() < 0.02 * outputs.abs().max()
    assert (attention.class_attention[0] - row).abs().max() < 0.1


@pytest.mark.parametrize("swin_class", [SwinTransformer, SwinTransformerV2])
def test_windows_of_swin(swin_class: Any) -> None:
    torch.manual_seed(0)
    swin = swin_class(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(1, 2), num_classes=5
    ).eval()
    results: list[Tensor] = []
    first = swin.layers[0].blocks[0].attn
    first.register_forward_hook(lambda _module, _args, result: results.append(result))
    with torch.no_grad(), capture(swin, OUTPUTS) as attention:
        swin(images_of(3))
        batch = list(attention.outputs)
        swin(images_of(3)[1:2])
    # 16x16 patches make 16 windows of 4x4; 8x8 make 4.
    assert [tuple(output.shape) for output in batch] == [(48, 16, 16), (48, 16, 16), (12, 16, 16)]
    # One head: what is captured is what `proj` was given.
    torch.testing.assert_close(first.proj(batch[0]), results[0])
    for all_windows, windows in zip(batch, attention.outputs, strict=True):
        torch.testing.assert_close(all_windows.view(3, -1, *windows.shape[1:])[1], windows)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "no class token",
            "the objective attention_prior shapes the attention of a class token, and VisionTransformer has none: "
            "use a method without that objective",
        ),
        (
            "swin",
            "the objective attention_prior shapes the attention of a class token, and SwinTransformer has none: "
            "use a method without that objective",
        ),
        (
            "rotary",
            "the objective attention_prior needs timm's Attention layers, and block 1 of VisionTransformer has "
            "AttentionRope: use a method without that objective",
        ),
    ],
)
def test_models_whose_class_attention_is_not_to_be_had(make_vit: Any, model: str, message: str) -> None:
    vit: Any
    if model == "swin":
        vit = SwinTransformer(img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(1,), num_heads=(1,))
    else:
        vit = make_vit(**({"class_token": False, "global_pool": "avg"} if model == "no class token" else {}))
    if model == "rotary":
        vit.blocks[1].attn = AttentionRope(16, num_heads=2)
    with pytest.raises(DfqError, match=re.escape(message)), capture(vit, BOTH):
        pass
    assert not vit._forward_pre_hooks


def test_a_model_without_attention() -> None:
    message = (
        "the objective patch_similarity_entropy needs attention layers, and Linear has none that dfq understands: "
        "use a method without that objective"
    )
    with pytest.raises(DfqError, match=re.escape(message)), capture(nn.Linear(2, 2), OUTPUTS):
        pass
