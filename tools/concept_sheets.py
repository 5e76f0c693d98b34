"""The sheets of docs/concepts.md: what inversion does to an image, and what sparse inversion leaves out of it.

The images are those that `dfq generate --trace` would take snapshots of, on the same sheets; `concept_pictures.py` is
the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from scaling import flops
from torch import Tensor

import dfq
from calibration.calibration_set import CalibrationSet
from calibration.making import make_batch
from calibration.methods import Plan
from calibration.schedules import ProgressiveStop
from calibration.sheet import Sheet, class_name, on_ground
from calibration.tokens import PatchGrid
from calibration.trace import Trace
from dfq.datasets import class_captions

# Pixels of a tile's side, about: of a sheet with few tiles, and of one with many; and colours of a sheet. Noise is what
# no compression makes small.
LARGE, SMALL, COLOURS = 144, 112, 24


@dataclass
class TraceAt(Trace):
    """Snapshots at the iterations `wanted`."""

    wanted: tuple[int, ...] = ()

    def moments(self, iterations: int, decisions: Sequence[int] = ()) -> tuple[int, ...]:  # type: ignore[override]
        return self.wanted


def traced(
    model: dfq.Model, method: str, count: int, iterations: int | None, seed: int, wanted: tuple[int, ...]
) -> tuple[Trace, CalibrationSet]:
    """`count` images of a method, in one batch, and snapshots of them.

    iterations: None to stop when it is enough; wanted: when to take a snapshot, besides that of the end.
    """
    mean, std = model.preprocessing.mean, model.preprocessing.std
    trace = TraceAt(PatchGrid.of(model.module), mean, std, wanted)
    plan = Plan(method, count, iterations, count, seed, "fp32")
    return trace, make_batch(model.module, plan, 0, mean=mean, std=std, run={}, trace=trace)


def inversion_sheet(model: dfq.Model, iterations: int, seed: int, path: Path, columns: int = 5) -> list[str]:
    """A row for each start, noise under `dense` and dead leaves under `natural`: some moments, and the whole change.

    The first has the wanted class under it, the others the iteration, each with what the model gives the class then.
    Gives the same as text.
    """
    wanted = (0, *(digit * 10**power for power in range(6) for digit in (1, 2, 5)))
    lengths = {"dense": iterations, "natural": None}
    runs = {method: traced(model, method, 1, exactly, seed, wanted) for method, exactly in lengths.items()}
    height, width = shrunk(runs["dense"][0].snapshots[0][1], LARGE).shape[-2:]
    sheet = Sheet(len(runs), columns + 1, (height, width), captions=True)
    said = []
    for row, (method, (trace, made)) in enumerate(runs.items()):
        label = _label(made, 0)
        name = name_of(model, label)
        chosen = _spread(trace.snapshots, columns)
        tiles = [shrunk(pixels, LARGE)[0] for _, pixels, _ in chosen]
        for column, (tile, (iteration, pixels, _)) in enumerate(zip(tiles, chosen, strict=True)):
            share = confidence(model, pixels, label)
            sheet.paste(row, column, tile)
            sheet.caption(row, column, f"iteration {iteration}:" if column else f"{name}:", f" {100 * share:.0f} %")
            said.append(f"{method}, {name}, iteration {iteration}: {share:.4f}")
        difference, factor = amplified(tiles[0], tiles[-1])
        sheet.paste(row, columns, difference)
        sheet.caption(row, columns, f"change x {factor:.1f}")
    _save(sheet, path)
    return said


def schedule_sheet(model: dfq.Model, iterations: int, seed: int, path: Path, classes: int = 2) -> list[str]:
    """Two rows for each class, dense and sparse, at the moments when patches stop.

    The first has class and method under it, the others how many patches go on, and the FLOPs so far. Gives the same as
    text.
    """
    vit: Any = model.module
    moments = (0, *ProgressiveStop().decisions(iterations), iterations)
    runs = {method: traced(model, method, classes, iterations, seed, moments) for method in ("dense", "smi")}
    height, width = shrunk(runs["dense"][0].snapshots[0][1], SMALL).shape[-2:]
    sheet = Sheet(2 * classes, len(moments), (height, width), heads=True, captions=True)
    for column, moment in enumerate(moments):
        sheet.head(column, f"iteration {moment}")
    said = []
    for place, (method, (trace, made)) in enumerate(runs.items()):
        spent = spent_flops(vit, trace)
        for column, (moment, pixels, mask) in enumerate(trace.snapshots):
            tiles = shrunk(on_ground(pixels, trace.grid.to_pixels(mask)), SMALL)
            for image in range(classes):
                row, kept = 2 * image + place, int(mask[image].sum())
                sheet.paste(row, column, tiles[image])
                name, share = name_of(model, _label(made, image)), _confidence_at_end(made, image)
                if column == 0:
                    sheet.caption(row, column, name, f", {method}")
                else:
                    sheet.caption(row, column, f"{kept}:", f" {in_words(spent[moment])}")
                end = f", confidence {share:.4f}" if moment == moments[-1] else ""
                said.append(f"{method}, {name}, iteration {moment}: {kept} patches, {spent[moment]:.4g} FLOPs{end}")
    _save(sheet, path)
    return said


def spent_flops(vit: Any, trace: Trace) -> dict[int, float]:
    """By the iteration of each snapshot: FLOPs of the steps until then, for one image.

    Patches stop only where a snapshot is taken. What choosing patches and comparing iterates take is not in it.
    """
    spent, total = {}, 0.0
    snapshots = trace.snapshots
    for (iteration, _, mask), (following, _, _) in zip(snapshots, [*snapshots[1:], snapshots[-1]], strict=True):
        spent[iteration] = total
        total += (following - iteration) * flops(vit, int(mask[0].sum()))
    return spent


@torch.no_grad()
def confidence(model: dfq.Model, pixels: Tensor, label: int) -> float:
    """pixels: uint8 [1, 3, H, W] -> what the model gives the class `label`, of the whole image."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (model.preprocessing.mean, model.preprocessing.std))
    return float(model((pixels.float() / 255 - mean) / std).softmax(-1)[0, label])


