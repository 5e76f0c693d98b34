from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from calibration.objectives import Objective, Step, cross_entropy, total_variation


def step_of(images: torch.Tensor | None = None, logits: torch.Tensor | None = None) -> Step:
    random = torch.Generator().manual_seed(0)
    return Step(
        images=torch.randn(2, 3, 5, 7, generator=random) if images is None else images,
        logits=torch.randn(2, 6, generator=random) * 5 if logits is None else logits,
        labels=torch.tensor([4, 0]),
    )


def test_cross_entropy_agrees_with_scipy() -> None:
    step = step_of()
    expected = -log_softmax(step.logits.double().numpy(), axis=1)[[0, 1], [4, 0]]
    assert cross_entropy(step).numpy() == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_is_taken_in_float32() -> None:
    logits = step_of().logits.bfloat16()
    value = cross_entropy(step_of(logits=logits))
    assert value.dtype == torch.float32
    assert value.numpy() == pytest.approx(-log_softmax(logits.double().numpy(), axis=1)[[0, 1], [4, 0]], rel=1e-5)


def test_total_variation_by_hand() -> None:
    image = torch.tensor([[[[0.0, 3.0], [4.0, 12.0]]]])
    # Differences: beside (-3, -8), below (-4, -9), diagonal -12, other diagonal -1.
    assert total_variation(step_of(image)).item() == pytest.approx(73**0.5 + 97**0.5 + 12 + 1)


def test_total_variation_agrees_with_numpy() -> None:
    step = step_of()
    x = step.images.double().numpy()
    down, right = np.diff(x, axis=2), np.diff(x, axis=3)
    differences = (down, right, down[..., 1:] + right[..., :-1, :], down[..., :-1] - right[..., :-1, :])
    value = total_variation(step)
    assert value.shape == ()
    assert value.item() == pytest.approx(sum(np.sqrt((d**2).sum()) for d in differences), rel=1e-6)


def test_total_variation_of_one_colour_is_zero_and_has_a_gradient() -> None:
    images = torch.full((1, 3, 4, 4), 0.7, requires_grad=True)
    value = total_variation(step_of(images))
    value.backward()
    assert value.item() == 0
    assert images.grad is not None
    assert not images.grad.any()


def test_the_published_loss() -> None:
    step = step_of()
    loss, _ = Objective()(step)
    expected = cross_entropy(step).mean() + 1e-4 * total_variation(step)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert Objective().describe() == {"cross_entropy": 1.0, "total_variation": 1e-4}


def test_the_score_is_of_each_image_alone() -> None:
    step = step_of()
    _, score = Objective({"cross_entropy": 2.0, "total_variation": 1e3})(step)
    assert score.tolist() == pytest.approx((2 * cross_entropy(step)).tolist())
    _, score = Objective({"total_variation": 1.0})(step)
    assert score.tolist() == [0, 0]


def test_only_the_loss_has_a_gradient() -> None:
    images, logits = torch.rand(2, 3, 5, 7, requires_grad=True), torch.rand(2, 6, requires_grad=True)
    loss, score = Objective()(step_of(images, logits))
    by_pixels, by_logits = torch.autograd.grad(loss, (images, logits))
    assert by_pixels.any()
    assert by_logits.any()
    assert not score.requires_grad


def test_an_unknown_term() -> None:
    message = "unknown objective 'entropy': choose from cross_entropy, total_variation"
    with pytest.raises(ValueError, match=re.escape(message)):
        Objective({"entropy": 1.0})
