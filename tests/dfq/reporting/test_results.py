"""Results that lie beside a model: whose they are, and what is none."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dfq
from calibration.files import sha256_of
from dfq.chart import sensitivity_svg
from dfq.errors import DfqError
from dfq.ptq.engine import QuantizedModel
from dfq.reporting import views
from dfq.reporting.account import Account
from dfq.reporting.results import Results, read_results


def read(folder: Path, **given: Path) -> Results:
    return read_results(folder, dfq.load(folder), sha256_of(folder / "model.safetensors"), given)


def test_the_evaluation_beside_the_model_is_found(folder: Path) -> None:
    found = read(folder)
    assert found.evaluation is not None
    assert found.evaluation.num_images == 60
    assert sum(counts.num_images for counts in found.evaluation.classes) == 60
    assert (found.bench, found.sensitivity, found.left_out) == (None, None, ())


def test_bench(folder: Path, bench_json: Callable[..., dict[str, Any]]) -> None:
    (folder / "bench.json").write_text(json.dumps(bench_json()))
    found = read(folder).bench
    assert found is not None
    assert found.best is not None
    assert (found.best.bits, found.best.over_fp32, found.cpu) == ("w4a8", 1.5, "A <fast> one")


def test_results_of_other_weights_are_left_out_with_a_sentence(folder: Path) -> None:
    path = folder / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights_sha256": "0" * 64}))
    found = read(folder)
    assert found.evaluation is None
    assert "other weights" in found.left_out[0]
    with pytest.raises(DfqError, match="other weights"):
        read(folder, evaluation=path)


def test_results_of_another_model_are_left_out_with_a_sentence(
    folder: Path, bench_json: Callable[..., dict[str, Any]]
) -> None:
    (folder / "bench.json").write_text(json.dumps(bench_json(bits="w8a8")))
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


def test_numbers_that_json_has_not_are_refused(folder: Path, bench_json: Callable[..., dict[str, Any]]) -> None:
    content = bench_json()
    content["rows"][1]["latency_ms"] = float("inf")
    (folder / "bench.json").write_text(json.dumps(content))
    with pytest.raises(DfqError, match="it holds inf"):
        read(folder)


def test_a_file_that_was_asked_for_must_be_there(folder: Path) -> None:
    with pytest.raises(DfqError, match=r"none\.json"):
        read(folder, bench=folder / "none.json")


VALUES = st.sampled_from([None, True, 0, -1, 101, 2**70, 1e300, -0.5, "", "w4a8", [], [1], {}, {"a": 1}])


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON document something stands."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for key, part in parts for found in leaves(part, (*path, key))]


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_file_says_is_shown_or_refused(
    data: st.DataObject, folder: Path, bench_json: Callable[..., dict[str, Any]], w4a8: QuantizedModel
) -> None:
    costs = {"name": "head.weight", "bits": 4, "kl": 0.25, "sqnr_db": None, "changed": 50.0}
    sensitivity = {"model": "reference", "bits": "w4a4", "recipe": "fast", "num_images": 3, "method": "leaves"}
    original = {
        "evaluation": json.loads((folder / "evaluation.json").read_text()),
        "bench": bench_json(),
        "sensitivity": sensitivity | {"together": costs, "sites": [costs]},
    }
    kind = data.draw(st.sampled_from(sorted(original)))
    content = copy.deepcopy(original[kind])
    *way, last = data.draw(st.sampled_from(leaves(content)))
    inside: Any = content
    for key in way:
        inside = inside[key]
    inside[last] = data.draw(VALUES)
    path = folder / "mutated.json"
    path.write_text(json.dumps(content))
    try:
        found = read_results(folder, w4a8, sha256_of(folder / "model.safetensors"), {kind: path})
    except DfqError:
        return
    shown = Account(folder, w4a8, "0", 1, 1, found, None, None, {}, ())
    assert all(card.title for card in views.verdict(shown))
    if found.evaluation is not None:
        views.accuracy_rows(found.evaluation)
        views.class_rows(shown, found.evaluation)
        views.changed_rows(shown, found.evaluation)
    if found.bench is not None:
        views.speed_rows(found.bench)
    if found.sensitivity is not None:
        sensitivity_svg(found.sensitivity)