def amplified(before: Tensor, after: Tensor) -> tuple[Tensor, float]:
    """The change of each pixel about gray, enlarged until one value in a hundred is cut off, and by how much it is."""
    change = after.float() - before.float()
    largest = float(change.abs().flatten().kthvalue(max(1, round(0.99 * change.numel()))).values)
    factor = 127 / max(largest, 1.0)
    return (127 + factor * change).round().clamp(0, 255).to(torch.uint8), factor


def shrunk(images: Tensor, side: int) -> Tensor:
    """uint8 [M, 3, H, W] -> the same at about `side` pixels: large ones interpolated, small ones by whole pixels."""
    height = images.shape[-2]
    if height < side:
        zoom = side // height
        return images.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1)
    size = (side, round(side * images.shape[-1] / height))
    shown = torch.nn.functional.interpolate(images.float(), size, mode="bicubic", antialias=True)
    return shown.round().clamp(0, 255).to(torch.uint8)


def in_words(flops: float) -> str:
    """1.25e12 -> 1.25 TFLOP."""
    unit, power = next(
        (each for each in (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)) if flops >= each[1]), ("FLOP", 1)
    )
    return f"{flops / power:.3g} {unit}"


def name_of(model: dfq.Model, label: int) -> str:
    return class_name(label, class_captions(model))


def _spread(snapshots: list[Any], count: int) -> list[Any]:
    """`count` of them, evenly by their number, the ends included."""
    last = len(snapshots) - 1
    return [snapshots[round(index * last / (count - 1))] for index in range(count)]


def _label(made: CalibrationSet, image: int) -> int:
    assert made.labels is not None
    return int(made.labels[image])


def _confidence_at_end(made: CalibrationSet, image: int) -> float:
    assert made.confidence is not None
    return float(made.confidence[image])


def _save(sheet: Sheet, path: Path) -> None:
    """As a PNG of few colours."""
    sheet.save(path)
    with Image.open(path) as picture:
        few = picture.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
