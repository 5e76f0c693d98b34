from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from calibration.errors import DfqError
from calibration.tokens import (
    PatchGrid,
    PatchProjection,
    TokenGather,
    keep_of_mask,
    patch_projection,
    token_gather,
)

KEEP = torch.tensor([[0, 3, 10, 15], [1, 2, 5, 6]])

VARIANTS = [
    pytest.param({}, id="class token"),
    pytest.param({"distilled": True}, id="distilled"),
    pytest.param({"reg_tokens": 3}, id="registers"),
    pytest.param({"class_token": False, "global_pool": "avg"}, id="no prefix"),
]


def images_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arguments", VARIANTS)
@torch.no_grad()
def test_the_model_sees_the_kept_tokens_with_their_own_position(make_vit: Any, arguments: dict[str, Any]) -> None:
    vit, images = make_vit(**arguments), images_of(2)
    with token_gather(vit) as gather:
        gather.keep = KEEP
        logits = vit(images)

    tokens = vit._pos_embed(vit.patch_embed(images))
    prefix = list(range(vit.num_prefix_tokens))
    tokens = torch.stack([tokens[b, prefix + [len(prefix) + int(k) for k in KEEP[b]]] for b in range(2)])
    for block in vit.blocks:
        tokens = block(tokens)
    expected = vit.forward_head(vit.norm(tokens))
    torch.testing.assert_close(logits, expected)
    assert not torch.allclose(logits, vit(images), atol=1e-3)


@torch.no_grad()
def test_pixels_outside_the_kept_patches_do_not_count(make_vit: Any) -> None:
    vit, images = make_vit(), images_of(2)
    inside = PatchGrid.of(vit).to_pixels(PatchGrid.of(vit).mask_of(KEEP))
    with token_gather(vit) as gather:
        gather.keep = KEEP
        logits = vit(images)
        assert torch.equal(vit(torch.where(inside, images, images_of(2, seed=1))), logits)
        assert not torch.allclose(vit(torch.where(inside, images_of(2, seed=1), images)), logits, atol=1e-3)


@torch.no_grad()
def test_every_token_passes_where_nothing_is_chosen(make_vit: Any) -> None:
    vit, images = make_vit(), images_of(1)
    expected = vit(images)
    with token_gather(vit):
        assert torch.equal(vit(images), expected)


def test_gather_by_hand() -> None:
    gather = TokenGather(num_prefix_tokens=1)
    gather.keep = torch.tensor([[2, 0], [1, 1]])
    tokens = torch.tensor([[9.0, 10, 11, 12], [19, 20, 21, 22]]).unsqueeze(-1)
    assert gather(tokens)[..., 0].tolist() == [[9, 12, 10], [19, 21, 21]]


def test_the_slot_is_put_back(make_vit: Any) -> None:
    vit = make_vit()
    slot = vit.patch_drop
    with token_gather(vit) as gather:
        assert vit.patch_drop is gather
    assert vit.patch_drop is slot
    with pytest.raises(KeyError), token_gather(vit):
        raise KeyError
    assert vit.patch_drop is slot


@pytest.mark.parametrize("model", [nn.Linear(1, 1), SimpleNamespace(patch_drop=None)])
def test_a_model_without_the_slot_is_refused(model: Any) -> None:
    with pytest.raises(DfqError, match=rf"^{type(model).__name__} has no patch_drop slot"), token_gather(model):
        pass


def test_the_grid_of_a_model_that_is_not_square(make_vit: Any) -> None:
    grid = PatchGrid.of(make_vit(img_size=(32, 48), patch_size=(8, 16)))
    assert grid == PatchGrid(rows=4, columns=3, height=8, width=16)
    assert grid.num_patches == 12
    assert grid.image_size == (32, 48)


