"""Block reconstruction: errors that shrink, integers that fit their grids, gradients worked out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.models import Model
from dfq.ptq.modules import QuantizedLayer, QuantizedLinear
from dfq.ptq.reconstruct import Reconstructor
from dfq.ptq.stages import Stage
from dfq.recipe import Reconstruction, load_recipe
from dfq.recipe_values import Rounding
from quantizers import PerAxis, UniformQuantizer

# Of a network this small rotations and compensation leave little to be tuned.
BASE = replace(load_recipe("accurate"), num_images=8, rotate=None, compensation=None)
SETTINGS = Reconstruction(iterations=40, batch_size=8, weight_rate=2e-2, scale_rate=3e-3, bias_rate=3e-3)


def logits_error(model: Model, images: CalibrationSet, reconstruction: Reconstruction | None, bits: str) -> float:
    recipe = replace(BASE, reconstruction=reconstruction)
    quantized = dfq.quantize(model, bits, calibration=images, recipe=recipe, progress=False)
    pixels = torch.cat([batch for batch, _ in images.batches(8, torch.device("cpu"))])
    return float((quantized(pixels) - model(pixels)).square().mean())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient": 0.5},
        {"feature": 1.0},
        {"stretch": 1.0},
        {"stretch": 1.0, "feature": 1.0},
        {"drop": 0.0},
        {"drop": 1.0},
        {"rounding": "adaround", "rounding_rate": 0.1, "iterations": 100},
    ],
)
def test_reconstruction_brings_the_logits_nearer(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet], changes: dict[str, Any]
) -> None:
    model, images = tiny(), images_for(8)
    before = logits_error(model, images, None, "w3a4")
    assert logits_error(model, images, replace(SETTINGS, **changes), "w3a4") < 0.95 * before


@pytest.mark.parametrize("rounding", ["ste", "adaround"])
def test_nothing_moves_at_rates_of_zero(
    rounding: Rounding, tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    model, images = tiny(), images_for(8)
    rates = {"weight_rate": 0.0, "rounding_rate": 0.0, "scale_rate": 0.0, "bias_rate": 0.0}
    still = replace(SETTINGS, rounding=rounding, iterations=2, **rates)
    plain, tuned = (
        dfq.quantize(model, "w4a4", calibration=images, recipe=replace(BASE, reconstruction=how), progress=False)
        for how in (None, still)
    )
    for name, tensor in plain.tensors().items():
        torch.testing.assert_close(tuned.tensors()[name], tensor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rounding", ["ste", "adaround"])
def test_what_was_tuned_is_on_its_grids_saved_and_the_same_again(
    rounding: Rounding, tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet], tmp_path: Path
) -> None:
    model, images = tiny(), images_for(8)
    recipe = replace(BASE, reconstruction=replace(SETTINGS, rounding=rounding, iterations=5))
    first, second = (dfq.quantize(model, "w4a4", calibration=images, recipe=recipe, progress=False) for _ in range(2))
    for layer in first.module.modules():
        if isinstance(layer, QuantizedLayer):
            assert layer.integers is not None
            assert layer.weight_quantizer is not None
            assert torch.equal(layer.weight, layer.weight_quantizer.dequantize(layer.integers))
            assert not layer.weight.requires_grad
            assert isinstance(layer.input, UniformQuantizer) or type(layer.input).__module__.startswith("quantizers.")
    assert not any(parameter.requires_grad for parameter in first.module.parameters())
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first(x), second(x))
    dfq.save(first, tmp_path)
    assert torch.equal(dfq.load(tmp_path, device="cpu")(x), first(x))


def test_sparse_images_and_batches_of_different_lengths(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    mask = torch.ones(6, 4, 4, dtype=torch.bool)
    mask[:3, :2] = False
    recipe = replace(BASE, reconstruction=replace(SETTINGS, iterations=4))
    quantized = dfq.quantize(tiny(), "w4a4", calibration=images_for(6, mask), recipe=recipe, progress=False)
    assert bool(quantized(torch.zeros(1, 3, 32, 32)).isfinite().all())


def test_swin_is_reconstructed_too(tiny_swin: Callable[..., Model], images_for: Callable[..., CalibrationSet]) -> None:
    images = images_for(4, torch.ones(4, 8, 8, dtype=torch.bool))
    recipe = replace(BASE, reconstruction=replace(SETTINGS, iterations=3, feature=0.5))
    tuned = dfq.quantize(tiny_swin(), "w3a8", calibration=images, recipe=recipe, progress=False)
    plain = dfq.quantize(tiny_swin(), "w3a8", calibration=images, recipe=replace(BASE, reconstruction=None))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    assert bool(tuned(x).isfinite().all())
    moved = [name for name, tensor in plain.tensors().items() if not torch.equal(tensor, tuned.tensors()[name])]
    for block in ("layers.0.blocks.1", "layers.1.downsample", "layers.1.blocks.0"):
        assert any(name.startswith(block) for name in moved)
    assert not any(name.startswith(("patch_embed", "head", "norm")) for name in moved)


def test_tokens_of_a_swin_count_by_their_gradient(
    tiny_swin: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    images = images_for(4, torch.ones(4, 8, 8, dtype=torch.bool))
    kept = []
    for gradient in (0.0, 0.5):
        recipe = replace(BASE, reconstruction=replace(SETTINGS, iterations=3, gradient=gradient))
        tuned = dfq.quantize(tiny_swin(), "w3a8", calibration=images, recipe=recipe, progress=False)
        kept.append(tuned.tensors())
    moved = {name for name in kept[0] if not torch.equal(kept[0][name], kept[1][name])}
    assert any(name.startswith("layers.0.blocks.1") for name in moved)
    assert not any(name.startswith(("patch_embed", "head", "norm")) for name in moved)


@pytest.fixture
def correlated() -> tuple[torch.Tensor, torch.Tensor, UniformQuantizer]:
    """Inputs [64, 16, 24] of which a few directions hold the most, weights [32, 24], and their grid of 3 bits."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, generator=generator) * torch.logspace(0, -1.5, 24).unsqueeze(1)
    inputs = torch.randn(64, 16, 24, generator=generator) @ mix
    weights = torch.randn(32, 24, generator=generator)
    return inputs, weights, UniformQuantizer(3, symmetric=False, granularity=PerAxis(0)).fit(weights)


