"""Inversion of waves instead of pixels, seen through windows and noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import dfq
from calibration import METHODS, Dense, Objective, ProgressiveStop, RollAndFlip, Settings
from calibration.errors import DfqError
from calibration.inversion import Inverted, describe, invert
from calibration.making import batch_generator

WAVES = METHODS["waves"]


def made(model: dfq.Model, settings: Settings, seed: int = 0, **changes: Any) -> Inverted:
    initial = torch.randn(10, 3, 32, 32, generator=batch_generator(seed, 1)) * 0.5
    arguments: dict[str, Any] = {"objective": Objective({"cross_entropy": 1.0}), "schedule": Dense()} | changes
    return invert(
        model.module,
        initial,
        torch.arange(10),
        mean=model.preprocessing.mean,
        std=model.preprocessing.std,
        settings=settings,
        generator=batch_generator(seed, 0),
        precision="fp32",
        **arguments,
    )


def roughness(images: Tensor) -> float:
    """Power of the differences of neighbours over that of the pixels."""
    centred = images - images.mean((-2, -1), keepdim=True)
    return float((images[..., 1:] - images[..., :-1]).square().mean() / centred.square().mean())


def test_the_class_is_seen_in_images_without_fine_noise(reference: dfq.Model) -> None:
    waves = made(reference, WAVES.settings)
    pixels = made(reference, METHODS["dense"].settings)
    assert waves.confidence.mean() > 0.3  # of one class in ten; a window cuts digits
    assert waves.iterations == 100
    # White noise has a roughness of 2.
    assert roughness(waves.images) < 0.5 < roughness(pixels.images)


def test_noise_and_windows_hang_on_the_seed_alone(reference: dfq.Model) -> None:
    settings = replace(WAVES.settings, iterations=3)
    first = made(reference, settings)
    torch.manual_seed(5)
    assert torch.equal(made(reference, settings).images, first.images)
    assert not torch.equal(made(reference, replace(settings, noise=0.0)).images, first.images)
    assert not torch.equal(made(reference, replace(settings, augment=RollAndFlip(0.0))).images, first.images)


def test_the_run_tells_of_them_only_where_they_are(reference: dfq.Model) -> None:
    told = describe(WAVES.objective, Dense(), WAVES.settings)
    assert (told["optimiser"]["waves"], told["optimiser"]["noise"], told["augment"]["smallest_window"]) == (
        1.5,
        0.4,
        0.7,
    )
    plain = describe(WAVES.objective, Dense(), Settings())
    assert not {"waves", "noise"} & plain["optimiser"].keys()
    assert "smallest_window" not in plain["augment"]


def test_what_does_not_go_together(reference: dfq.Model) -> None:
    with pytest.raises(DfqError, match="such a method has no sparse schedule"):
        dfq.generate(reference, "waves", 2, schedule="smi", progress=False)
    with pytest.raises(DfqError, match="such a method has no attention prior"):
        made(reference, WAVES.settings, objective=Objective({"cross_entropy": 1.0, "attention_prior": 0.1}))
    with pytest.raises(DfqError, match="such a method has no sparse schedule"):
        made(reference, WAVES.settings, schedule=ProgressiveStop())
    for changes in ({"waves": -1.0}, {"waves": float("nan")}, {"noise": -0.1}):
        with pytest.raises(ValueError, match="must be at least 0"):
            Settings(**changes)
    for smallest in (0.0, 1.5):
        with pytest.raises(ValueError, match="window must be above 0 and at most 1"):
            RollAndFlip(smallest=smallest)
