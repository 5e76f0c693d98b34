"""A tiny untrained Swin for the tests of the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dfq.architectures import build_architecture
from dfq.models import Model, Origin
from dfq.preprocessing import Preprocessing

ARCHITECTURE = "swin_tiny_patch4_window7_224"
# Windows of 4x4 on 8x8 patches, shifted in the second block; then one window of 4x4.
TINY = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "num_classes": 5}


@pytest.fixture
def tiny_swin() -> Callable[..., Model]:
    """A Swin of two layers of two blocks whose parameters are all random."""

    def make(**changes: Any) -> Model:
        arguments = TINY | changes
        module = build_architecture(ARCHITECTURE, arguments).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        preprocessing = Preprocessing(module.patch_embed.img_size, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        return Model(module, preprocessing, Origin("tiny", ARCHITECTURE, arguments))

    return make
