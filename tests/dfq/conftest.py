"""Models that the tests of the upper floor share: the trained reference, and tiny untrained Vision Transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.models import Model, Origin, build_architecture
from dfq.preprocessing import Preprocessing

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


@pytest.fixture(scope="session")
def reference() -> Model:
    """The trained model that comes with dfq."""
    return dfq.load_model("reference", device="cpu")


@pytest.fixture(scope="session")
def noise(reference: Model) -> CalibrationSet:
    """Eight images of Gaussian noise for the reference model."""
    return dfq.generate(reference, "gaussian", 8, progress=False)


@pytest.fixture
def tiny() -> Callable[..., Model]:
    """A two-block ViT of 4x4 patches whose parameters are all random, so that none hides behind a zero or a one."""

    def make(architecture: str = "vit_tiny_patch16_224", seed: int = 0, **changes: Any) -> Model:
        arguments = TINY | changes
        module = build_architecture(architecture, arguments).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        preprocessing = Preprocessing((32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        return Model(module, preprocessing, Origin("tiny", architecture, arguments))

    return make


@pytest.fixture
def images_for() -> Callable[..., CalibrationSet]:
    """Random pictures of 32x32 pixels in 4x4 patches; `mask` says which patches are kept."""

    def make(count: int = 5, mask: torch.Tensor | None = None, **changes: Any) -> CalibrationSet:
        generator = torch.Generator().manual_seed(1)
        content: dict[str, Any] = {
            "images": torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator),
            "mask": torch.ones(count, 4, 4, dtype=torch.bool) if mask is None else mask,
            "labels": None,
            "confidence": None,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.25, 0.25, 0.25),
            "run": {"method": "test"},
        }
        return CalibrationSet(**(content | changes))

    return make
