"""A quantized model in a folder, with what was measured of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dfq
from calibration import CalibrationSet
from dfq.cli import main
from dfq.models import Model
from dfq.ptq.engine import QuantizedModel


@pytest.fixture(scope="session")
def quantized_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model at W4A8 with its images, evaluated on 60 digits; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("reporting") / "ref-w4a8"
    made = ("--recipe", "paper", "--method", "leaves", "-n", "6", "--device", "cpu", "--quiet")
    assert main(["quantize", "reference", "--bits", "w4a8", *made, "--out", str(folder)]) == 0
    told = ("--baseline", "--limit", "60", "--json", str(folder / "evaluation.json"), "--quiet")
    assert main(["evaluate", str(folder), *told]) == 0
    return folder


@pytest.fixture
def folder(quantized_folder: Path, tmp_path: Path) -> Path:
    """A copy of it that tests may change."""
    return Path(shutil.copytree(quantized_folder, tmp_path / "ref-w4a8"))


@pytest.fixture(scope="session")
def w4a8(reference: Model, noise: CalibrationSet) -> QuantizedModel:
    """The reference model, quantized by a recipe that takes no time; tests leave it as it is."""
    return dfq.quantize(reference, "w4a8", calibration=noise, recipe="paper", progress=False)


@pytest.fixture(scope="session")
def bench_json() -> Callable[..., dict[str, Any]]:
    """What `dfq bench --json` writes, of two rows; changes: entries that are to be others."""

    def make(**changes: Any) -> dict[str, Any]:
        def row(bits: str, speed: float) -> dict[str, Any]:
            return {
                "runtime": "openvino",
                "bits": bits,
                "size": 250_000,
                "latency_ms": 4.0,
                "images_per_second": speed,
                "speedup_over_fp32": {"latency": 1.0, "throughput": speed / 250},
            }

        plain = {
            "model": "reference",
            "bits": "w4a8",
            "threads": 2,
            "machine": {"cpu": "A <fast> one"},
            "versions": {"openvino": "2026.4"},
            "notes": ["said & done"],
            "rows": [row("fp32", 250.0), row("w4a8", 375.0)],
        }
        return plain | changes

    return make
