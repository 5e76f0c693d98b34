"""What enters a stage moved away from its mean: by how much, where it is used, and what it is for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.models import Model
from dfq.ptq.modules import QuantizedLinear
from dfq.ptq.reconstruct import Reconstructor
from dfq.ptq.stages import Stage
from dfq.ptq.stretch import away, stretched
from dfq.recipe import Reconstruction, load_recipe
from quantizers import MSE, PerAxis, UniformQuantizer


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_each_image_moves_along_the_line_from_the_mean() -> None:
    tokens = randn(6, 5, 3) + 4
    moved = away(tokens, tokens.mean(0), 2.0, torch.Generator().manual_seed(1))
    shares = moved / (tokens - tokens.mean(0))
    assert shares.flatten(1).std(1).max() < 1e-4  # One share for all of an image,
    assert len(shares[:, 0, 0].unique()) == 6  # another for each.
    assert 0 <= shares.min() <= shares.max() <= 2
    assert torch.equal(away(tokens, tokens.mean(0), 0.0, torch.Generator()), torch.zeros(6, 5, 3))


def test_batches_may_differ_in_shape_and_a_stage_has_its_own_draw() -> None:
    batches = [randn(4, 7, 3), randn(2, 5, 3, seed=1), randn(1, 2, 2, 3, seed=2)]
    found = stretched(batches, 1.0, "blocks.3")
    assert [batch.shape for batch in found] == [batch.shape for batch in batches]
    assert not torch.allclose(found[0], batches[0])
    torch.testing.assert_close(found[2], batches[2])  # Of one image the mean is itself.
    for one, again in zip(found, stretched(batches, 1.0, "blocks.3"), strict=True):
        assert torch.equal(one, again)
    assert not torch.equal(found[0], stretched(batches, 1.0, "blocks.4")[0])


def test_ranges_are_found_for_what_lies_further_out(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    plain = replace(load_recipe("fast"), stretch=0.0, reparametrize=None)
    model, images = tiny(), images_for(8)
    scales = [
        {
            name: tensor.mean().item()
            for name, tensor in dfq.quantize(model, "w4a4", calibration=images, recipe=recipe, progress=False)
            .tensors()
            .items()
            if name.endswith("mlp.fc1.input.scale") or name == "head.input.scale"
        }
        for recipe in (plain, replace(plain, stretch=3.0))
    ]
    within = [name for name in scales[0] if name.startswith("blocks.")]
    assert within
    assert all(scales[1][name] != scales[0][name] for name in within)
    assert scales[1]["head.input.scale"] == scales[0]["head.input.scale"]  # The head is no block.


@torch.no_grad()
def test_tuning_on_what_is_stretched_serves_what_lies_further_out() -> None:
    seen, unseen = randn(32, 16, 24), 3 * randn(32, 16, 24, seed=1)
    weights = randn(32, 24, seed=2)

    def error(stretch: float) -> tuple[float, float]:
        linear = nn.Linear(24, 32, bias=False)
        linear.weight.copy_(weights)
        layer = QuantizedLinear(linear)
        module = nn.Sequential(layer)
        stage, original = Stage("layer", module, module, ("0.",)), copy.deepcopy(module)
        quantizer = UniformQuantizer(4, symmetric=False, granularity=PerAxis(0), search=MSE()).fit(weights)
        layer.set_integers(quantizer, quantizer.quantize(weights))
        layer.input = UniformQuantizer(4, symmetric=False, search=MSE()).fit(seen)
        settings = Reconstruction(iterations=150, scale_rate=2e-2, drop=0.0, stretch=stretch)
        reconstructor = Reconstructor(module, settings, [seen], module, {})
        reconstructor.tune(stage, original, [seen], [seen @ weights.T])
        return tuple(float((layer(x) - x @ weights.T).square().mean()) for x in (seen, unseen))  # type: ignore[return-value]

    plain, moved = error(0.0), error(4.0)
    assert moved[1] < 0.7 * plain[1]
    assert moved[0] > plain[0]  # Nothing is free.
