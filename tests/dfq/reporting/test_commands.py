"""The command of a report makes the same model again."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dfq
from calibration import METHODS, CalibrationSet, Dense
from dfq.cli import main
from dfq.models import Model
from dfq.ptq.engine import QuantizedModel
from dfq.recipe import load_recipe
from dfq.reporting.commands import quantize_command, uses_preset


def test_it_makes_the_same_weights(quantized_folder: Path, tmp_path: Path) -> None:
    command = quantize_command(dfq.load(quantized_folder), str(tmp_path / "again"))
    program, *words = shlex.split(command)
    assert program == "dfq"
    assert main([*words, "--quiet", "--device", "cpu"]) == 0
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (quantized_folder / "model.safetensors").read_bytes()


def calibrated(quantized: QuantizedModel, run: dict[str, Any]) -> QuantizedModel:
    """The same model, said to be calibrated on eight images of this run."""
    return replace(quantized, calibration={"num_images": 8, "run": run})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"iterations": 2}, "--iterations 2"),
        ({"initial": "noise", "iterations": 1}, "--iterations 1 --init noise"),
        ({"seed": 7, "iterations": 1}, "--seed 7"),
        ({"learning_rate": 0.5, "iterations": 1}, "--learning-rate 0.5"),
    ],
)
def test_how_images_were_made(reference: Model, w4a8: QuantizedModel, options: dict[str, Any], said: str) -> None:
    images = dfq.generate(reference, num_images=2, progress=False, **options)
    command = quantize_command(calibrated(w4a8, images.run), "out")
    assert "--method natural -n 2 -b" in command
    assert said in command


def test_what_options_cannot_say_is_a_folder_of_images(reference: Model, w4a8: QuantizedModel) -> None:
    method = replace(METHODS["natural"], schedule=Dense(), soft_labels=True)
    images = dfq.generate(reference, method, 2, iterations=1, progress=False)
    assert "--calibration IMAGES" in quantize_command(calibrated(w4a8, images.run), "out")
    assert "--calibration IMAGES" in quantize_command(calibrated(w4a8, {}), "out")


def test_photographs(w4a8: QuantizedModel) -> None:
    command = quantize_command(calibrated(w4a8, {"method": "real", "seed": 3}), "out")
    assert "--calibration-images IMAGES -n 8 --seed 3" in command


def test_a_changed_preset_is_a_file(w4a8: QuantizedModel) -> None:
    assert uses_preset(w4a8)
    changed = replace(w4a8, recipe=replace(w4a8.recipe, first_last_bits=4))
    assert not uses_preset(changed)
    assert "--recipe recipe.toml" in quantize_command(changed, "out")


def test_a_preset_with_weights_in_groups_has_its_name(w4a8: QuantizedModel) -> None:
    grouped = replace(w4a8, recipe=load_recipe("fast-g32"))
    assert uses_preset(grouped)
    assert "--recipe fast-g32 " in quantize_command(grouped, "out")
    # A file of this name is no preset with groups of 4, which there are not.
    assert not uses_preset(replace(w4a8, recipe=replace(w4a8.recipe, name="fast-g4")))


def test_weights_and_preprocessing(tiny: Callable[..., Model], images_for: Callable[..., CalibrationSet]) -> None:
    model = tiny()
    model.origin = replace(model.origin, name="vit_tiny_patch16_224", checkpoint="my weights.pth")
    quantized = dfq.quantize(model, "w4a8", calibration=images_for(), recipe="paper", progress=False)
    words = shlex.split(quantize_command(quantized, "my out"))
    assert words[:5] == ["dfq", "quantize", "vit_tiny_patch16_224", "--checkpoint", "my weights.pth"]
    assert words[words.index("--image-size") + 1] == "32"
    assert words[words.index("--std") + 1 : words.index("--std") + 4] == ["0.25", "0.25", "0.25"]
    assert "--mean" not in words, "timm's own for this name"
    assert words[-2:] == ["--out", "my out"]


@pytest.mark.parametrize(
    "run",
    [
        {"method": "natural", "num_images": "many"},
        {"method": "natural", "num_images": 2, "batch_size": 2, "seed": 0, "inversion": 3},
        {"method": ["a"]},
        "natural",
    ],
)
def test_a_run_that_somebody_else_described_is_no_error(w4a8: QuantizedModel, run: Any) -> None:
    assert "--calibration IMAGES" in quantize_command(calibrated(w4a8, run), "out")
