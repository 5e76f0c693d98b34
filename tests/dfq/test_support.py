"""What can be done with a network, and the reasons for the rest."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

import dfq
from dfq.errors import DfqError, UnsupportedModelError
from dfq.support import Support, check_invertible, check_quantizable, describe_support

VIT = "vit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet18", "is a ResNet, not a timm VisionTransformer or another network .* `dfq list"),
        ("vit_small_patch14_reg4_dinov2", "has no classifier, and it is classes that are inverted; give a --check"),
    ],
)
def test_what_cannot_be_inverted_is_refused_before_anything_is_downloaded(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model

    def offline(*args: Any, pretrained: bool, **kwargs: Any) -> nn.Module:
        assert not pretrained, "weights were asked for"
        return create(*args, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    for random_weights in (True, False):
        with pytest.raises(UnsupportedModelError, match=f"{name} {said}"):
            dfq.load_model(name, random_weights=random_weights)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (VIT, {"num_classes": 0}, "has no classifier"),
        (VIT, {"global_pool": "", "class_token": False}, "has no classifier"),
        (VIT, {"in_chans": 1}, "takes 1 colour channels, dfq 3"),
        ("swin_tiny_patch4_window7_224", {"in_chans": 4}, "takes 4 colour channels, dfq 3"),
        (VIT, {"img_size": 40}, "images of 40x40 are not a whole number of patches of 16x16; give a"),
        ("vit_base_r50_s16_224", {}, "14x14 patches of 1x1 pixels do not tile images of 224x224, .*a HybridEmbed"),
        ("pit_ti_224", {}, "27x27 patches of 16x16 pixels do not tile images of 224x224, .*a ConvEmb"),
        ("naflexvit_base_patch16_gap", {}, "is a NaFlexVit, not a timm VisionTransformer or another"),
    ],
)
def test_networks_that_cannot_be_inverted(name: str, changes: dict[str, Any], said: str) -> None:
    with torch.device("meta"):
        module = timm.create_model(name, **changes)
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        check_invertible(name, module)
    assert str(caught.value).startswith(name)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (
            "swinv2_tiny_window8_256",
            {},
            "is a SwinTransformerV2, neither a timm VisionTransformer nor a SwinTransformer, and no other can be",
        ),
        ("swin_tiny_patch4_window7_224", {"num_classes": 0}, "head.fc is a Identity, .* only timm's Linear"),
        ("vit_small_patch16_18x2_224", {"depth": 1}, "blocks.0 is a ParallelThingsBlock"),
        ("vit_dwee_patch16_reg1_gap_256", {"depth": 1}, "blocks.0.attn is a DiffAttention"),
        ("vit_giant_patch14_dinov2", {"depth": 1, "embed_dim": 48, "num_heads": 2}, "blocks.0.mlp is a GluMlp"),
        ("vit_tiny_r_s16_p8_224", {"depth": 1}, "patch_embed is a HybridEmbed"),
        (VIT, {"depth": 1, "num_classes": 0}, "head is a Identity"),
    ],
)
def test_networks_that_cannot_be_quantized(name: str, changes: dict[str, Any], said: str) -> None:
    with torch.device("meta"):
        module = timm.create_model(name, **changes)
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        check_quantizable(name, module)
    assert str(caught.value).startswith(name)


def test_support_is_told_with_the_reasons() -> None:
    for name in (VIT, "reference"):
        assert describe_support(name) == Support(name, "class token", None, None, None)
    swin = describe_support("swin_tiny_patch4_window7_224")
    assert (swin.saliency, swin.dense_refusal, swin.quantization_refusal) == (None, None, None)
    assert swin.sparse_refusal == (
        "this SwinTransformer is no timm VisionTransformer, the one kind of model that can leave patches out: "
        "use a dense method for it, such as `dense`"
    )
    second = describe_support("swinv2_tiny_window8_256")
    assert str(second.quantization_refusal).startswith("swinv2_tiny_window8_256 is a SwinTransformerV2, neither a timm")
    dino = describe_support("vit_small_patch14_dinov2")
    assert dino == Support("vit_small_patch14_dinov2", "class token", None, None, None, head_needed=True)
    assert dino.refusals == ()
    assert second.refusals == (second.sparse_refusal, second.quantization_refusal)
    with pytest.raises(DfqError, match="did you mean"):
        describe_support("vit_tiny_patch16_225")


# --- weights without a file
