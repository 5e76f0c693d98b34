"""`dfq demo`: every step on the embedded model, in a minute or two, offline."""

from __future__ import annotations

import time
from pathlib import Path

from dfq.architectures import REFERENCE
from dfq.checkpoint import CONFIG, claim_directory, save
from dfq.datasets import reference_digits
from dfq.evaluation import Evaluation, evaluate
from dfq.generation import generate
from dfq.models import Model, load_model
from dfq.ptq.engine import quantize
from dfq.reporting.page import report
from dfq.reporting.results import NAMES, write_evaluation

BITS = ("w8a8", "w4a8", "w4a4")
ITERATIONS = 400
NUM_IMAGES = 64
PAGE = "report.html"


def demo(out: Path, *, progress: bool = True) -> str:
    """Generate, quantize and evaluate into `out`; gives the table that `dfq demo` prints.

    Raises DfqError where `out` holds something else, or scikit-learn is missing.
    """
    started = time.monotonic()
    model = load_model(REFERENCE)
    digits = reference_digits(model)
    # Before the work, not after it.
    for bits in BITS:
        claim_directory(out / bits, {"bits": bits, "model": model.origin.to_dict()}, overwrite=False)
    calibration = generate(model, "smi", NUM_IMAGES, iterations=ITERATIONS, out=out / "calibration", progress=progress)
    results: list[Evaluation] = []
    for bits in BITS:
        quantized = quantize(model, bits, calibration=calibration, progress=progress)
        save(quantized, out / bits)
        results.append(evaluate(quantized, digits, baseline=model, progress=progress))
        write_evaluation(results[-1], out / bits / NAMES["evaluation"], out / bits)
    report([out / bits for bits in BITS], out / PAGE, calibration=out / "calibration", progress=progress)
    return "\n".join(
        [
            *_table(model, results),
            "",
            *_where(out),
            "",
            f"{time.monotonic() - started:.0f} s; the quantizer saw no real image.",
        ]
    )


def _table(model: Model, results: list[Evaluation]) -> list[str]:
    first = results[0]
    assert first.comparison is not None
    rows = [("", "top-1 %", "drop, points (95 % interval)", "same answer %", "weights, kB")]
    rows.append(("fp32", f"{first.comparison.baseline_top1:.1f}", "", "", f"{model.weight_bytes / 1000:.0f}"))
    for result in results:
        assert result.comparison is not None
        low, high = result.comparison.drop_ci95
        rows.append(
            (
                result.bits.upper(),
                f"{result.top1:.1f}",
                f"{result.comparison.drop:.1f} [{low:.1f}, {high:.1f}]",
                f"{result.comparison.agreement:.1f}",
                f"{result.weight_bytes / 1000:.0f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    title = f"A small ViT that reads handwritten digits, on {first.num_images} digits it was not trained on:"
    ends = "Patch embedding and classifier have 8 bits in all of them."
    return [title, "", lines[0], "-" * len(lines[0]), *lines[1:], "", ends]


def _where(out: Path) -> list[str]:
    return [
        f"{out / 'calibration' / 'preview.png'}   what the model sees in itself: the patches that survived",
        f"{out / 'calibration'}/   the calibration set",
        f"{out / PAGE}   the three side by side",
        *(f"{out / bits}/   the {bits.upper()} model: model.safetensors, {CONFIG}" for bits in BITS),
    ]
