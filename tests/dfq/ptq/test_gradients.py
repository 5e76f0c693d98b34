"""How much each token matters: gradients by token, against autograd asked directly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.models import Model
from dfq.ptq.gradients import stage_importance, tempered, token_gradients
from dfq.ptq.modules import adapt
from dfq.ptq.search import fisher_logit_gradient
from dfq.ptq.stages import stages
from dfq.recipe import load_recipe

LAYERS = ("patch_embed.proj", "blocks.0.attn.qkv", "blocks.1.mlp.fc2", "head")


def pictures(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def test_gradients_are_those_of_a_draw_from_the_prediction(tiny: Callable[..., Model]) -> None:
    model = tiny()
    network, images = adapt(model.module), pictures(3)
    found = token_gradients(network, LAYERS, [(images, None)])
    # Linears of the network itself, asked one by one; 16 patches and the class token.
    shapes = {"patch_embed.proj": (3, 16), "blocks.0.attn.qkv": (3, 17), "blocks.1.mlp.fc2": (3, 17), "head": (3,)}
    for path, shape in shapes.items():
        outputs: list[Tensor] = []
        handle = network.get_submodule(path).register_forward_hook(lambda _m, _a, out, kept=outputs: kept.append(out))
        with torch.enable_grad():
            logits = network(images.clone().requires_grad_())
        handle.remove()
        direction = fisher_logit_gradient(logits, torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad(logits, outputs, direction)
        expected = gradient.square().flatten(2).sum(1) if gradient.dim() == 4 else gradient.square().sum(-1)
        assert found[path][0].shape == shape
        torch.testing.assert_close(found[path][0], expected, rtol=1e-4, atol=1e-10)


def test_only_the_class_token_matters_behind_the_last_attention(tiny: Callable[..., Model]) -> None:
    network = adapt(tiny(global_pool="token").module)
    (found,) = token_gradients(network, ["blocks.1.mlp.fc2"], [(pictures(2), None)]).values()
    assert bool((found[0][:, 0] > 0).all())
    assert not bool(found[0][:, 1:].any())


def test_batches_come_as_they_were_and_sparse_ones_with_their_tokens(tiny: Callable[..., Model]) -> None:
    network = adapt(tiny().module)
    keep = torch.tensor([[0, 3, 5]] * 9)
    batches = [(pictures(10), None), (pictures(9), keep)]
    (found,) = token_gradients(network, ["blocks.0.mlp.fc1"], batches).values()
    assert [tuple(each.shape) for each in found] == [(10, 17), (9, 4)]


@pytest.mark.parametrize("recipe", ["fast", "accurate"])
def test_models_that_pool_by_attention(
    recipe: str, tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    """What their pool projects of its own query hangs on no image."""
    model, chosen = tiny(global_pool="map"), load_recipe(recipe)
    if chosen.reconstruction is not None:
        chosen = replace(chosen, reconstruction=replace(chosen.reconstruction, iterations=2))
    quantized = dfq.quantize(model, "w8a8", calibration=images_for(), recipe=chosen, progress=False)
    x = pictures(3)
    assert "attn_pool.q.weight" in quantized.sites
    assert (quantized(x) - model(x)).norm() < 0.2 * model(x).norm()


def test_swin_has_gradients_of_windows_and_merged_patches(tiny_swin: Callable[..., Model]) -> None:
    network = adapt(tiny_swin().module)
    paths = ["layers.0.blocks.1.attn.qkv", "layers.1.downsample.reduction"]
    found = token_gradients(network, paths, [(pictures(2), None)])
    assert found[paths[0]][0].shape == (8, 16)  # 2 images of 4 windows of 4x4
    assert found[paths[1]][0].numel() == 2 * 16


def test_tempering_by_hand() -> None:
    # The mean is 2, so 0.002 is added to each.
    (found,) = tempered([torch.tensor([0.0, 4.0])], 0.5)
    torch.testing.assert_close(found, torch.tensor([0.002, 4.002]).sqrt() / 2**0.5)
    (level,) = tempered([torch.tensor([0.0, 4.0])], 0.0)
    assert level.tolist() == [1.0, 1.0]
    (silent,) = tempered([torch.zeros(3)], 0.5)
    assert bool(silent.isfinite().all())


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_the_importance_of_a_block_is_that_of_its_last_linear(tiny: Callable[..., Model], power: float) -> None:
    network = adapt(tiny().module)
    stem, block, *_ = stages(network)
    gradients: dict[str, Any] = {"blocks.0.mlp.fc2": [torch.tensor([[1.0, 3.0]])]}
    assert stage_importance(stem, gradients, 0.5) is None
    found = stage_importance(block, gradients, power)
    if power == 0:
        assert found is None
    else:
        assert found is not None
        torch.testing.assert_close(found[0], tempered(gradients["blocks.0.mlp.fc2"], power)[0])
