"""Making one cell of a published table: images, quantization, measurement, as a user of dfq does them."""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from accuracy_table import Replayed, machine, quantized_at_a_cost
from bench_inversion import Bench, contenders
from cell_costs import SPEED_ROUNDS, SPEED_STEPS
from published import NUM_IMAGES, Cell, model_called
from scaling import flops
from torch import Tensor

import dfq
from dfq.versions import versions


class Recorded:
    """A model that keeps the logits it gives, so that they can be replayed beside every quantized one."""

    def __init__(self, model: dfq.Model) -> None:
        self._model = model
        self._kept: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, images: Tensor) -> Tensor:
        logits = self._model(images)
        self._kept.append(logits.float().cpu())
        return logits

    @property
    def logits(self) -> Tensor:
        """[M, C]"""
        return torch.cat(self._kept)


class Workshop:
    """One model, loaded when it is first needed, and what its cells share."""

    def __init__(self, timm: str, arguments: argparse.Namespace) -> None:
        self.timm = timm
        self._arguments = arguments
        self._model: dfq.Model | None = None
        self._logits: Tensor | None = None

    @property
    def model(self) -> dfq.Model:
        if self._model is None:
            checkpoint = self._arguments.checkpoint.get(model_called(self.timm))
            self._model = dfq.load_model(self.timm, checkpoint=checkpoint, device=self._arguments.device)
        return self._model

    def make(self, cell: Cell) -> dict[str, Any]:
        """What is measured of a cell."""
        model = self.model
        line = {
            "preprocessing": model.preprocessing.describe(),
            "device": str(model.device),
            "machine": machine(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        return line | (self._speed(cell) if cell.kind == "speed" else self._accuracy(cell))

    def _accuracy(self, cell: Cell) -> dict[str, Any]:
        # First, since it is quick and finds what is wrong with the photographs before any image is made.
        logits = self._baseline()
        images, seconds = self._calibration(cell)
        quantized, cost = quantized_at_a_cost({"bits": cell.bits, "recipe": cell.recipe}, self.model, images)
        started = time.monotonic()
        result = self._evaluate(quantized, Replayed(self.model, logits))
        return result.to_dict() | {
            "peak_memory_mb": cost["peak_memory_mb"],
            "seconds": {
                "generate": seconds,
                "quantize": cost["quantize_seconds"],
                "evaluate": round(time.monotonic() - started, 1),
            },
        }

    def _calibration(self, cell: Cell) -> tuple[dfq.CalibrationSet, float | None]:
        """The images, and the seconds that making them took: None where they were made by a run that was stopped."""
        arguments = self._arguments
        started = time.monotonic()
        if cell.images == "real":
            real = dfq.real_images(self.model, arguments.train, NUM_IMAGES, seed=arguments.seed)
            return real, round(time.monotonic() - started, 1)
        weights = arguments.checkpoint.get(cell.model)
        model = cell.timm if weights is None else f"{cell.timm}-{weights.stem}"
        name = f"{model}-{cell.images}-{cell.iterations or 0}-{arguments.precision}-seed{arguments.seed}"
        folder = arguments.out / "sets" / name
        timing = folder.with_name(f"{name}.seconds")
        fresh = not folder.exists()
        images = dfq.generate(
            self.model,
            cell.images,
            NUM_IMAGES,
            iterations=cell.iterations or "auto",
            learning_rate=cell.learning_rate,
            batch_size=NUM_IMAGES,
            precision=arguments.precision,
            seed=arguments.seed,
            out=folder,
        )
        if fresh:
            timing.write_text(f"{time.monotonic() - started:.1f}")
        return images, float(timing.read_text()) if timing.exists() else None

    def _baseline(self) -> Tensor:
        """Logits of full precision on the photographs, once for all cells."""
        if self._logits is None:
            recorded = Recorded(self.model)
            self._evaluate(recorded, None)
            self._logits = recorded.logits
        return self._logits

    def _evaluate(self, model: Any, baseline: Any) -> dfq.Evaluation:
        arguments = self._arguments
        return dfq.evaluate(
            model,
            arguments.imagenet,
            baseline=baseline,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            limit=arguments.limit,
        )

    def _speed(self, cell: Cell) -> dict[str, Any]:
        """Dense and sparse inversion by `bench_inversion`, every phase of both in turns, and their FLOPs."""
        started = time.monotonic()
        bench = Bench.of(self.model, NUM_IMAGES, self._arguments.precision, self._arguments.seed)
        vit: Any = self.model.module
        patches = vit.patch_embed.num_patches
        runs = {
            runner.name: runner.phases(patches, cell.iterations or 0)
            for runner in contenders(1)
            if runner.name in ("dense", "smi")
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(SPEED_ROUNDS):
            each = {phase: bench.seconds(phase, SPEED_STEPS) for phase in {**runs["dense"], **runs["smi"]}}
            for name, phases in runs.items():
                seconds[name].append(sum(each[phase] * count for phase, count in phases.items()))
        work = {
            name: sum(flops(vit, phase.kept) * count for phase, count in phases.items())
            for name, phases in runs.items()
        }
        ratios = [dense / sparse for dense, sparse in zip(seconds["dense"], seconds["smi"], strict=True)]
        return {
            "ratio": median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "flops_ratio": work["dense"] / work["smi"],
            "seconds_per_image": {name: median(found) / NUM_IMAGES for name, found in seconds.items()},
            "seconds": {"speed": round(time.monotonic() - started, 1)},
        }