def test_mask_and_pixels_by_hand() -> None:
    grid = PatchGrid(rows=2, columns=3, height=1, width=2)
    mask = grid.mask_of(torch.tensor([[0, 5], [1, 3]]))
    assert mask.int().tolist() == [[[1, 0, 0], [0, 0, 1]], [[0, 1, 0], [1, 0, 0]]]
    pixels = grid.to_pixels(mask)
    assert pixels.dtype == torch.bool
    assert pixels.int().tolist() == [
        [[[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]],
        [[[0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]],
    ]
    # A patch is as high as `height` says, not as wide.
    tall = PatchGrid(rows=1, columns=2, height=3, width=1).to_pixels(torch.tensor([[[False, True]]]))
    assert tall.int().tolist() == [[[[0, 1], [0, 1], [0, 1]]]]


@given(st.integers(1, 12).flatmap(lambda k: st.lists(st.permutations(range(12)).map(lambda p: p[:k]), min_size=1)))
def test_keep_and_mask_tell_the_same(chosen: list[list[int]]) -> None:
    keep = torch.tensor(chosen)
    mask = PatchGrid(rows=3, columns=4, height=2, width=2).mask_of(keep)
    assert keep_of_mask(mask).tolist() == [sorted(row) for row in chosen]


def test_images_that_keep_different_numbers_of_patches_cannot_share_a_batch() -> None:
    mask = torch.tensor([[[True, True]], [[True, False]]])
    with pytest.raises(ValueError, match="images of one batch keep 1 to 2 patches"):
        keep_of_mask(mask)


class TestPatchProjection:
    @pytest.mark.parametrize("arguments", [*VARIANTS, pytest.param({"dynamic_img_size": True}, id="dynamic size")])
    def test_the_same_logits_and_gradient_as_by_convolution(self, make_vit: Any, arguments: dict[str, Any]) -> None:
        vit, images = make_vit(**arguments), images_of(2).requires_grad_()
        results = []
        for sparse in (False, True):
            with token_gather(vit) as gather, patch_projection(vit, gather, torch.float32) if sparse else nullcontext():
                gather.keep = KEEP
                logits = vit(images)
            results.append((logits, torch.autograd.grad(logits.square().sum(), images)[0]))
        for by_convolution, by_projection in zip(*results, strict=True):
            torch.testing.assert_close(by_projection, by_convolution, rtol=1e-4, atol=1e-5)

    def test_other_patches_are_not_embedded(self, make_vit: Any) -> None:
        vit = make_vit()
        with token_gather(vit) as gather, patch_projection(vit, gather, torch.float32):
            gather.keep = KEEP
            tokens = vit.patch_embed(images_of(2))
        embedded = tokens.abs().sum(-1) > 0
        assert embedded.nonzero()[:, 1].view(2, -1).tolist() == KEEP.tolist()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_all_patches_where_nothing_is_chosen(self, make_vit: Any, dtype: torch.dtype) -> None:
        vit, images = make_vit(), images_of(2).requires_grad_()
        expected = vit.patch_embed(images)
        (gradient,) = torch.autograd.grad(expected.square().sum(), images)
        with patch_projection(vit, None, dtype):
            tokens = vit.patch_embed(images)
        assert tokens.dtype == dtype
        accuracy = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(tokens.float(), expected, rtol=accuracy, atol=10 * accuracy)
        moved = torch.autograd.grad(tokens.float().square().sum(), images)[0]
        torch.testing.assert_close(moved, gradient, rtol=accuracy, atol=100 * accuracy)

    def test_it_is_put_back(self, make_vit: Any) -> None:
        vit = make_vit()
        convolution = vit.patch_embed.proj
        with token_gather(vit) as gather, patch_projection(vit, gather, torch.float32):
            assert isinstance(vit.patch_embed.proj, PatchProjection)
        assert vit.patch_embed.proj is convolution

    def test_overlapping_patches_are_left_to_the_convolution(self, make_vit: Any) -> None:
        vit = make_vit()
        vit.patch_embed.proj = nn.Conv2d(3, 16, 10, stride=8, padding=1)
        with token_gather(vit) as gather, patch_projection(vit, gather, torch.float32):
            assert type(vit.patch_embed.proj) is nn.Conv2d

    def test_patches_of_an_image_by_hand(self) -> None:
        image = torch.arange(24).view(1, 1, 4, 6)
        patches = PatchGrid(2, 3, 2, 2).patches_of(image)
        assert patches.shape == (1, 2, 3, 1, 2, 2)
        assert patches[0, 1, 2, 0].tolist() == [[16, 17], [22, 23]]
        assert patches.data_ptr() == image.data_ptr()
