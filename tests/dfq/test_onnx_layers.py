"""What stands in for quantized layers when they are exported computes the same, in the operators of ONNX."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.models import Model
from dfq.onnx_layers import QuantizeDequantize, SplitLinear, StandardLinear, standardize
from dfq.ptq.modules import QuantizedLinear
from dfq.recipe import load_recipe, recipe_from_dict
from quantizers import Granularity, LogQuantizer, OutlierQuantizer, PerGroup, PerTensor, UniformQuantizer

SWIN = {"depths": (1, 1), "num_heads": (2, 2), "patch_size": 4, "window_size": 4, "depth": None}


def uniform(bits: int, *, symmetric: bool, scale: float, zero_point: int = 0) -> UniformQuantizer:
    tensors = {"scale": torch.tensor([scale])}
    if not symmetric:
        tensors["zero_point"] = torch.tensor([zero_point])
    return UniformQuantizer(bits, symmetric=symmetric).load_tensors(tensors)


def test_the_pair_rounds_as_onnx_says() -> None:
    pair = QuantizeDequantize(uniform(8, symmetric=False, scale=0.5, zero_point=3), "x")
    # To q = round(x / 0.5) + 3, from 0 to 255: 1.25 is between 2 and 3 and goes to the even one.
    x = torch.tensor([0.0, 0.26, 1.25, -1.5, -9.0, 126.0, 500.0])
    assert pair(x).tolist() == [0.0, 0.5, 1.0, -1.5, -1.5, 126.0, 126.0]
    signed = QuantizeDequantize(uniform(8, symmetric=True, scale=0.5), "x")
    assert signed(torch.tensor([-70.0, 70.0])).tolist() == [-64.0, 63.5]


def test_fewer_bits_are_a_clipped_range_of_eight() -> None:
    pair = QuantizeDequantize(uniform(4, symmetric=False, scale=0.5, zero_point=3), "x")
    # 0 to 15: from (0 - 3) / 2 to (15 - 3) / 2.
    assert pair(torch.tensor([-2.0, 5.9, 7.0])).tolist() == [-1.5, 6.0, 6.0]
    assert pair.zero_point.dtype == torch.uint8


def quantized_linear(
    weight: Tensor, bits: int, input_quantizer: nn.Module, granularity: Granularity | None = None
) -> QuantizedLinear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data = weight
    quantized = QuantizedLinear(layer.requires_grad_(False))
    quantizer = UniformQuantizer(bits, symmetric=True, granularity=granularity or PerTensor()).fit(weight)
    quantized.set_integers(quantizer, quantizer.quantize(weight))
    quantized.input = input_quantizer
    return quantized


def test_channels_apart_have_a_product_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 6, generator=generator), torch.randn(4, 6, generator=generator)
    x[:, [1, 4]] *= 200
    quantizer = OutlierQuantizer(UniformQuantizer(8, symmetric=False), torch.tensor([1, 4])).fit(x)
    layer = quantized_linear(weight, 8, quantizer)
    split = SplitLinear(layer, quantizer, "x")
    torch.testing.assert_close(split(x), layer(x))
    # The integers of the large product know nothing of the two large channels.
    assert float(split.input.scale) < 0.1
    assert split.rows.integers.shape == (2, 4)


def test_channels_apart_of_weights_in_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 6, generator=generator), torch.randn(4, 6, generator=generator)
    x[:, [1, 4]] *= 200
    quantizer = OutlierQuantizer(UniformQuantizer(8, symmetric=False), torch.tensor([1, 4])).fit(x)
    layer = quantized_linear(weight, 4, quantizer, PerGroup(4))
    split = SplitLinear(layer, quantizer, "x")
    torch.testing.assert_close(split(x), layer(x))
    assert split.weight.integers.shape == (4, 2, 4)
    # Two columns of groups have groups no more.
    assert torch.equal(split.rows(), layer.weight[:, [1, 4]].t())


def test_a_linear_has_its_weights_the_other_way_round() -> None:
    weight = torch.tensor([[1.27, -0.5, 0.0], [0.1, 0.2, -1.27]])
    layer = quantized_linear(weight, 8, nn.Identity())
    standard = StandardLinear(layer)
    assert standard.weight.integers.tolist() == [[127, 10], [-50, 20], [0, -127]]
    x = torch.tensor([[1.0, 2.0, 3.0]])
    torch.testing.assert_close(standard(x), layer(x))


@pytest.mark.parametrize("recipe", ["deploy", "fast", "paper", "ptq4vit"])
@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_the_network_computes_the_same(
    recipe: str, architecture: str, tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    is_swin = architecture.startswith("swin")
    model = tiny(architecture, **(SWIN if is_swin else {}))
    images = images_for(8, mask=torch.ones(8, *(8, 8) if is_swin else (4, 4), dtype=torch.bool))
    quantized = dfq.quantize(model, "w4a6", calibration=images, recipe=recipe, progress=False)
    network, elementary = standardize(quantized.module, quantized.sites)
    x, _ = images.batches(8, torch.device("cpu"))[0]
    torch.testing.assert_close(network(x), quantized(x), rtol=1e-3, atol=1e-3)
    assert all("weight" not in name for name in elementary)
    if recipe == "deploy":
        assert elementary == []
    if recipe == "fast":
        assert any(name.endswith("blocks.0.attn.q") for name in elementary)


def test_channels_apart_elsewhere_stay_elementary(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    """Only a linear has a product that those channels can be taken out of."""
    model = tiny()
    model.module.blocks[0].attn.qkv.weight[:1] *= 1000
    sites = {"blocks.0.attn.q": {"quantize": True, "outliers": 20.0}}
    content = {"activations": {"quantize": False, "range": "mse"}, "sites": sites}
    recipe = recipe_from_dict(content, name="test", where="test")
    quantized = dfq.quantize(model, "w8a8", calibration=images_for(), recipe=recipe, progress=False)
    assert isinstance(quantized.sites["blocks.0.attn.q"], OutlierQuantizer)
    network, elementary = standardize(quantized.module, quantized.sites)
    assert elementary == ["blocks.0.attn.q"]
    x, _ = images_for().batches(5, torch.device("cpu"))[0]
    torch.testing.assert_close(network(x), quantized(x), rtol=1e-3, atol=1e-3)


def test_grids_that_onnx_lacks_are_left_and_named(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    content = load_recipe("deploy").to_dict()
    del content["name"]
    content["sites"] = {"blocks.1.mlp.fc2.input": {"quantizer": "log", "split": "sign"}}
    recipe = recipe_from_dict(content, name="test", where="test")
    quantized = dfq.quantize(tiny(), "w8a8", calibration=images_for(), recipe=recipe, progress=False)
    network, elementary = standardize(quantized.module, quantized.sites)
    assert elementary == ["blocks.1.mlp.fc2.input"]
    assert isinstance(network.get_submodule("blocks.1.mlp.fc2.input"), LogQuantizer)
    assert isinstance(network.get_submodule("blocks.0.mlp.fc2.input"), QuantizeDequantize)
    assert isinstance(quantized.module.get_submodule("blocks.0.mlp.fc2.input"), UniformQuantizer)  # left alone
