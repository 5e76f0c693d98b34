"""A reader's folder: the files that README and docs speak of, and networks as small as they can be behind timm's names.

What a page prints is what is run. To be done in seconds instead of hours, `vit_tiny_patch16_224` here has one block and
sixteen patches, few images are made in few steps, a student is taught in two rounds, and a benchmark takes a moment.
"""

from __future__ import annotations

import argparse
import functools
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import dfq
from calibration import METHODS, Plan
from dfq.architectures import build_architecture
from dfq.transfer.training import Training

ROOT = Path(__file__).parents[2]
MINIATURE = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 1, "num_heads": 3, "num_classes": 10}
IMAGES, ITERATIONS = 8, 20
BREEDS = 37


@pytest.fixture
def miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks and short runs, whatever the command says."""
    create, distill, bench, check = timm.create_model, dfq.distill, dfq.bench, Plan.__post_init__

    @functools.wraps(create)
    def smaller(name: str, *arguments: Any, **changes: Any) -> torch.nn.Module:
        return create(name, *arguments, **((MINIATURE if re.match("vit|deit", name) else {}) | changes))

    def shorter(*arguments: Any, rounds: int, training: Training, **rest: Any) -> dfq.Distillation:
        return distill(*arguments, rounds=min(rounds, 2), training=replace(training, steps=2), **rest)

    def quicker(*arguments: Any, **rest: Any) -> dfq.Bench:
        return bench(*arguments, **rest | {"repeats": 1, "seconds": 0.01})

    def fewer(plan: Plan) -> None:
        object.__setattr__(plan, "num_images", min(plan.num_images, IMAGES))
        check(plan)

    monkeypatch.setattr(timm, "create_model", smaller)
    monkeypatch.setattr(Plan, "__post_init__", fewer)
    monkeypatch.setattr(dfq, "distill", shorter)
    monkeypatch.setattr(dfq, "bench", quicker)
    for name, method in METHODS.items():
        settings = replace(method.settings, iterations=min(method.settings.iterations, ITERATIONS))
        monkeypatch.setitem(METHODS, name, replace(method, settings=settings))


@pytest.fixture(scope="session")
def belongings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, photographs and a recipe by the names that the pages use."""
    own = tmp_path_factory.mktemp("reader")
    for name in ("vit.safetensors", "teacher.safetensors"):
        save_file(_weights("vit_tiny_patch16_224"), own / name)
    for name in ("deit.safetensors", "deit_tiny.safetensors"):
        save_file(_weights("deit_tiny_patch16_224"), own / name)
    # As timm's train.py leaves it, with the options of the run.
    state = _weights("vit_tiny_patch16_224", num_classes=BREEDS)
    torch.save({"epoch": 9, "args": argparse.Namespace(lr=0.1), "state_dict": state}, own / "model_best.pth.tar")
    picture = Image.effect_noise((48, 40), 60).convert("RGB")
    classes = [
        own / folder / str(index) for folder in ("imagenet/val", "my-images", "photographs") for index in range(3)
    ]
    for folder in [*classes, *(own / f"pets/val/breed-{breed:02}" for breed in range(BREEDS))]:
        folder.mkdir(parents=True)
        picture.save(folder / "0.png")
    for name in ("photograph.jpg", "cat.jpg"):
        picture.save(own / name)
    (own / "mine.toml").write_bytes((ROOT / "dfq/recipes/fast.toml").read_bytes())
    (own / "tools").symlink_to(ROOT / "tools")
    return own


@pytest.fixture
def reader(miniature: None, belongings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Works in the folder of somebody who reads a page and has what it speaks of."""
    shutil.copytree(belongings, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def _weights(architecture: str, **arguments: Any) -> dict[str, torch.Tensor]:
    """Of parameters that are all random, so that logits differ."""
    module = build_architecture(architecture, MINIATURE | arguments)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(value.shape, generator=generator) * 0.3 for name, value in module.state_dict().items()}
