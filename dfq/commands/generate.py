"""`dfq generate`: a calibration set from a model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dfq.commands.command import Command
from dfq.commands.image_options import add_image_options, generated_images, plan_of
from dfq.commands.model_options import add_model_options, model_of
from dfq.commands.output_options import add_output_options

if TYPE_CHECKING:
    from calibration import CalibrationSet


def options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_image_options(parser)
    add_output_options(parser, "folder for the calibration set; one that was begun is continued")


def run(arguments: argparse.Namespace) -> None:
    plan = plan_of(arguments)
    model = model_of(arguments)
    made = generated_images(arguments, model, plan, arguments.out)
    print(_describe_set(made))
    also = ", trace.png how they came about" if (arguments.out / "trace.png").exists() else ""
    print(f"kept in {arguments.out}; preview.png there shows them{also}")


def _describe_set(made: CalibrationSet) -> str:
    parts = [f"{len(made)} images"]
    if made.confidence is not None:
        parts.append(f"mean confidence {made.confidence.mean().item():.0%}")
    if made.is_sparse:
        kept = made.mask.flatten(1).sum(1).float().mean().item()
        parts.append(f"{kept:.0f} of {made.grid.num_patches} patches each")
    return ", ".join(parts)


COMMAND = Command(
    "generate",
    "make a calibration set by inverting a model",
    "dfq generate vit_tiny_patch16_224 --checkpoint vit.safetensors -n 32 --out images",
    options,
    run,
    shared=True,
    resumes=True,
)
