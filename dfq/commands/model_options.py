"""Which model, with which weights and preprocessing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dfq.commands.values import positive, seed_number

if TYPE_CHECKING:
    from dfq.models import Model

MODEL_CHANGES = ("random_weights", "image_size", "mean", "std", "interpolation", "crop_pct")


def add_model_options(
    parser: argparse.ArgumentParser,
    what: str = "a model",
    *,
    name: str = "model",
    weights_default: str = "timm's pretrained ones",
) -> None:
    parser.add_argument(
        name, metavar=name.upper(), help=f"{what}: a timm name, hf-hub:USER/REPO, local-dir:FOLDER, or reference"
    )
    group = parser.add_argument_group(name)
    weights = group.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help=f"weights: safetensors or a PyTorch state dict (default: {weights_default})",
    )
    weights.add_argument("--random-weights", action="store_true", help="untrained, for trials and timing")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    group.add_argument(
        "--seed", type=seed_number, default=0, metavar="N", help="of all randomness (default: %(default)s)"
    )
    group = parser.add_argument_group("preprocessing (default: as the model was trained)")
    group.add_argument("--image-size", type=positive, metavar="N", help="height and width of its images, in pixels")
    group.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="of the normalisation")
    group.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"), help="of the normalisation")
    group.add_argument("--interpolation", metavar="NAME", help="of the resize: bicubic, bilinear, nearest, ...")
    group.add_argument("--crop-pct", type=float, metavar="X", help="share of the resized image in the crop, up to 1")


def model_words(arguments: argparse.Namespace) -> list[str]:
    """The model as it was asked for, for a command that goes on with it."""
    words = [str(arguments.model)]
    for name in ("checkpoint", *MODEL_CHANGES):
        value = getattr(arguments, name)
        if value not in (None, False):
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else map(str, value if isinstance(value, list) else [value])
    return words + (["--seed", str(arguments.seed)] if arguments.random_weights and arguments.seed else [])


def model_of(arguments: argparse.Namespace) -> Model:
    import dfq

    return dfq.load_model(
        arguments.model,
        checkpoint=arguments.checkpoint,
        random_weights=arguments.random_weights,
        image_size=arguments.image_size,
        mean=None if arguments.mean is None else tuple(arguments.mean),
        std=None if arguments.std is None else tuple(arguments.std),
        interpolation=arguments.interpolation,
        crop_pct=arguments.crop_pct,
        device=arguments.device,
        seed=arguments.seed,
    )
