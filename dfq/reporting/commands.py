"""The commands that make a quantized model again, put together from what is known of how it was made."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import product
from typing import Any

from timm.data import resolve_model_data_config

from calibration import METHODS, Plan
from calibration.methods import SCHEDULES
from calibration.tokens import PatchGrid
from dfq.errors import DfqError, RecipeError
from dfq.ptq.engine import QuantizedModel
from dfq.recipe import find_preset

RECIPE_FILE, IMAGES = "recipe.toml", "IMAGES"
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


def quantize_command(quantized: QuantizedModel, out: str) -> str:
    """A line for the shell that quantizes into the folder `out`.

    In it `RECIPE_FILE` stands for the file of a recipe that does not come with dfq, and `IMAGES` for a folder: of
    photographs, or of a set that was made in a way that options cannot say.
    """
    origin, preprocessing = quantized.origin, quantized.preprocessing
    words = ["dfq", "quantize", origin.name]
    if origin.checkpoint is not None:
        words += ["--checkpoint", origin.checkpoint]
    if origin.random_weights:
        words.append("--random-weights")
    if "img_size" in origin.arguments:
        words += ["--image-size", str(origin.arguments["img_size"])]
    usual = resolve_model_data_config(quantized.module)
    for name in ("mean", "std", "interpolation", "crop_pct"):
        value = getattr(preprocessing, name)
        if value != usual[name]:
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    words += ["--bits", quantized.bits, "--recipe", quantized.recipe.name if uses_preset(quantized) else RECIPE_FILE]
    words += _image_options(quantized)
    return shlex.join([*words, "--out", out])


def uses_preset(quantized: QuantizedModel) -> bool:
    """Whether its recipe is, to the letter, one that comes with dfq."""
    try:
        return quantized.recipe == find_preset(quantized.recipe.name)
    except RecipeError:  # A file may be called anything, as if it had groups of a size that is none.
        return False


def calibration_run(quantized: QuantizedModel) -> dict[str, Any]:
    """How the images were made that it was calibrated on; empty where that is not known."""
    run = quantized.calibration.get("run")
    return run if isinstance(run, dict) else {}


def _image_options(quantized: QuantizedModel) -> list[str]:
    run = calibration_run(quantized)
    if run.get("method") == "real":
        count = str(quantized.calibration.get("num_images"))
        return ["--calibration-images", IMAGES, "-n", count, "--seed", str(run.get("seed"))]
    options = None if quantized.origin.seed not in (None, run.get("seed")) else _plan_options(run, quantized)
    return ["--calibration", IMAGES] if options is None else options


def _plan_options(run: Mapping[str, Any], quantized: QuantizedModel) -> list[str] | None:
    """Options that plan the very run; None where none do. Found by trying: what was planned says what it leads to."""
    try:
        if run["method"] not in METHODS:
            return None
        options = ["--method", run["method"], "-n", str(run["num_images"]), "-b", str(run["batch_size"])]
        options += ["--seed", str(run["seed"])]
        inversion = run.get("inversion")
        if inversion:
            options += ["--precision", _PRECISIONS[run["precision"]]]
            rate = inversion["optimiser"]["learning_rate"]
            choices: dict[str, list[Any]] = {
                "iterations": [None, inversion["iterations"]],
                "init": [None, run["initial"]],
                "schedule": [None, inversion["schedule"]["name"]],
                "learning_rate": [None, rate],
            }
        else:
            choices = {}
        for values in product(*choices.values()):
            chosen = dict(zip(choices, values, strict=True))
            if _leads_to(run, chosen, quantized):
                said = [(name, value) for name, value in chosen.items() if value is not None]
                return options + [word for name, value in said for word in (f"--{name.replace('_', '-')}", str(value))]
    # What a file says of a run may be anything.
    except (KeyError, TypeError, ValueError, DfqError):
        pass
    return None


def _leads_to(run: Mapping[str, Any], chosen: Mapping[str, Any], quantized: QuantizedModel) -> bool:
    schedule = chosen.get("schedule")
    plan = Plan(
        method=run["method"],
        num_images=run["num_images"],
        iterations=chosen.get("iterations"),
        batch_size=run["batch_size"],
        seed=run["seed"],
        precision="auto",
        initial=chosen.get("init"),
        schedule=None if schedule is None else SCHEDULES[schedule],
        learning_rate=chosen.get("learning_rate"),
    )
    wanted = quantized.preprocessing
    said = plan.describe(wanted.mean, wanted.std, PatchGrid.of(quantized.module))
    return all(run.get(key) == value for key, value in said.items() if key != "precision")
