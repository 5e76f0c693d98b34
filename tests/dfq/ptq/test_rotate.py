"""Channels rotated between layers: the network's function stays, and no channel stands out any more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.models import Model
from dfq.ptq.modules import adapt
from dfq.ptq.rotate import rotate, rotation, rotation_of_differences

STREAM = "blocks.0.norm1"
# Whether the residual stream can be rotated there.
VITS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, True),
    "no qkv bias": ({"qkv_bias": False}, True),
    "layer scale": ({"init_values": 0.1}, True),
    "qk_norm": ({"qk_norm": True}, True),
    "registers": ({"reg_tokens": 3}, True),
    "positions of patches only": ({"no_embed_class": True}, True),
    "no class token": ({"class_token": False, "global_pool": "avg"}, True),
    "mean of the tokens": ({"global_pool": "avg"}, True),
    "norm in the mlp": ({"scale_mlp_norm": True}, True),
    "norm in the attention": ({"scale_attn_norm": True}, True),
    "maximum of the tokens": ({"global_pool": "max"}, False),
    "attention pooling": ({"global_pool": "map"}, False),
    "norm before the blocks": ({"pre_norm": True}, False),
    "norms without offset": ({"norm_layer": "rmsnorm"}, False),
}


def randn(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomized(module: nn.Module) -> nn.Module:
    """Norms, tokens and scales that do something."""
    for number, parameter in enumerate(module.parameters()):
        parameter.add_(randn(*parameter.shape, seed=number) * 0.2)
    return module


def passing(network: nn.Module, path: str, x: Tensor) -> Tensor:
    """What enters the module at this path."""
    seen: list[Tensor] = []
    handle = network.get_submodule(path).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    network(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("which", ["heads", "full"])
@pytest.mark.parametrize("kind", VITS)
def test_the_function_of_a_vit_stays(kind: str, which: Any, tiny: Callable[..., Model]) -> None:
    arguments, whole = VITS[kind]
    module = randomized(tiny(**arguments).module)
    x = randn(3, 3, 32, 32)
    before = module(x)
    adapted = adapt(copy.deepcopy(module))
    stream = passing(adapted, STREAM, x)
    rotate(adapted, which)
    torch.testing.assert_close(adapted(x), before, rtol=1e-3, atol=1e-3 * before.abs().max().item())
    moved = (passing(adapted, STREAM, x) - stream).abs().max() > 0.1 * stream.std()
    assert bool(moved) == (which == "full" and whole)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_norm_without_scale_or_offset_leaves_the_stream_as_it_is(part: str, tiny: Callable[..., Model]) -> None:
    module = randomized(tiny().module)
    setattr(module.blocks[0].norm1, part, None)
    x = randn(3, 3, 32, 32)
    before, stream = module(x), passing(module, STREAM, x)
    adapted = adapt(module)
    rotate(adapted, "full")
    torch.testing.assert_close(adapted(x), before, rtol=1e-3, atol=1e-3 * before.abs().max().item())
    torch.testing.assert_close(passing(adapted, STREAM, x), stream)


@pytest.mark.skipif(not hasattr(Attention(8), "gate"), reason="this timm has no gated attention")
def test_a_gate_reads_the_stream_too(tiny: Callable[..., Model]) -> None:
    module = tiny().module
    for block in module.blocks:
        block.attn = Attention(24, num_heads=3, qkv_bias=True, gated=True).requires_grad_(False)
    randomized(module)
    x = randn(3, 3, 32, 32)
    before = module(x)
    rotate(adapt(module), "full")
    torch.testing.assert_close(module(x), before, rtol=1e-3, atol=1e-3 * before.abs().max().item())


def test_the_function_of_a_swin_stays(tiny_swin: Callable[..., Model]) -> None:
    module = tiny_swin(qkv_bias=False).module
    x = randn(3, 3, 32, 32)
    before = module(x)
    adapted = adapt(copy.deepcopy(module))
    weights = adapted.layers[0].blocks[0].attn.qkv.weight.clone()
    rotate(adapted, "full")
    torch.testing.assert_close(adapted(x), before, rtol=1e-3, atol=1e-3 * before.abs().max().item())
    assert not torch.equal(adapted.layers[0].blocks[0].attn.qkv.weight, weights)


def test_a_channel_that_stands_out_stands_out_no_more(tiny: Callable[..., Model]) -> None:
    def peaks(network: nn.Module) -> list[float]:
        """Of each site the largest channel over the middle one."""
        paths = ["blocks.1.attn.q", "blocks.1.attn.v", "blocks.1.attn.qkv.input"]
        tokens = [passing(network, path, randn(3, 3, 32, 32)).flatten(0, -2) for path in paths]
        return [float(t.abs().amax(0).max() / t.abs().amax(0).median()) for t in tokens]

    module = tiny(embed_dim=64, num_heads=1).module
    qkv = module.blocks[1].attn.qkv
    for channel in (3, 64 + 3, 128 + 7):  # One of q, which k takes back a bit of, one of v.
        qkv.weight[channel] *= 40
    module.blocks[1].norm1.weight[11] *= 40
    adapted = adapt(module)
    assert min(peaks(adapted)) > 8
    rotate(adapted, "full")
    assert max(peaks(adapted)) < 4


@pytest.mark.parametrize("size", [2, 5, 48, 64])
def test_rotations_are_orthogonal_and_those_of_differences_keep_the_ones(size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for found in (rotation(size, generator), rotation_of_differences(size, generator)):
        torch.testing.assert_close(found @ found.T, torch.eye(size, dtype=torch.float64))
    ones = torch.ones(size, dtype=torch.float64)
    torch.testing.assert_close(found @ ones, ones)
    assert size == 2 or (found - torch.eye(size)).abs().max() > 0.1


def test_where_there_is_a_hadamard_matrix_every_channel_is_spread_evenly() -> None:
    found = rotation(16, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.abs(), torch.full((16, 16), 0.25, dtype=torch.float64))


def test_a_recipe_rotates_and_the_file_gives_it_back(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet], tmp_path: Any
) -> None:
    recipe = tmp_path / "turned.toml"
    recipe.write_text('rotate = "full"\n[weights]\ngranularity = "channel"\n')
    model = tiny(init_values=0.1, qkv_bias=False)
    quantized = dfq.quantize(model, "w8a8", calibration=images_for(), recipe=recipe, progress=False)
    assert quantized.recipe.to_dict()["rotate"] == "full"
    x = randn(2, 3, 32, 32)
    error = (quantized.module(x) - model.module(x)).square().mean() / model.module(x).var()
    assert error < 0.01
    dfq.save(quantized, tmp_path / "out")
    torch.testing.assert_close(dfq.load(tmp_path / "out").module(x), quantized.module(x), rtol=0, atol=0)
