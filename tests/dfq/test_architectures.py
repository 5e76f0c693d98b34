"""Names of networks, and what is said of those that nobody knows."""

from __future__ import annotations

from pathlib import Path

import pytest

import dfq
from dfq.architectures import supported_names
from dfq.errors import DfqError

VIT = "vit_tiny_patch16_224"


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    with pytest.raises(DfqError, match=r"knows no model 'vit_tiny_patch16_225'; did you mean vit_tiny_patch16_224, "):
        dfq.load_model("vit_tiny_patch16_225", random_weights=True)
    with pytest.raises(
        DfqError, match=r"knows no model 'ViT-Tiny'; did you mean vit_tiny_patch16_224, vit_tiny_patch16_3"
    ):
        dfq.load_model("ViT-Tiny", random_weights=True)
    with pytest.raises(DfqError, match=r"did you mean vit_base_patch16_224, "):
        dfq.load_model("google/vit-base-patch16-224", random_weights=True)
    with pytest.raises(DfqError, match="and nothing here has it; `dfq list models` shows some"):
        dfq.load_model("#", random_weights=True)


def test_a_path_instead_of_a_name(tmp_path: Path) -> None:
    with pytest.raises(DfqError, match=f"{tmp_path} is a folder; one that holds .* as local-dir:{tmp_path}$"):
        dfq.load_model(str(tmp_path), random_weights=True)
    (tmp_path / "vit.pth").touch()
    with pytest.raises(DfqError, match=r"vit\.pth is a file; name the architecture .* give it as --checkpoint$"):
        dfq.load_model(str(tmp_path / "vit.pth"), random_weights=True)


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
