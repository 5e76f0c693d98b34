"""Straight-through gradients of roundings, against values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from dfq.ptq.tuning import LearnedRounding


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