@torch.no_grad()
def test_adaround_beats_rounding_to_nearest_by_rounding_up_or_down(
    correlated: tuple[torch.Tensor, torch.Tensor, UniformQuantizer],
) -> None:
    inputs, weights, quantizer = correlated
    linear = nn.Linear(24, 32, bias=False)
    linear.weight.copy_(weights)
    layer = QuantizedLinear(linear)
    module, scale = nn.Sequential(layer), quantizer.tensors()["scale"]
    stage, original = Stage("layer", module, module, ("0.",)), copy.deepcopy(module)
    seen, unseen = inputs[:32], inputs[32:]
    nearest = quantizer.quantize(weights)
    layer.set_integers(quantizer, nearest)

    def error(x: torch.Tensor) -> float:
        return float((layer(x) - x @ weights.T).square().mean())

    before, before_unseen = error(seen), error(unseen)
    settings = Reconstruction(rounding="adaround", iterations=150, rounding_rate=0.1, drop=0.0)
    reconstructor = Reconstructor(module, settings, [seen], module, {})
    reconstructor.tune(stage, original, [seen], [seen @ weights.T])
    assert error(seen) < 0.6 * before
    assert error(unseen) < 0.6 * before_unseen
    assert torch.equal(quantizer.tensors()["scale"], scale)
    assert layer.integers is not None
    steps = weights / scale.unsqueeze(1) + quantizer.tensors()["zero_point"].unsqueeze(1)
    low, high = (end.clamp(quantizer.qmin, quantizer.qmax) for end in (steps.floor(), steps.floor() + 1))
    assert bool(((layer.integers == low) | (layer.integers == high)).all())
    assert 0.05 < float((layer.integers != nearest).float().mean()) < 0.5
