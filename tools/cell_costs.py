"""What cells of published tables will take on this device, from a short measurement with random weights.

Of every model are measured, in seconds per image: a forward pass, and an iteration of inversion by each method that is
wanted. Iterations with fewer patches count by the FLOPs of `scaling.flops`. Of every recipe is measured on one small
model what quantizing takes before the first image and with each, and how much slower a fake-quantized pass is than one
in full precision; what comes before the images grows with the number of weights, what comes with each like the forward
pass. Reading and preparing a photograph is measured on made-up ones of ImageNet's mean size.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from bench_inversion import WARM_UP, Phase, contenders
from PIL import Image
from published import NUM_IMAGES, Cell
from scaling import flops

import dfq
from calibration.inversion import COMPARE_EVERY
from calibration.passes import Precision

STAND_IN = "deit_tiny_patch16_224"
"""What recipes are measured on."""
FEW, MORE = 2, 6
"""Images it is quantized on."""
SPEED_ROUNDS = 3
SPEED_STEPS = 2 * COMPARE_EVERY
"""Of a cell about speed: how often every phase is timed, and for how many iterations."""
_MEAN_SIZE = (469, 387)


@dataclass(frozen=True)
class Rates:
    """Of one model. forward, iteration (by method), load: seconds per image; share: what an iteration with so many of
    the patches takes, of the FLOPs of a dense one."""

    forward: float
    load: float
    parameters: int
    patches: int
    iteration: dict[str, float] = field(default_factory=dict)
    share: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RecipeRates:
    """Of one recipe on the stand-in. slower: a fake-quantized pass, in passes of full precision."""

    before: float
    per_image: float
    slower: float


@dataclass(frozen=True)
class Calibrated:
    """All that was measured."""

    models: dict[str, Rates]
    recipes: dict[str, RecipeRates]
    stand_in: Rates
    seconds: float

    def of(self, cell: Cell, num_images: int, workers: int = 0) -> dict[str, float]:
        """Seconds by part: `generate`, `quantize`, `evaluate`, or `speed`. num_images: that it is measured on.

        Images that several cells share, and the pass of full precision, are counted in each: see `totals`.
        """
        rates = self.models[cell.timm]
        if cell.kind == "speed":
            return {"speed": _speed_seconds(cell, rates)}
        recipe = self.recipes[cell.recipe]
        weights, passes = rates.parameters / self.stand_in.parameters, rates.forward / self.stand_in.forward
        return {
            "generate": _generate_seconds(cell, rates),
            "quantize": recipe.before * weights + recipe.per_image * passes * NUM_IMAGES,
            "evaluate": num_images * (recipe.slower * rates.forward + rates.load / max(1, workers)),
        }

    def baseline(self, timm: str, num_images: int, workers: int = 0) -> float:
        """Seconds of the pass of full precision, once for each model."""
        rates = self.models[timm]
        return num_images * (rates.forward + rates.load / max(1, workers))

    def totals(self, cells: Collection[Cell], num_images: int, workers: int = 0) -> dict[str, float]:
        """Seconds of all these cells by part, images made once and full precision measured once for each model."""
        found = dict.fromkeys(("generate", "quantize", "evaluate", "full precision", "speed"), 0.0)
        made = set()
        for cell in cells:
            seconds = self.of(cell, num_images, workers)
            images = (cell.timm, cell.images, cell.iterations)
            if "generate" in seconds and cell.images != "real":
                seconds["generate"] *= images not in made
                made.add(images)
            for part, value in seconds.items():
                found[part] += value
        models = {cell.timm for cell in cells if cell.kind == "accuracy"}
        found["full precision"] = sum(self.baseline(name, num_images, workers) for name in models)
        return {part: value for part, value in found.items() if value}


def calibrate(cells: Collection[Cell], device: str | None, batch_size: int | None, precision: Precision) -> Calibrated:
    """Measure what these cells need. batch_size: None for 32 on CUDA, where small batches run slower, elsewhere 4."""
    started = time.perf_counter()
    stand_in, recipes = _stand_in(sorted({c.recipe for c in cells if c.kind == "accuracy"}), device, batch_size)
    models = {}
    for name in dict.fromkeys(cell.timm for cell in cells):
        model = dfq.load_model(name, random_weights=True, device=device)
        own = [cell for cell in cells if cell.timm == name]
        rates = _rates(model, batch_size)
        methods = sorted({_timed_method(cell) for cell in own if cell.iterations})
        kept = {phase.kept for cell in own for schedule in ("smi", "dense") for phase in _phases(cell, rates, schedule)}
        models[name] = replace(
            rates,
            iteration={method: _iteration_seconds(model, method, batch_size, precision) for method in methods},
            share={count: flops(model.module, count) / flops(model.module, rates.patches) for count in kept},
        )
    return Calibrated(models, recipes, stand_in, time.perf_counter() - started)


def _timed_method(cell: Cell) -> str:
    """`smi` is `dense` with fewer patches, which the formula knows of."""
    return "dense" if cell.images == "smi" else cell.images


def _phases(cell: Cell, rates: Rates, schedule: str) -> dict[Phase, int]:
    """The iterations of a sparse cell in each phase of its schedule, or of a dense run as long; of others none."""
    if cell.images != "smi" or not cell.iterations:
        return {}
    runner = next(contender for contender in contenders(1) if contender.name == schedule)
    return runner.phases(rates.patches, cell.iterations)


def _generate_seconds(cell: Cell, rates: Rates) -> float:
    """Of all images. Every tenth iteration also looks at the unmoved images, a forward pass."""
    if cell.images == "real":
        return NUM_IMAGES * rates.load
    if not cell.iterations:
        return 0.0
    iterations = float(cell.iterations)
    if cell.images == "smi":
        iterations = sum(count * rates.share[phase.kept] for phase, count in _phases(cell, rates, "smi").items())
    return NUM_IMAGES * iterations * (rates.iteration[_timed_method(cell)] + rates.forward / COMPARE_EVERY)


def _speed_seconds(cell: Cell, rates: Rates) -> float:
    """Every phase is run alone, for a warm-up and so many steps, as often as there are rounds."""
    work = sum(rates.share[phase.kept] for phase in {**_phases(cell, rates, "smi"), **_phases(cell, rates, "dense")})
    return SPEED_ROUNDS * (WARM_UP + SPEED_STEPS + 1) * NUM_IMAGES * work * rates.iteration["dense"]


def _rates(model: dfq.Model, batch_size: int | None) -> Rates:
    pixels = _pixels(model, batch_size)
    forward = _seconds(lambda: _forward(model, pixels), model.device) / len(pixels)
    vit: Any = model.module
    parameters = sum(parameter.numel() for parameter in vit.parameters())
    return Rates(forward, _load_seconds(model), parameters, vit.patch_embed.num_patches)


def _stand_in(recipes: list[str], device: str | None, batch_size: int | None) -> tuple[Rates, dict[str, RecipeRates]]:
    model = dfq.load_model(STAND_IN, random_weights=True, device=device)
    rates = _rates(model, batch_size)
    pixels = _pixels(model, batch_size)
    images = {count: dfq.generate(model, "gaussian", count, progress=False) for count in (FEW, MORE)}
    found = {}
    for recipe in recipes:
        took = {}
        # The first time is a warm-up: what it takes longer would count as less for every further image.
        for count in (FEW, FEW, MORE):
            started = _now(model.device)
            made = dfq.quantize(model, "w8a8", calibration=images[count], recipe=recipe, progress=False)
            took[count] = _now(model.device) - started
        per_image = max(0.0, (took[MORE] - took[FEW]) / (MORE - FEW))
        slower = _seconds(lambda: _forward(made, pixels), model.device) / len(pixels) / rates.forward  # noqa: B023
        found[recipe] = RecipeRates(max(0.0, took[FEW] - FEW * per_image), per_image, slower)
    return rates, found


def _iteration_seconds(model: dfq.Model, method: str, batch_size: int | None, precision: Precision) -> float:
    """Per image, from what a longer run takes more than a shorter one."""
    batch, more = _batch(model, batch_size), 20 if model.device.type == "cuda" else 2

    def run(iterations: int) -> float:
        def make() -> None:
            dfq.generate(
                model, method, batch, iterations=iterations, batch_size=batch, precision=precision, progress=False
            )

        return _seconds(make, model.device, warm=False)

    run(1)
    short = run(1)
    return max(run(1 + more) - short, 1e-9) / more / batch


def _load_seconds(model: dfq.Model) -> float:
    """Of decoding and preparing a photograph, in one process. It is smooth noise, about as hard to decode as one."""
    width, height = _MEAN_SIZE
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (height // 8, width // 8, 3), dtype=torch.uint8, generator=generator)
    file = io.BytesIO()
    Image.fromarray(blocks.numpy()).resize(_MEAN_SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
    transform = model.preprocessing.transform()

    def read() -> None:
        for _ in range(4):
            transform(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))

    return _seconds(read, torch.device("cpu")) / 4


def _batch(model: dfq.Model, batch_size: int | None) -> int:
    return batch_size or (NUM_IMAGES if model.device.type == "cuda" else 4)


def _pixels(model: dfq.Model, batch_size: int | None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (_batch(model, batch_size), 3, *model.preprocessing.image_size)
    return torch.randn(shape, generator=generator).to(model.device)


def _forward(model: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> None:
    with torch.inference_mode():
        model(pixels)


def _seconds(run: Callable[[], None], device: torch.device, *, warm: bool = True) -> float:
    if warm:
        run()
    started = _now(device)
    run()
    return _now(device) - started


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
