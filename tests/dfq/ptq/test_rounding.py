"""AdaRound: where it starts, what it can come to, and its regulariser worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dfq.ptq.rounding import AdaptiveRounding, regulariser
from quantizers import PerAxis, UniformQuantizer


def quantizer(*, symmetric: bool = False, bits: int = 3) -> UniformQuantizer:
    """Two output channels: steps of 0.5 and 0.25; affine, integers 0..7 with zero at 2 and 5."""
    tensors = {"scale": torch.tensor([0.5, 0.25])}
    if not symmetric:
        tensors["zero_point"] = torch.tensor([2, 5], dtype=torch.int32)
    return UniformQuantizer(bits, symmetric=symmetric, granularity=PerAxis(0)).load_tensors(tensors)


def with_shares(weight: torch.Tensor, values: torch.Tensor) -> AdaptiveRounding:
    """Moved to where V has these values."""
    rounding = AdaptiveRounding(weight, quantizer())
    rounding.parameter.data = values.expand_as(weight).clone()
    return rounding


def test_it_starts_at_the_weights_themselves() -> None:
    # In steps: 0.4, -1.3, 4.9 and -2 of the first channel, 1.5, -4.8, 0 and 2 of the second; all within the range.
    weight = torch.tensor([[0.2, -0.65, 2.45, -1.0], [0.375, -1.2, 0.0, 0.5]])
    rounding = AdaptiveRounding(weight, quantizer())
    torch.testing.assert_close(rounding.soft(), weight, rtol=1e-5, atol=1e-6)
    shares = torch.tensor([[0.4, 0.7, 0.9, 0.0], [0.5, 0.2, 0.0, 0.0]])
    torch.testing.assert_close(rounding.share(), shares, rtol=1e-5, atol=1e-5)
    # Nothing but rounding to nearest, until it has learned something; 1.5 steps are at the middle.
    nearest = torch.tensor([[0.0, -0.5, 2.5, -1.0], [0.5, -1.25, 0.0, 0.5]])
    torch.testing.assert_close(rounding.hard(), nearest)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_comes_out_is_the_floor_or_one_more(symmetric: bool) -> None:
    rng = np.random.default_rng(0)
    weight = torch.tensor(rng.normal(scale=0.8, size=(2, 500)), dtype=torch.float32)
    grid = quantizer(symmetric=symmetric)
    rounding = AdaptiveRounding(weight, grid)
    rounding.parameter.data = torch.tensor(rng.normal(scale=3.0, size=(2, 500)), dtype=torch.float32)
    # Integers count from the zero point, and end where the grid does.
    zero = np.array([[0.0], [0.0]]) if symmetric else np.array([[2.0], [5.0]])
    floor = np.floor(weight.double().numpy() / np.array([[0.5], [0.25]])) + zero
    down, up = (np.clip(floor + more, grid.qmin, grid.qmax) for more in (0, 1))
    integers = grid.quantize(rounding.hard()).numpy()
    expected = np.where(rounding.parameter.detach().numpy() >= 0, up, down)
    np.testing.assert_array_equal(integers, expected)
    assert (integers == up).any()
    assert (integers == down).any()
    assert (floor < grid.qmin).any()
    assert (floor > grid.qmax).any()


def test_the_rectified_sigmoid_by_hand() -> None:
    # 1.2 sigmoid(V) - 0.1, clipped: sigmoid(ln 2) is 2/3, sigmoid(ln 11) 11/12.
    values = torch.tensor([0.0, math.log(2), -math.log(2), math.log(11), -math.log(11), 9.0, -9.0])
    rounding = with_shares(torch.zeros(2, 7), values)
    expected = torch.tensor([0.5, 0.7, 0.3, 1.0, 0.0, 1.0, 0.0]).expand(2, 7)
    torch.testing.assert_close(rounding.share(), expected, rtol=0, atol=1e-6)
    # Within (0, 1) its gradient is that of the weight: one step of the channel times 1.2 sigmoid'.
    rounding.soft().sum().backward()
    gradient = rounding.parameter.grad
    assert gradient is not None
    torch.testing.assert_close(gradient[:, 0], torch.tensor([0.5, 0.25]) * 1.2 / 4)
    assert gradient[:, 5:].abs().max() == 0


def test_the_regulariser_by_hand() -> None:
    # Shares 0.5 and 0.7: |2 h - 1| is 0 and 0.4.
    two = with_shares(torch.zeros(2, 2), torch.tensor([0.0, math.log(2)]))
    assert regulariser([two], 0.0) is None
    assert regulariser([two], 0.19) is None
    assert regulariser([], 0.9) is None
    for progress, beta in ((0.2, 20), (0.6, 11), (1.0, 2)):
        found = regulariser([two], progress)
        assert found is not None
        assert float(found.detach()) == pytest.approx(100.0 * (1 - 0.4**beta / 2), rel=1e-5)
    # Its mean over the weights of all layers, whatever their sizes: four weights as above, and twelve that are decided.
    decided = with_shares(torch.zeros(2, 6), torch.tensor(9.0))
    found = regulariser([two, decided], 1.0)
    assert found is not None
    assert float(found.detach()) == pytest.approx(100.0 * (1 - 0.4**2 / 2) * 4 / 16, rel=1e-5)


def test_the_regulariser_pulls_each_weight_to_the_nearer_end() -> None:
    rounding = with_shares(torch.zeros(2, 2), torch.tensor([-0.7, 0.7]))
    found = regulariser([rounding], 0.9)
    assert found is not None
    found.backward()
    gradient = rounding.parameter.grad
    assert gradient is not None
    assert bool((gradient[:, 0] > 0).all())
    assert bool((gradient[:, 1] < 0).all())
