"""Speed beside full precision: what is made of times, with times given by hand; then a short run of everything."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dfq
from dfq import benchmark, runtime
from dfq.benchmark import Bench, Row, Timing, bench
from dfq.errors import DfqError, UsageError
from dfq.machine import Machine
from dfq.models import Model
from dfq.runtime import Products, RuntimeModel

SHORT: dict[str, Any] = {"repeats": 2, "seconds": 1e-4, "progress": False}


def test_median_and_p95_of_five_passes() -> None:
    timing = Timing.of(4, [0.05, 0.01, 0.03, 0.02, 0.04])
    assert (timing.batch_size, timing.passes) == (4, 5)
    assert timing.median_ms == pytest.approx(30)
    # 0.95 x 4 = 3.8: four fifths of the way from the fourth to the fifth.
    assert timing.p95_ms == pytest.approx(48)
    assert timing.images_per_second == pytest.approx(4 / 0.03)


def row(runtime: str, bits: str, one_ms: float, sixteen_ms: float, **given: Any) -> Row:
    return Row(runtime, bits, 2_500_000, (Timing(1, 9, one_ms, one_ms * 1.5), Timing(16, 5, sixteen_ms, 990)), **given)


# 10 and 20 images/s; 20 and 32; 40 and 25; 80 and 64.
EAGER = row("pytorch", "fp32", 100, 800)
FULL = row("onnxruntime", "fp32", 50, 500)
FALLING = row("onnxruntime", "w8a8", 25, 640, products=Products(72, 74))
QUICK = row("onnxruntime", "w8a8", 12.5, 250, products=Products(72, 74))


def made(*rows: Row, sets: tuple[str, ...] | None = ("avx2", "avx_vnni", "avx512_bf16"), **given: Any) -> Bench:
    fields: dict[str, Any] = {"model": "vit", "bits": "w8a8", "image_size": (224, 224), "threads": 4, "repeats": 5}
    fields |= {"seconds": 0.5, "seed": 0, "machine": Machine("EPYC", 8, sets), "versions": {"dfq": "0.1.0"}}
    return Bench(**fields, rows=rows, **given)


def test_speedups_and_the_best_batch_size() -> None:
    assert (EAGER.best.batch_size, FULL.best.batch_size, FALLING.best.batch_size) == (16, 16, 1)
    assert FALLING.speedup(EAGER) == {"latency": 4.0, "throughput": 2.0}
    assert FALLING.speedup(FULL) == {"latency": 2.0, "throughput": 40 / 32}
    assert FULL.speedup(FULL) == {"latency": 1.0, "throughput": 1.0}


def test_json() -> None:
    plain = made(EAGER, FULL, FALLING, skipped=("openvino is not installed",)).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert (plain["model"], plain["bits"], plain["threads"], plain["image_size"]) == ("vit", "w8a8", 4, [224, 224])
    assert plain["machine"]["instruction_sets"] == ["avx2", "avx_vnni", "avx512_bf16"]
    quantized = plain["rows"][2]
    assert (quantized["latency_ms"], quantized["latency_p95_ms"]) == (25, 37.5)
    assert (quantized["images_per_second"], quantized["best_batch_size"], quantized["size"]) == (40.0, 1, 2_500_000)
    assert [timing["images_per_second"] for timing in quantized["timings"]] == [40.0, 25.0]
    assert quantized["speedup_over_pytorch_fp32"] == {"latency": 4.0, "throughput": 2.0}
    assert quantized["speedup_over_fp32"] == {"latency": 2.0, "throughput": 1.25}
    assert quantized["products"] == {"integers": 72, "all": 74, "weights_only": 0, "fused": 0}
    assert plain["rows"][0]["products"] is None
    assert "openvino is not installed" in plain["notes"]


def test_table() -> None:
    lines = made(EAGER, FULL, FALLING).table().splitlines()
    assert lines[0] == "vit  w8a8  images of 224x224, 4 threads"
    assert lines[1].split() == [
        *("runtime", "bits", "MB", "ms,", "batch", "1", "p95", "images/s,", "batch", "1", "images/s,", "batch", "16"),
        *("best", "x", "PyTorch", "fp32", "x", "fp32"),
    ]
    assert lines[4].split() == [
        *("onnxruntime", "w8a8", "2.50", "25.00", "37.50", "40.0", "25.0", "40.0"),
        *("4.00", "/", "2.00", "2.00", "/", "1.25"),
    ]
    assert len({len(line) for line in lines[1:5]}) == 1
    below = "\n".join(lines[5:])
    assert "medians of 5 turns of at least 0.5 s each" in below
    assert "weights of full precision random (seed 0)" in below
    assert "EPYC, 8 cores, avx2, avx_vnni, avx512_bf16; dfq 0.1.0" in below
    assert "onnxruntime w8a8: 72 of 74 products in integers" in below


def test_what_is_not_faster_is_said() -> None:
    assert "onnxruntime: w8a8 is not faster than fp32 at batch size 16" in made(EAGER, FULL, FALLING).notes()
    assert not any("not faster" in note for note in made(EAGER, FULL, QUICK).notes())


def test_what_the_processor_lacks_is_said() -> None:
    def lacking(sets: tuple[str, ...] | None) -> tuple[bool, bool]:
        notes = " ".join(made(EAGER, FULL, QUICK, sets=sets).notes())
        return "VNNI" in notes, "bf16" in notes

    assert lacking(("avx2",)) == (True, True)
    assert lacking(("avx2", "avx_vnni")) == (False, True)
    assert lacking(("avx2", "amx_int8", "avx512_bf16")) == (False, False)
    assert lacking(None) == (False, False)


@pytest.fixture(autouse=True)
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what processor this seems to be: one without bf16, at first, wherever the tests run."""

    def seem(*sets: str) -> None:
        for module in (benchmark, runtime):
            monkeypatch.setattr(module, "this_machine", lambda: Machine("EPYC", 8, sets))

    seem("avx2", "avx_vnni")
    return seem


