"""Straight-through gradients of roundings, against values worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.models import Model
from dfq.ptq.tuning import LearnedRounding, tunable


def test_the_gradients_of_rounding_by_hand() -> None:
    # Under scale 1 and integers 0..3: 0.4 becomes 0, 1.2 becomes 1, 9 is clipped to 3, -2 to 0.
    x = torch.tensor([0.4, 1.2, 9.0, -2.0], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    low, high = torch.tensor(0.0), torch.tensor(3.0)
    rounded = LearnedRounding.apply(x, scale, low, high, None)
    assert rounded.tolist() == [0.0, 1.0, 3.0, 0.0]
    rounded.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]
    # LSQ: round(v) - v where not clipped, the end of the range where clipped: -0.4 - 0.2 + 3 + 0.
    assert float(scale.grad) == pytest.approx(2.4, abs=1e-6)


def test_a_scale_per_channel_has_its_own_gradient() -> None:
    x = torch.tensor([[0.4, 5.2], [1.2, 90.0]], requires_grad=True)
    scale = torch.tensor([[1.0, 2.0]], requires_grad=True)
    rounded = LearnedRounding.apply(x, scale, torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 3.0]]), [0])
    assert rounded.tolist() == [[0.0, 6.0], [1.0, 6.0]]
    rounded.sum().backward()
    # Second channel: 5.2 / 2 = 2.6 rounds up by 0.4; 90 is clipped to 3 steps.
    torch.testing.assert_close(scale.grad, torch.tensor([[-0.6, 3.4]]))


def test_a_scale_per_group_has_its_own_gradient(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    quantized = dfq.quantize(tiny(), "w4a8", calibration=images_for(), recipe="fast-g8", progress=False)
    layer: Any = quantized.module.get_submodule("blocks.0.mlp.fc1")
    scale, zero_point = (t.clone() for t in (layer.weight_quantizer.scale, layer.weight_quantizer.zero_point))
    grid = layer.weight.reshape(-1, 8)
    exact = grid + scale[:, None] * torch.linspace(-0.4, 0.4, grid.numel()).view_as(grid)
    with tunable(quantized.module, {layer: exact.view_as(layer.weight)}) as tuned:
        tuned.apply()
        layer.weight.sum().backward()
        (found,) = (log_scale.grad for log_scale in tuned.scales if log_scale.grad is not None)
    steps = exact / scale[:, None]
    lowest, highest = -zero_point[:, None].float(), 15 - zero_point[:, None].float()
    code = steps.round()
    clipped = torch.minimum(torch.maximum(code, lowest), highest)
    # LSQ, section 2.1, of the logarithm: times the scale.
    expected = (torch.where(clipped == code, clipped - steps, clipped) * scale[:, None]).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_after_an_exception_the_module_is_as_it_was(
    tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    quantized = dfq.quantize(tiny(), "w4a4", calibration=images_for(), recipe="repq", progress=False)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before, logits = dict(quantized.module.named_modules()), quantized(images)

    def stopped() -> None:
        with tunable(quantized.module, {}) as tuned:
            with torch.no_grad():
                for parameter in (*(weight.parameter for _, weight in tuned.layers), *tuned.scales):
                    parameter += 1
            tuned.apply()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert dict(quantized.module.named_modules()) == before
    assert not any(parameter.requires_grad for parameter in quantized.module.parameters())
    assert torch.equal(quantized(images), logits)


@pytest.mark.parametrize("recipe", ["paper", "deploy"])
def test_what_lies_on_a_grid_that_stays_is_not_tuned(
    recipe: str, tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]
) -> None:
    """The position embedding and the class token, of which `save` keeps integers, or halves of the bits."""
    quantized = dfq.quantize(tiny(), "w4a8", calibration=images_for(), recipe=recipe, progress=False)
    names = {id(parameter): name for name, parameter in quantized.module.named_parameters()}
    with tunable(quantized.module, {}) as tuned:
        open_now = {names[id(parameter)] for parameter in tuned.others}
    assert "blocks.0.norm1.weight" in open_now
    assert not open_now & {"pos_embed", "cls_token"}
