"""Speed of a quantized model beside full precision: in PyTorch, and in every runtime that is installed.

What a quantized model gains depends on what it is divided by. So each runtime also runs full precision, and PyTorch
runs it in float32 and in bfloat16. All take turns, several times over, so that a machine that is busy for a while is
busy for all of them. Speed does not depend on the values of weights: those of full precision are random, and no
original weights are needed.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dfq.architectures import build_architecture
from dfq.checkpoint import load
from dfq.errors import DfqError, UsageError
from dfq.machine import Machine, this_machine
from dfq.models import PYTORCH, Model, Origin
from dfq.onnx_export import export_network
from dfq.preprocessing import Preprocessing
from dfq.progress import progress_bar
from dfq.ptq.engine import QuantizedModel
from dfq.runtime import (
    FULL,
    HALF,
    RUNTIMES,
    Array,
    Products,
    RuntimeModel,
    is_onnx_file,
    missing_packages,
    open_model,
)
from dfq.versions import versions


@dataclass(frozen=True)
class Timing:
    """Forward passes of one batch size; times in milliseconds, p95: the time that 95 % of the passes stay below."""

    batch_size: int
    passes: int
    median_ms: float
    p95_ms: float

    @classmethod
    def of(cls, batch_size: int, seconds: Sequence[float]) -> Timing:
        """From the seconds of every pass."""
        median, p95 = 1000 * np.percentile(seconds, (50, 95))
        return cls(batch_size, len(seconds), float(median), float(p95))

    @property
    def images_per_second(self) -> float:
        """Of the median pass."""
        return 1000 * self.batch_size / self.median_ms


@dataclass(frozen=True)
class Row:
    """One model in one runtime.

    bits: `fp32`, `bf16`, or of the quantized model, `w8a8+bf16` where what is not integers is in bf16; size: of the
    weights in PyTorch, else of the file, in bytes; timings: by batch size, 1 first; products: what is computed in
    integers, of the quantized model.
    """

    runtime: str
    bits: str
    size: int
    timings: tuple[Timing, ...]
    products: Products | None = None

    @property
    def latency(self) -> Timing:
        """At batch size 1."""
        return self.timings[0]

    @property
    def best(self) -> Timing:
        """The batch size with the most images per second."""
        return max(self.timings, key=lambda timing: timing.images_per_second)

    def speedup(self, other: Row) -> dict[str, float]:
        """How many times as fast as `other`: `latency` at batch size 1, `throughput` with the best size of each."""
        return {
            "latency": other.latency.median_ms / self.latency.median_ms,
            "throughput": self.best.images_per_second / other.best.images_per_second,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "runtime": self.runtime,
            "bits": self.bits,
            "size": self.size,
            "latency_ms": self.latency.median_ms,
            "latency_p95_ms": self.latency.p95_ms,
            "images_per_second": self.best.images_per_second,
            "best_batch_size": self.best.batch_size,
            "timings": [vars(timing) | {"images_per_second": timing.images_per_second} for timing in self.timings],
            "products": None if self.products is None else dict(vars(self.products)),
        }


@dataclass(frozen=True)
class Bench:
    """What `bench` measured, and on what. rows: PyTorch in fp32 first; skipped: what is not among them, and why."""

    model: str
    bits: str
    image_size: tuple[int, int]
    threads: int
    repeats: int
    seconds: float
    seed: int
    machine: Machine
    versions: dict[str, str]
    rows: tuple[Row, ...]
    skipped: tuple[str, ...] = ()

    def full_precision(self, runtime: str) -> Row:
        """The row of the fp32 model in this runtime."""
        return next(row for row in self.rows if (row.runtime, row.bits) == (runtime, FULL))

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON, with the speedups of each row."""
        rows = [
            row.to_dict()
            | {
                "speedup_over_pytorch_fp32": row.speedup(self.rows[0]),
                "speedup_over_fp32": row.speedup(self.full_precision(row.runtime)),
            }
            for row in self.rows
        ]
        return {
            "model": self.model,
            "bits": self.bits,
            "image_size": list(self.image_size),
            "threads": self.threads,
            "repeats": self.repeats,
            "seconds": self.seconds,
            "seed": self.seed,
            "machine": self.machine.to_dict(),
            "versions": dict(self.versions),
            "rows": rows,
            "notes": self.notes(),
        }

    def notes(self) -> list[str]:
        """What has to be known to read the numbers, a line each."""
        lines = [
            f"{row.runtime} {row.bits}: {row.products.describe()}" for row in self.rows if row.products is not None
        ]
        lines += [line for row in self.rows if row.bits == self.bits for line in self._not_faster(row)]
        if self.machine.lacks_integer_dot:
            lines.append(
                "this processor has no instruction for sums of 8-bit products (VNNI, AMX): they gain little here, and "
                "saturate with 8-bit weights"
            )
        if self.machine.lacks_bfloat16:
            lines.append("this processor has no instruction for bf16: PyTorch emulates it")
        return [*lines, *self.skipped]

    def _not_faster(self, row: Row) -> Iterator[str]:
        full = self.full_precision(row.runtime)
        for own, other in zip(row.timings, full.timings, strict=True):
            if own.median_ms >= other.median_ms:
                yield f"{row.runtime}: {row.bits} is not faster than {FULL} at batch size {own.batch_size}"

    def table(self) -> str:
        """The same for people: aligned plain text, without a newline at the end."""
        sizes = [timing.batch_size for timing in self.rows[0].timings]
        head = ["runtime", "bits", "MB", "ms, batch 1", "p95", *(f"images/s, batch {size}" for size in sizes), "best"]
        cells = [[*head, "x PyTorch fp32", "x fp32"]]
        cells += [
            [
                *(row.runtime, row.bits, f"{row.size / 1e6:.2f}"),
                *(f"{row.latency.median_ms:.2f}", f"{row.latency.p95_ms:.2f}"),
                *(f"{timing.images_per_second:.1f}" for timing in row.timings),
                f"{row.best.images_per_second:.1f}",
                *(_ratios(row.speedup(other)) for other in (self.rows[0], self.full_precision(row.runtime))),
            ]
            for row in self.rows
        ]
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        rows = [
            "  ".join(
                text.ljust(width) if column < 2 else text.rjust(width)
                for column, (text, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in cells
        ]
        height, width = self.image_size
        packages = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return "\n".join(
            [
                f"{self.model}  {self.bits}  images of {height}x{width}, {self.threads} "
                f"{'thread' if self.threads == 1 else 'threads'}",
                *(f"  {row}".rstrip() for row in rows),
                "  x: times as fast as PyTorch in fp32, and as fp32 in the same runtime: latency at batch 1 / best "
                "throughput",
                f"  medians of {self.repeats} turns of at least {self.seconds:g} s each, one after the other; inputs "
                f"and the weights of full precision random (seed {self.seed})",
                f"  {self.machine.describe()}; {packages}",
                *(f"  {note}" for note in self.notes()),
            ]
        )


@dataclass
class _Contender:
    """What gets turns."""

    runtime: str
    bits: str
    size: int
    run: Callable[[Array], object]
    products: Products | None = None
    seconds: dict[int, list[float]] = field(default_factory=dict)

    def turn(self, images: Array, at_least: float) -> None:
        """Run the images for so many seconds, at least once.

        A first pass, which finds caches that others filled, is left out where passes are short enough for that to
        matter.
        """
        before = self.seconds.get(len(images))
        if before is None or min(before) < at_least:
            self.run(images)
        spent = 0.0
        while spent < at_least or not spent:
            start = time.perf_counter()
            self.run(images)
            passed = time.perf_counter() - start
            self.seconds.setdefault(len(images), []).append(passed)
            spent += passed

    def row(self) -> Row:
        timings = tuple(Timing.of(size, seconds) for size, seconds in self.seconds.items())
        return Row(self.runtime, self.bits, self.size, timings, self.products)


def bench(
    target: QuantizedModel | Path | str,
    *,
    batch_sizes: Sequence[int] = (1, 16),
    threads: int | None = None,
    repeats: int = 5,
    seconds: float = 0.5,
    runtimes: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Bench:
    """Measure how fast a quantized model is on this machine's CPU, beside full precision.

    target: a quantized model, the folder of one, or an ONNX file that `dfq.export` wrote; the former two are exported
    for the purpose, into a temporary folder. batch_sizes: images at once; 1 is always among them, for the latency.
    threads: of PyTorch and of every runtime, by default as many as PyTorch has. repeats: turns of each model and batch
    size; seconds: how long one lasts at least. runtimes: of `RUNTIMES`, by default all that are installed. seed: of the
    inputs and of the weights of full precision.

    Raises: UsageError for numbers out of range, a runtime that is not known, or a target in full precision; DfqError
    for a target that cannot be read or run, or a runtime that was asked for, or all of them, not installed.
    """
    _check(batch_sizes, threads, repeats, seconds, runtimes)
    present, skipped = _present(runtimes)
    with tempfile.TemporaryDirectory(prefix="dfq-bench-") as folder, _torch_threads(threads) as used:
        quantized = _opened(target, present, used, skipped, Path(folder))
        first = quantized[0]
        if first.bits == FULL:
            raise UsageError(f"{target} is a model in full precision; it is a quantized one that is measured beside it")
        contenders = _contenders(
            quantized, _full_precision(first.origin, first.preprocessing, seed), Path(folder), used
        )
        generator = np.random.default_rng(seed)
        shape = (3, *first.preprocessing.image_size)
        batches = [generator.standard_normal((size, *shape), dtype=np.float32) for size in sorted({1, *batch_sizes})]
        for images in batches:
            for contender in contenders:  # Kernels are chosen, and memory is laid out, for a new shape.
                contender.run(images)
        turns = [(contender, images) for images in batches for contender in contenders] * repeats
        with progress_bar(len(turns), "bench", "turn", shown=progress) as bar:
            for contender, images in turns:
                contender.turn(images, seconds)
                bar.update()
        return Bench(
            model=first.name,
            bits=first.bits,
            image_size=first.preprocessing.image_size,
            threads=used,
            repeats=repeats,
            seconds=seconds,
            seed=seed,
            machine=this_machine(),
            versions=versions(*(model.runtime for model in quantized)),
            rows=tuple(contender.row() for contender in contenders),
            skipped=tuple(skipped),
        )


def _contenders(quantized: Sequence[RuntimeModel], full: Model, folder: Path, threads: int) -> list[_Contender]:
    half = copy.deepcopy(full.module).to(torch.bfloat16)
    contenders = [
        _Contender(PYTORCH, bits, _bytes(module), _in_pytorch(module, dtype))
        for bits, module, dtype in ((FULL, full.module, torch.float32), (HALF, half, torch.bfloat16))
    ]
    exported = folder / "full-precision.onnx"
    export_network(full, exported)
    halved = [
        open_model(model.path, model.runtime, threads=threads, precision=HALF)
        for model in quantized
        if model.runtime == "openvino" and not this_machine().lacks_bfloat16
    ]
    for model in (*quantized, *halved):
        whole = open_model(exported, model.runtime, threads=threads, precision=model.precision)
        contenders.append(_Contender(model.runtime, model.precision, exported.stat().st_size, whole.run))
        bits = model.bits if model.precision == FULL else f"{model.bits}+{model.precision}"
        size = model.path.stat().st_size
        contenders.append(_Contender(model.runtime, bits, size, model.run, model.session.products()))
    return contenders


def _opened(
    target: QuantizedModel | Path | str, present: Sequence[str], threads: int, skipped: list[str], folder: Path
) -> list[RuntimeModel]:
    """The quantized model in every runtime that can run it; to `skipped` is added which cannot, and why."""
    if isinstance(target, QuantizedModel) or not is_onnx_file(target):
        exported = folder / "quantized.onnx"
        export_network(target if isinstance(target, QuantizedModel) else load(target, device="cpu"), exported)
        target = exported
    opened = []
    refusals: list[DfqError] = []
    for runtime in present:
        try:
            opened.append(open_model(target, runtime, threads=threads))
        except DfqError as error:
            refusals.append(error)
    if not opened:
        raise refusals[0]
    skipped += map(str, refusals)
    return opened


def _full_precision(origin: Origin, preprocessing: Preprocessing, seed: int) -> Model:
    """The architecture with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build_architecture(origin.architecture, origin.arguments).eval().requires_grad_(False)
        for parameter in module.parameters():
            # Whatever they start as: an offset of zeros, or a scale of ones, is a step that a runtime may leave out.
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return Model(
        module, preprocessing, replace(origin, checkpoint=None, random_weights=True, seed=seed, fingerprint="")
    )


def _in_pytorch(module: nn.Module, dtype: torch.dtype) -> Callable[[Array], object]:
    def run(images: Array) -> object:
        with torch.inference_mode():
            return module(torch.from_numpy(images).to(dtype))

    return run


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _present(runtimes: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Runtimes to measure, and lines about those that are not installed. Raises DfqError where one was asked for."""
    wanted = list(dict.fromkeys(runtimes or RUNTIMES))
    missing = {name: reason for name in wanted if (reason := missing_packages(name)) is not None}
    present = [name for name in wanted if name not in missing]
    if missing and (runtimes is not None or not present):
        raise DfqError("; ".join(dict.fromkeys(missing.values())))
    return present, list(missing.values())


def _check(
    batch_sizes: Sequence[int], threads: int | None, repeats: int, seconds: float, runtimes: Sequence[str] | None
) -> None:
    for what, values in (
        ("batch size", batch_sizes),
        ("number of threads", [1 if threads is None else threads]),
        ("number of turns", [repeats]),
    ):
        if not values or min(values) < 1:
            raise UsageError(f"the {what} is {min(values, default='missing')}; it must be 1 or more")
    if not 0 < seconds < float("inf"):
        raise UsageError(f"a turn is to last {seconds} s; it must be more than 0")
    for name in runtimes or ():
        if name not in RUNTIMES:
            raise UsageError(f"unknown runtime {name!r}: choose from {', '.join(RUNTIMES)}")
    if runtimes is not None and not runtimes:
        raise UsageError(f"no runtime is given: choose from {', '.join(RUNTIMES)}")


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[int]:
    """PyTorch with so many threads for a while; gives how many."""
    before = torch.get_num_threads()
    used = threads or before
    torch.set_num_threads(used)
    try:
        yield used
    finally:
        torch.set_num_threads(before)


def _ratios(speedup: dict[str, float]) -> str:
    return f"{speedup['latency']:.2f} / {speedup['throughput']:.2f}"