@pytest.fixture
def exported(row_means: Any, described: dict[str, Any], tmp_path: Path) -> Path:
    """A small network that says it is the reference at W8A8."""
    path: Path = row_means.write(tmp_path / "m.onnx", described, quantized=True)
    return path


@pytest.fixture
def quick(row_means: Any, described: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of full precision, the same small network is run: exporting the reference takes seconds."""
    full = described | {"bits": "fp32"}
    monkeypatch.setattr(benchmark, "export_network", lambda _model, path: row_means.write(path, full))


def test_all_contenders_at_all_batch_sizes(exported: Path) -> None:
    threads = torch.get_num_threads()
    result = dfq.bench(exported, batch_sizes=(3, 2, 3), threads=threads + 1, **SHORT)
    assert torch.get_num_threads() == threads
    assert [(row.runtime, row.bits) for row in result.rows] == [
        *(("pytorch", "fp32"), ("pytorch", "bf16")),
        *(("onnxruntime", "fp32"), ("onnxruntime", "w8a8")),
        *(("openvino", "fp32"), ("openvino", "w8a8")),
    ]
    assert (result.model, result.bits, result.threads, result.image_size) == (
        "reference",
        "w8a8",
        threads + 1,
        (32, 32),
    )
    for measured in result.rows:
        assert [timing.batch_size for timing in measured.timings] == [1, 2, 3]
        for timing in measured.timings:
            assert timing.passes >= 2
            assert 0 < timing.median_ms <= timing.p95_ms
    eager, half, full, quantized = result.rows[:4]
    assert (half.size * 2, quantized.size) == (eager.size, exported.stat().st_size)
    assert full.size > eager.size * 0.9
    assert (full.products, quantized.products) == (None, Products(1, 1))
    assert result.versions.keys() >= {"dfq", "torch", "onnxruntime", "openvino"}
    assert result.skipped == ()


@pytest.mark.usefixtures("quick")
def test_openvino_also_runs_in_bf16_where_the_processor_has_it(exported: Path, processor: Callable[..., None]) -> None:
    processor("avx2", "amx_int8", "amx_bf16")
    result = bench(exported, batch_sizes=[1], **SHORT)
    assert [(row.runtime, row.bits) for row in result.rows[2:]] == [
        *(("onnxruntime", "fp32"), ("onnxruntime", "w8a8")),
        *(("openvino", "fp32"), ("openvino", "w8a8"), ("openvino", "bf16"), ("openvino", "w8a8+bf16")),
    ]
    assert result.rows[-1].products is not None
    assert result.full_precision("openvino") is result.rows[4]
    # Of what is not faster only the file as it is by itself is spoken of.
    assert not any("w8a8+bf16 is not faster" in note for note in result.notes())


@pytest.mark.usefixtures("quick")
def test_turns_alternate(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, str, int]] = []
    turn = benchmark._Contender.turn

    def noted(self: Any, images: np.ndarray, at_least: float) -> None:
        turns.append((self.runtime, self.bits, len(images)))
        turn(self, images, at_least)

    monkeypatch.setattr(benchmark._Contender, "turn", noted)
    bench(exported, batch_sizes=(1, 2), runtimes=["onnxruntime"], **(SHORT | {"repeats": 3}))
    everyone = [("pytorch", "fp32"), ("pytorch", "bf16"), ("onnxruntime", "fp32"), ("onnxruntime", "w8a8")]
    assert turns == [(*who, size) for _ in range(3) for size in (1, 2) for who in everyone]


def test_a_turn_lasts_as_long_as_asked_and_leaves_out_a_short_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    passes = iter([9.0, 0.2, 0.1, 0.3, 0.4])

    def run(_images: np.ndarray) -> None:
        now[0] += next(passes)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    contender = benchmark._Contender("pytorch", "fp32", 1, run)
    contender.turn(np.zeros((2, 3, 1, 1), np.float32), 0.5)
    assert contender.seconds[2] == pytest.approx([0.2, 0.1, 0.3])
    contender.turn(np.zeros((2, 3, 1, 1), np.float32), 0.1 - 1e-6)
    assert contender.seconds[2] == pytest.approx([0.2, 0.1, 0.3, 0.4])


def test_a_quantized_model_is_exported_for_the_purpose(
    reference: Model, noise: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    quantized = dfq.quantize(reference, "w8a8", calibration=noise, recipe="deploy", progress=False)
    result = bench(quantized, batch_sizes=[1], runtimes=["onnxruntime"], **SHORT)
    assert [(row.runtime, row.bits) for row in result.rows[2:]] == [("onnxruntime", "fp32"), ("onnxruntime", "w8a8")]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_no_original_weights_are_read(row_means: Any, described: dict[str, Any], tmp_path: Path) -> None:
    gone = described | {"model": described["model"] | {"checkpoint": str(tmp_path / "gone.safetensors")}}
    path = row_means.write(tmp_path / "m.onnx", gone, quantized=True)
    assert bench(path, batch_sizes=[1], runtimes=["onnxruntime"], **SHORT).model == "reference"


def test_full_precision_depends_on_the_seed_alone(reference: Model) -> None:
    def parameters(seed: int) -> list[torch.Tensor]:
        module = benchmark._full_precision(reference.origin, reference.preprocessing, seed).module
        return list(module.parameters())

    before = torch.random.get_rng_state()
    first, again, other = parameters(1), parameters(1), parameters(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not any(bool((parameter == 0).any()) for parameter in first)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.usefixtures("quick")
def test_what_is_not_installed_is_left_out_and_said(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = 'openvino is not installed: pip install "dfq[openvino]"'
    monkeypatch.setattr(benchmark, "missing_packages", lambda name: said if name == "openvino" else None)
    result = bench(exported, batch_sizes=[1], **SHORT)
    assert {row.runtime for row in result.rows} == {"pytorch", "onnxruntime"}
    assert result.skipped == (said,)
    assert result.table().splitlines()[-1] == f"  {said}"
    with pytest.raises(DfqError, match="openvino is not installed"):
        bench(exported, runtimes=["onnxruntime", "openvino"], **SHORT)
    monkeypatch.setattr(benchmark, "missing_packages", lambda name: f"{name} is not installed")
    with pytest.raises(DfqError, match="onnxruntime is not installed; openvino is not installed"):
        bench(exported, **SHORT)


@pytest.mark.usefixtures("quick")
def test_a_runtime_that_cannot_run_the_model_is_left_out_and_said(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_model = benchmark.open_model

    def refusing(path: Path, runtime: str, **given: Any) -> RuntimeModel:
        if runtime == "openvino":
            raise DfqError(f"openvino cannot run {path}: no INT4")
        return open_model(path, runtime, **given)

    monkeypatch.setattr(benchmark, "open_model", refusing)
    result = bench(exported, batch_sizes=[1], **SHORT)
    assert result.skipped == (f"openvino cannot run {exported}: no INT4",)
    with pytest.raises(DfqError, match="no INT4"):
        bench(exported, runtimes=["openvino"], **SHORT)


def test_bad_input(row_means: Any, described: dict[str, Any], exported: Path, tmp_path: Path) -> None:
    for wrong, said in (
        ({"batch_sizes": (4, 0)}, "the batch size is 0; it must be 1 or more"),
        ({"batch_sizes": ()}, "the batch size is missing"),
        ({"threads": 0}, "the number of threads is 0"),
        ({"repeats": 0}, "the number of turns is 0"),
        ({"seconds": 0.0}, "a turn is to last 0.0 s"),
        ({"seconds": float("nan")}, "a turn is to last nan s"),
        ({"runtimes": ["tensorrt"]}, "unknown runtime 'tensorrt': choose from onnxruntime, openvino"),
        ({"runtimes": []}, "no runtime is given"),
    ):
        with pytest.raises(UsageError, match=said):
            bench(exported, **(SHORT | wrong))
    full = row_means.write(tmp_path / "full.onnx", described | {"bits": "fp32"})
    with pytest.raises(UsageError, match="is a model in full precision"):
        bench(full, **SHORT)
    with pytest.raises(DfqError, match="there is no file"):
        bench(tmp_path / "none.onnx", **SHORT)
    with pytest.raises(DfqError, match="is not a quantized model"):
        bench(tmp_path, **SHORT)
