"""Networks that are hard to quantize and need not be: the same function, written with channels of unlike sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.models import Model
from dfq.recipe import Recipe, load_recipe, recipe_from_dict
from dfq.reference import digits
from dfq.statistics import sqnr_db
from quantizers import OutlierQuantizer

GELU_SITES = "*blocks.*.mlp.fc2.input"


def logit_sqnr(model: Model, x: Tensor, bits: str, calibration: CalibrationSet, recipe: Recipe | str) -> float:
    exact = model(x)
    found = dfq.quantize(model, bits, calibration=calibration, recipe=recipe, progress=False)(x)
    return sqnr_db(exact.square().sum().item(), (found - exact).square().sum().item())


# --- channels of unlike sizes after a layer norm


@pytest.fixture(scope="module")
def rescaled(reference: Model) -> Model:
    """Three channels of every norm are 30 times as large, and the weights they meet as much smaller."""
    module, chosen = copy.deepcopy(reference.module), [3, 17, 40]
    for block in module.blocks:
        for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            norm.weight[chosen] *= 30
            norm.bias[chosen] *= 30
            linear.weight[:, chosen] /= 30
    return replace(reference, module=module)


@pytest.fixture(scope="module")
def made(reference: Model) -> CalibrationSet:
    return dfq.generate(reference, num_images=16, progress=False)


def test_the_sizes_of_channels_after_a_norm_do_not_matter(
    reference: Model, rescaled: Model, made: CalibrationSet
) -> None:
    pixels, _ = digits("test")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (reference.preprocessing.mean, reference.preprocessing.std))
    x = (pixels[:150].float() / 255 - mean) / std
    torch.testing.assert_close(rescaled(x), reference(x), rtol=1e-3, atol=1e-3)
    plain = recipe_from_dict(
        {"weights": {"granularity": "channel", "range": "output_mse"}, "activations": {"range": "mse"}},
        name="nothing rotated",
        where="test",
    )
    fast = [logit_sqnr(model, x, "w4a8", made, "fast") for model in (reference, rescaled)]
    assert fast[1] > 25
    assert fast[1] > fast[0] - 2
    # Where channels are neither rotated nor rescaled they do.
    assert logit_sqnr(rescaled, x, "w4a8", made, plain) < fast[1] - 2


# --- massive activations


def without_outliers(recipe: Recipe) -> Recipe:
    sites = {name: {k: v for k, v in changes.items() if k != "outliers"} for name, changes in recipe.sites.items()}
    return replace(recipe, sites=sites)


def pictures() -> Tensor:
    """Others of the kind that is calibrated on."""
    pixels = torch.randint(0, 256, (64, 3, 32, 32), generator=torch.Generator().manual_seed(3))
    return (pixels / 255 - 0.5) / 0.25


@pytest.fixture
def massive(tiny: Callable[..., Model]) -> Model:
    """One channel that enters fc2 is 200 times as large as others, where GELU bends no more."""
    model = tiny()
    for block in model.module.blocks:
        block.mlp.fc1.weight[7] *= 200
        block.mlp.fc1.bias[7] = 200
        block.mlp.fc2.weight[:, 7] /= 200
    return model


@pytest.mark.parametrize("bits", ["w8a8", "w4a8"])
@pytest.mark.parametrize("quantizer", ["uniform", "twin_uniform"])
def test_a_massive_activation_costs_the_other_channels_nothing(
    quantizer: str, bits: str, massive: Model, images_for: Callable[..., CalibrationSet]
) -> None:
    x = pictures()
    site = {"quantizer": quantizer, "range": "token_mse", "outliers": 20}
    if quantizer != "uniform":
        site["split"] = "sign"
    fast = load_recipe("fast")
    recipe = replace(fast, sites=fast.sites | {GELU_SITES: site})
    apart, together = (logit_sqnr(massive, x, bits, images_for(16), r) for r in (recipe, without_outliers(recipe)))
    assert apart > together + 5
    assert apart > 14


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_fast_keeps_massive_activations_apart(
    bits: str, massive: Model, images_for: Callable[..., CalibrationSet]
) -> None:
    """Logarithmic levels would do, too, but for their number at 4 bits."""
    x = pictures()
    fast = load_recipe("fast")
    quantized = dfq.quantize(massive, bits, calibration=images_for(16), recipe=fast, progress=False)
    for index in range(2):
        site = quantized.sites[f"blocks.{index}.mlp.fc2.input"]
        assert isinstance(site, OutlierQuantizer)
        assert site.tensors()["channels"].tolist() == [7]
    apart, together = (logit_sqnr(massive, x, bits, images_for(16), r) for r in (fast, without_outliers(fast)))
    assert apart > together + (6 if bits == "w4a4" else 0)
