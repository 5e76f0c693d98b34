"""The tools that measure exported models: a cell on the reference's digits, no cell twice, and what the tables say."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> Any:
    load_tool("accuracy_table")
    return load_tool("deploy_table")


def test_a_cell_is_made_once(tool: Any, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "deploy.jsonl"
    arguments = ["--images", digits, "--model", "reference", "--bits", "w4a8", "--results", results]
    monkeypatch.setattr(sys, "argv", ["deploy_table.py", *map(str, arguments)])
    tool.main()
    (line,) = map(json.loads, results.read_text().splitlines())
    assert list(line["where"]) == ["dfq", "onnxruntime", "openvino"]
    assert line["where"]["dfq"]["agreement_with_dfq"] == 100
    for where in line["where"].values():
        assert where["num_images"] == 40
        assert where["top1"] > 80
        assert where["agreement_with_dfq"] > 90
    # Half a byte for each weight of the blocks, or a whole one.
    assert line["onnx_bytes"] < line["onnx_int8_weights_bytes"] - 50_000
    before = results.read_bytes()
    tool.main()
    assert results.read_bytes() == before

    page = tmp_path / "page.md"
    page.write_text("<!-- deployed: deploy.jsonl -->\n<!-- end -->\n")
    monkeypatch.setattr(sys, "argv", ["deploy_table.py", "--results", str(results), "--write", str(page)])
    tool.main()
    rows = [row for row in page.read_text().splitlines() if row.startswith("| reference | W4A8 ")]
    assert len(rows) == 3
    assert "| onnxruntime |" in rows[1]
    assert f"{line['onnx_bytes'] / 1e6:.2f}" in rows[1]
    assert "40 photographs, seed 0" in page.read_text()


def test_networks_take_turns(load_tool: Callable[[str], ModuleType]) -> None:
    load_tool("accuracy_table")
    load_tool("deploy_table")
    comparison: Any = load_tool("nncf_comparison")
    order: list[tuple[str, int]] = []

    def network(name: str) -> Any:
        def run(images: np.ndarray) -> np.ndarray:
            order.append((name, len(images)))
            return images

        return run

    arguments = argparse.Namespace(seed=0, batch_sizes=[1, 2], repeats=1)
    times = comparison.in_turns({"a": network("a"), "b": network("b")}, arguments)
    # Two passes that do not count, and one that does.
    assert order == [("a", 1), ("b", 1)] * 3 + [("a", 2), ("b", 2)] * 3
    assert {name: list(sizes) for name, sizes in times.items()} == {"a": ["1", "2"], "b": ["1", "2"]}
    row = {"drop": 1.26, "drop_ci95": [0.0, 2.0], "agreement": 97.0, "logit_sqnr_db": 20.0, "num_images": 8}
    line = {
        "model": "tiny",
        "rows": {"NNCF int8": row | {"milliseconds": {"1": 4.0, "16": 60.0}}},
        **{"instruction_sets": None, "versions": {"nncf": "3"}, "calibration_images": 32, "seed": 0, "repeats": 1},
        **{"threads": 2, "machine": "a processor"},
    }
    table = comparison.to_markdown([line])
    assert "| tiny | NNCF int8 | 1.3 [0.0, 2.0] | 97.0 % | 20.0 | 4.0 | 60.0 |" in table
    assert "instruction sets unknown" in table


def test_the_speed_table_has_a_row_for_each_runtime(load_tool: Callable[[str], ModuleType]) -> None:
    load_tool("accuracy_table")
    bench: Any = load_tool("bench_table")
    row = {
        **{"runtime": "openvino", "bits": "w8a8", "size": 6_080_000, "latency_ms": 4.04, "latency_p95_ms": 5.0},
        "timings": [{"batch_size": 1, "images_per_second": 247.5}, {"batch_size": 16, "images_per_second": 300.0}],
        "speedup_over_pytorch_fp32": {"latency": 4.0, "throughput": 6.0},
        "speedup_over_fp32": {"latency": 2.0, "throughput": 2.5},
    }
    line = {
        **{"model": "tiny", "bits": "w8a8", "image_size": [224, 224], "rows": [row], "repeats": 5, "threads": 2},
        **{"seed": 0, "machine": {"cpu": "a processor", "cores": 2, "instruction_sets": ["avx2"]}, "notes": ["slow"]},
        "versions": {"openvino": "1"},
    }
    table = bench.to_markdown([line])
    assert "| in | bits | MB | ms, batch 1 (p95) | images/s, batch 1 | images/s, batch 16 |" in table
    assert "| openvino | w8a8 | 6.1 | 4.0 (5.0) | 247.5 | 300.0 | 4.00, 6.00 | 2.00, 2.50 |" in table
    assert "a processor, 2 cores (avx2); openvino 1. slow." in table
