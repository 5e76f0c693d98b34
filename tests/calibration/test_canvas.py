"""Pixels and waves: what a step of either does to the images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibration.canvas import Pixels, Waves
from calibration.initial import COLOUR

LOW, HIGH = -torch.ones(1, 3, 1, 1), 3 * torch.ones(1, 3, 1, 1)


def pictures(height: int = 8, width: int = 8) -> Tensor:
    """In the inner nine tenths of the range, so that every logit is finite."""
    shades = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    return LOW + (HIGH - LOW) * (0.05 + 0.9 * shades)


def logits(images: Tensor) -> Tensor:
    return ((images - LOW) / (HIGH - LOW)).logit()


def test_pixels_are_moved_and_clamped() -> None:
    initial = pictures()
    canvas = Pixels(initial, LOW, HIGH)
    gradient = torch.randn_like(initial)
    canvas.pull(gradient)
    assert torch.equal(canvas.parameter.grad, gradient)  # type: ignore[arg-type]
    canvas.parameter.sub_(10 * torch.ones_like(initial))
    canvas.moved()
    assert torch.equal(canvas.images, LOW.expand_as(initial))
    assert torch.equal(initial, pictures())


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 5)])
def test_waves_begin_as_the_images_they_are_given(size: tuple[int, int]) -> None:
    initial = pictures(*size)
    torch.testing.assert_close(Waves(initial, LOW, HIGH, 1.5).images, initial, atol=1e-4, rtol=1e-4)


def test_black_and_white_are_half_a_shade_away() -> None:
    ends = torch.stack([LOW.expand(1, 3, 4, 4)[0], HIGH.expand(1, 3, 4, 4)[0]])
    off = (Waves(ends, LOW, HIGH, 1.0).images - ends).abs()
    torch.testing.assert_close(off, torch.full_like(off, 4 / 512), atol=1e-4, rtol=0)


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5])
def test_a_step_of_one_wave_by_hand(power: float) -> None:
    """Of k cycles from left to right, in the first of the independent colours: a cosine of amplitude 2 d / k^power.

    Mean and contrast of all logits of an image stay.
    """
    initial, d, k = pictures(8, 12), 0.1, 3
    canvas = Waves(initial, LOW, HIGH, power)
    canvas.parameter[:, 0, 0, k, 0] += d
    canvas.moved()
    # 12 pixels for 8: the frequency is in cycles per side of a square of the same area.
    frequency = k * (8 / 12) ** 0.5
    wave = 2 * d / frequency**power * torch.cos(2 * torch.pi * k * torch.arange(12) / 12)
    begun = logits(initial)
    expected = begun + COLOUR[:, 0].view(1, 3, 1, 1) * wave.view(1, 1, 1, 12)
    for image, start in zip(expected, begun, strict=True):
        image.copy_((image - image.mean()) / image.std() * start.std() + start.mean())
    torch.testing.assert_close(logits(canvas.images), expected, atol=1e-3, rtol=1e-3)


def test_the_gradient_is_that_of_the_images() -> None:
    """Against differences of twice the same small step, in double precision."""
    initial = pictures().double()
    canvas = Waves(initial, LOW.double(), HIGH.double(), 1.0)
    weight = torch.randn(initial.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    canvas.pull(weight)
    gradient = canvas.parameter.grad
    assert gradient is not None
    for place in ((0, 0, 0, 0, 0), (1, 2, 3, 2, 1), (0, 1, 7, 1, 0)):
        sides = []
        for step in (1e-5, -2e-5):
            canvas.parameter[place] += step
            canvas.moved()
            sides.append(float((canvas.images * weight).sum()))
        canvas.parameter[place] += 1e-5
        assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(float(gradient[place]), rel=1e-4)


def test_what_is_moved_far_stays_an_image() -> None:
    canvas = Waves(pictures(), LOW, HIGH, 1.0)
    canvas.parameter += 50 * torch.randn(canvas.parameter.shape, generator=torch.Generator().manual_seed(0))
    canvas.moved()
    assert bool(((canvas.images >= LOW) & (canvas.images <= HIGH)).all())
    for found, begun in zip(logits(canvas.images), logits(pictures()), strict=True):
        assert float(found.mean()) == pytest.approx(float(begun.mean()), abs=0.02)
        assert float(found.std()) == pytest.approx(float(begun.std()), rel=0.02)
