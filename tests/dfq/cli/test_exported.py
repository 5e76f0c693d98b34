"""`dfq evaluate` on ONNX files, end to end on the reference's digits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dfq.datasets import reference_digits
from dfq.models import Model


@pytest.fixture
def exported(row_means: Any, described: dict[str, Any], tmp_path: Path) -> Path:
    """A file that claims to be the reference at W8A8, and answers as it likes."""
    path: Path = row_means.write(tmp_path / "m.onnx", described, quantized=True)
    return path


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_evaluate_beside_the_original(
    status: Callable[..., int],
    row_means: Any,
    reference: Model,
    exported: Path,
    runtime: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "result.json"
    options = ("--runtime", runtime, "--baseline", "--limit", 50, "--json", file, "--quiet")
    assert status("evaluate", exported, *options) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith(f"reference, W8A8, recipe deploy, in {runtime}\n")
    assert f"forward passes in {runtime} on cpu" in said.out
    result = json.loads(file.read_text())

    digits = reference_digits(reference)
    chosen = [digits[index * len(digits) // 50] for index in range(50)]
    images, labels = torch.stack([image for image, _ in chosen]), np.array([int(label) for _, label in chosen])
    predicted = row_means.logits(images.numpy(), quantized=True).argmax(1)
    baseline = reference(images).argmax(1).numpy()
    # One image may lie where the last bit decides.
    assert result["top1"] == pytest.approx(100 * np.mean(predicted == labels), abs=2)
    assert result["agreement"] == pytest.approx(100 * np.mean(predicted == baseline), abs=2)
    assert result["baseline_top1"] == pytest.approx(100 * np.mean(baseline == labels))
    assert (result["bits"], result["runtime"], result["device"], result["seed"]) == ("w8a8", runtime, "cpu", 7)
    assert (result["num_images"], result["weight_bytes"]) == (50, 1234)
    assert runtime in result["versions"]


def test_onnxruntime_is_the_default_and_the_gate_works(
    status: Callable[..., int], exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # It answers at random, and the reference is right nearly always.
    assert status("evaluate", exported, "--limit", 50, "--max-drop", 30, "--quiet") == 3
    said = capsys.readouterr()
    assert "in onnxruntime" in said.out
    assert "exceeds --max-drop 30" in said.err


def test_bad_input(
    refused: Callable[..., None],
    exported: Path,
    row_means: Any,
    described: dict[str, Any],
    w8a8: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused(("evaluate", tmp_path / "none.onnx"), 1, "there is no file")
    refused(("evaluate", exported, "--crop-pct", "0.9"), 2, "is an exported model and keeps its own preprocessing")
    refused(("evaluate", w8a8, "--runtime", "openvino"), 2, "--runtime is for an exported model")
    refused(("evaluate", "reference", "--runtime", "openvino"), 2, "--runtime is for an exported model")
    refused(("evaluate", w8a8, "--precision", "bf16"), 2, "--precision is for an exported model")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused(("evaluate", exported, "--device", "cuda"), 2, "runs in onnxruntime on the CPU, not on cuda")
    other = described | {"model": described["model"] | {"fingerprint": "0" * 64}}
    refused(
        ("evaluate", row_means.write(tmp_path / "o.onnx", other), "--baseline", "--device", "cpu"), 1, "the weights"
    )
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(exported.read_bytes()[:-20])
    refused(("evaluate", broken), 1, "is not a whole ONNX file")
    monkeypatch.setitem(sys.modules, "openvino", None)
    refused(("evaluate", exported, "--runtime", "openvino"), 1, 'pip install "dfq[openvino]"')


def test_a_runtime_that_is_not_known(status: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert status("evaluate", "m.onnx", "--runtime", "tensorrt") == 2
    said = capsys.readouterr().err
    assert "onnxruntime" in said
    assert "openvino" in said


def test_bench(status: Callable[..., int], exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "speed.json"
    options = ("--batch-size", 1, 2, "--threads", 1, "--repeats", 1, "--seconds", 0.001, "--runtimes", "onnxruntime")
    assert status("bench", exported, *options, "--json", file, "--quiet") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith("reference  w8a8  images of 32x32, 1 thread\n")
    result = json.loads(file.read_text())
    assert [(row["runtime"], row["bits"]) for row in result["rows"]] == [
        *(("pytorch", "fp32"), ("pytorch", "bf16"), ("onnxruntime", "fp32"), ("onnxruntime", "w8a8"))
    ]
    assert (result["threads"], result["repeats"], result["seconds"]) == (1, 1, 0.001)
    assert [timing["batch_size"] for timing in result["rows"][0]["timings"]] == [1, 2]


def test_bench_of_what_cannot_be_measured(
    status: Callable[..., int], refused: Callable[..., None], exported: Path, tmp_path: Path
) -> None:
    refused(("bench", tmp_path / "none.onnx"), 1, "there is no file")
    refused(("bench", tmp_path), 1, "is not a quantized model")
    refused(("bench", exported, "--json", tmp_path / "no" / "x.json"), 2, "there is no folder")
    for wrong in (("--batch-size", 0), ("--threads", 0), ("--seconds", 0), ("--runtimes", "tensorrt"), ("--runtimes",)):
        assert status("bench", exported, *wrong) == 2
