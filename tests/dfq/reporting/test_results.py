"""Results that lie beside a model: whose they are, and what is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dfq
from calibration.files import sha256_of
from dfq.errors import DfqError
from dfq.reporting.results import Results, read_results


def read(folder: Path, **given: Path) -> Results:
    return read_results(folder, dfq.load(folder), sha256_of(folder / "model.safetensors"), given)


def test_the_evaluation_beside_the_model_is_found(folder: Path) -> None:
    found = read(folder)
    assert found.evaluation is not None
    assert found.evaluation.num_images == 60
    assert sum(counts.num_images for counts in found.evaluation.classes) == 60
    assert (found.bench, found.sensitivity, found.left_out) == (None, None, ())


def test_bench(folder: Path, bench_json: dict[str, Any]) -> None:
    (folder / "bench.json").write_text(json.dumps(bench_json))
    found = read(folder).bench
    assert found is not None
    assert found.best is not None
    assert (found.best.bits, found.best.over_fp32, found.cpu) == ("w4a8", 2.5, "A <fast> one")


def test_results_of_other_weights_are_left_out_with_a_sentence(folder: Path) -> None:
    path = folder / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights_sha256": "0" * 64}))
    found = read(folder)
    assert found.evaluation is None
    assert "other weights" in found.left_out[0]
    with pytest.raises(DfqError, match="other weights"):
        read(folder, evaluation=path)


def test_results_of_another_model_are_left_out_with_a_sentence(folder: Path, bench_json: dict[str, Any]) -> None:
    (folder / "bench.json").write_text(json.dumps(bench_json | {"bits": "w8a8"}))
    found = read(folder)
    assert found.bench is None
    assert "reference at w8a8, and the model here is reference at w4a8" in found.left_out[0]


@pytest.mark.parametrize("text", ["[]", "{}", "nonsense", '{"model": "reference", "classes": 3}', '{"top1": NaN}'])
@pytest.mark.parametrize("kind", ["evaluation", "bench", "sensitivity"])
def test_what_is_no_result_is_named(folder: Path, kind: str, text: str) -> None:
    path = folder / f"{kind}.json"
    path.write_text(text)
    with pytest.raises(DfqError, match=path.name):
        read(folder)


def test_numbers_that_json_has_not_are_refused(folder: Path, bench_json: dict[str, Any]) -> None:
    bench_json["rows"][1]["latency_ms"] = float("inf")
    (folder / "bench.json").write_text(json.dumps(bench_json))
    with pytest.raises(DfqError, match="it holds inf"):
        read(folder)


def test_a_file_that_was_asked_for_must_be_there(folder: Path) -> None:
    with pytest.raises(DfqError, match=r"none\.json"):
        read(folder, bench=folder / "none.json")
