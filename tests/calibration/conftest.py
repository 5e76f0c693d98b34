"""Models small enough to be inverted in a blink."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import dfq

MakeViT = Callable[..., VisionTransformer]


@pytest.fixture
def make_vit() -> MakeViT:
    """A ViT on 32x32 images, 4x4 patches, whose weights are large enough that attention is far from uniform."""

    def make(*, distilled: bool = False, **arguments: Any) -> VisionTransformer:
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
        vit = (VisionTransformerDistilled if distilled else VisionTransformer)(**shape | arguments)
        generator = torch.Generator().manual_seed(0)
        for parameter in vit.parameters():
            nn.init.normal_(parameter, std=0.6, generator=generator)
        return vit.eval()

    return make


@pytest.fixture(scope="session")
def reference() -> dfq.Model:
    """The embedded model, trained: 8x8 patches of 4x4 pixels, 10 classes. Not to be changed."""
    return dfq.load_model("reference", device="cpu")
