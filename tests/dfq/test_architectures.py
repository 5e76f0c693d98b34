"""Names of networks, and what is said of those that nobody knows."""

from __future__ import annotations

import pytest

import dfq
from dfq.architectures import supported_names
from dfq.errors import DfqError

VIT = "vit_tiny_patch16_224"


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    with pytest.raises(DfqError, match=r"knows no model 'vit_tiny_patch16_225'; did you mean vit_tiny_patch16_224, "):
        dfq.load_model("vit_tiny_patch16_225", random_weights=True)
    with pytest.raises(DfqError, match="`dfq list models` shows the names"):
        dfq.load_model("#", random_weights=True)


def test_an_unknown_tag_is_answered_with_the_known_ones() -> None:
    with pytest.raises(DfqError, match=r"knows vit_tiny_patch16_224, but not with .*augreg_in21k_ft_in1k"):
        dfq.load_model(f"{VIT}.no_such_tag", random_weights=True)


def test_the_list_of_models() -> None:
    names = supported_names()
    assert {VIT, "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"} <= set(names)
    assert "resnet18" not in names
    assert names == sorted(names)
    assert supported_names("deit3_small_*") == ["deit3_small_patch16_224", "deit3_small_patch16_384"]
    assert supported_names("deit3_small") == supported_names("deit3_small_*")
    assert supported_names("small_patch16_384") == sorted(supported_names("*_small_patch16_384"))
