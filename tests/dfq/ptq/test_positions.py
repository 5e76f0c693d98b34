"""What tokens of one position have in common, kept from rounding: what it is, what for, and where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.checkpoint import save_plain
from dfq.errors import CheckpointError, DfqError
from dfq.models import Model
from dfq.onnx_layers import standardize
from dfq.ptq.modules import PositionMean, QuantizedLinear
from dfq.ptq.positions import set_positions_apart
from dfq.ptq.sites import PlannedSite, Site
from dfq.recipe import Recipe, SiteSettings, recipe_from_dict
from quantizers import DynamicQuantizer


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_linear(weight: Tensor) -> QuantizedLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.zero_()
    return QuantizedLinear(linear)


def apart(weight: Tensor, tokens: list[Tensor], *, rank: int = 8, bits: int = 4, **settings: Any) -> QuantizedLinear:
    """A linear after `set_positions_apart` saw batches of tokens [B, N, C] enter it."""
    module = nn.ModuleDict({"fc": a_linear(weight)})
    planned = PlannedSite(Site("fc", "input"), bits, SiteSettings(dynamic_up_to=7, position_rank=rank, **settings))
    with torch.no_grad():
        set_positions_apart(module, [planned], tokens, module["fc"])
    layer = module["fc"]
    assert isinstance(layer, QuantizedLinear)
    return layer


def mean_of(layer: QuantizedLinear) -> PositionMean:
    assert layer.position_mean is not None
    return layer.position_mean


def test_the_mean_over_images_and_what_the_weights_make_of_it() -> None:
    # Two images of two positions: their means are (2, 0) and (4, 0).
    tokens = torch.tensor([[[1.0, 1.0], [3.0, -1.0]], [[3.0, -1.0], [5.0, 1.0]]])
    weight = torch.tensor([[0.5, 1.0], [0.0, 2.0], [-1.0, 0.0]])
    mean = mean_of(apart(weight, [tokens[:1], tokens[1:], tokens]))
    torch.testing.assert_close(mean.common(), torch.tensor([[2.0, 0.0], [4.0, 0.0]]), rtol=1e-3, atol=1e-3)
    product = torch.tensor([[1.0, 0.0, -2.0], [2.0, 0.0, -4.0]])
    torch.testing.assert_close(mean.product(), product, rtol=1e-3, atol=1e-3)
    assert mean.positions.shape == (2, 1)  # Of rank one, and no more is kept.
    assert {tensor.dtype for tensor in mean.buffers()} == {torch.float16}


@pytest.mark.parametrize("rank", [1, 3])
def test_the_rank_is_what_the_recipe_allows(rank: int) -> None:
    places = randn(20, 4) @ torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0])) @ randn(4, 12, seed=1)
    mean = mean_of(apart(randn(6, 12, seed=2), [places.expand(5, 20, 12)], rank=rank))
    left, sizes, right = torch.linalg.svd(places)
    best = (left[:, :rank] * sizes[:rank]) @ right[:rank]  # Eckart and Young: none of this rank is nearer.
    assert mean.positions.shape == (20, rank)
    assert (mean.common() - best).norm() < 2e-3 * best.norm()


def test_what_is_hardly_there_is_left() -> None:
    content = randn(1, 20, 12)
    tokens = torch.cat([content, -content] * 2) + 0.01 * randn(20, 12, seed=1)
    assert apart(randn(6, 12, seed=2), [tokens]).position_mean is None


@pytest.mark.parametrize(("num_images", "there"), [(3, False), (4, True)])
def test_a_few_images_say_nothing_of_others(num_images: int, there: bool) -> None:
    layer = apart(randn(6, 12, seed=2), [randn(20, 12).expand(num_images, 20, 12)])
    assert (layer.position_mean is not None) is there


@torch.no_grad()
def test_rounding_sees_what_differs_from_image_to_image() -> None:
    places, content, weight = 3 * randn(30, 16), randn(64, 30, 16, seed=1), randn(24, 16, seed=2)
    seen, unseen = places + content[:32], places + content[32:]
    exact = unseen @ weight.T

    def error(rank: int) -> float:
        layer = apart(weight, [seen], rank=rank, bits=3)
        mean = 0 if layer.position_mean is None else layer.position_mean.common()
        quantizer = DynamicQuantizer(3, symmetric=False).fit(seen - mean)
        layer.input = quantizer
        return float((layer(unseen) - exact).square().mean())

    # A tenth of the energy is content; the grid of a token is as fine as what passes it is small.
    assert error(16) < 0.2 * error(0)


def test_the_function_in_full_precision_stays(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    model, images = tiny(), images_for(8)
    plain, kept = (
        dfq.quantize(model, "w8a7", calibration=images, recipe=recipe(rank), progress=False) for rank in (0, 8)
    )
    layers = [m for m in kept.module.modules() if isinstance(m, QuantizedLinear) and m.position_mean is not None]
    assert len(layers) == 4  # qkv and fc1 of two blocks.
    x, _ = images.batches(8, torch.device("cpu"))[0]
    exact = model(x)
    assert (kept(x) - exact).norm() < 0.05 * exact.norm()
    assert (kept(x) - exact).norm() < 1.1 * (plain(x) - exact).norm()


def recipe(rank: int) -> Recipe:
    """The weights in 8 bits, for they would hide what activations lose."""
    inputs = {"dynamic_up_to": 7, "position_rank": rank}
    sites = {"blocks.*.attn.qkv.input": inputs, "blocks.*.mlp.fc1.input": inputs}
    content = {"weights": {"granularity": "channel"}, "activations": {"range": "mse"}, "sites": sites}
    return recipe_from_dict(content, name="mine", where="test")


@pytest.mark.parametrize(("bits", "sparse"), [("w4a8", False), ("w4a6", True)])
def test_there_is_none_for_static_ranges_nor_where_patches_are_missing(
    bits: str, sparse: bool, tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    mask = torch.ones(6, 4, 4, dtype=torch.bool)
    mask[:, :2] = not sparse
    quantized = dfq.quantize(tiny(), bits, calibration=images_for(6, mask), recipe=recipe(8), progress=False)
    assert not any("position_mean" in name for name in quantized.tensors())


@pytest.mark.parametrize("norm_layer", ["layernorm", "rmsnorm"])
def test_there_is_none_where_each_channel_has_a_range(
    norm_layer: str, tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    """An RMSNorm has no offset, so ranges per channel are not moved into it, and stay."""
    quantized = dfq.quantize(tiny(norm_layer=norm_layer), "w4a4", calibration=images_for(6), progress=False)
    scales = quantized.sites["blocks.0.attn.qkv.input"].tensors().get("scale", torch.ones(1))
    assert len(scales) == (24 if norm_layer == "rmsnorm" else 1)
    assert any("position_mean" in name for name in quantized.tensors()) is (norm_layer == "layernorm")


def test_it_is_saved_and_exported_with_the_model(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet], tmp_path: Path
) -> None:
    images = images_for(8)
    quantized = dfq.quantize(tiny(), "w4a5", calibration=images, recipe=recipe(2), progress=False)
    dfq.save(quantized, tmp_path / "out")
    loaded = dfq.load(tmp_path / "out", device="cpu")
    x, _ = images.batches(8, torch.device("cpu"))[0]
    assert torch.equal(loaded(x), quantized(x))
    assert quantized.tensors()["blocks.0.attn.qkv.position_mean.positions"].shape == (17, 2)
    network, _ = standardize(quantized.module, quantized.sites)
    torch.testing.assert_close(network(x), quantized(x), rtol=1e-3, atol=1e-3)
    exported = dfq.export(quantized, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(exported.path)
    (found,) = session.run(None, {"images": x.numpy()})
    # At 5 bits one activation that is rounded the other way moves a logit by some hundredths.
    assert (torch.from_numpy(found) - quantized(x)).norm() < 0.1 * quantized(x).norm()
    with pytest.raises(DfqError, match=r"has no place for blocks\.0\.attn\.qkv\.position_mean"):
        save_plain(quantized, tmp_path / "plain.safetensors")


def test_a_file_with_another_shape_of_it_is_refused(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet], tmp_path: Path
) -> None:
    quantized = dfq.quantize(tiny(), "w4a5", calibration=images_for(8), recipe=recipe(2), progress=False)
    layer = quantized.module.get_submodule("blocks.1.mlp.fc1")
    assert isinstance(layer, QuantizedLinear)
    mean = mean_of(layer)
    mean.given = mean.given[:, :-1].clone()
    dfq.save(quantized, tmp_path)
    with pytest.raises(CheckpointError, match=r"the means of positions of blocks\.1\.mlp\.fc1 do not fit it"):
        dfq.load(tmp_path, device="cpu")
