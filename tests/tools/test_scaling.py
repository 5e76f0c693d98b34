"""The cost model: its formula by hand, and what the tables say."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import dfq

original = dfq.load_model


@pytest.fixture
def tool(load_tool: Callable[[str], ModuleType]) -> Any:
    for name in ("accuracy_table", "inversion_tables", "plain_inversion", "bench_inversion"):
        load_tool(name)
    return load_tool("scaling")


def test_the_formula_and_the_counter_agree(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "scaling.jsonl"
    given = ["--parts", "speed", "--models", "reference", "--kept", "20", "--batch-size", "2", "--results", results]
    monkeypatch.setattr(tool.dfq, "load_model", lambda name, **_: original(name, device="cpu"))
    monkeypatch.setattr(sys, "argv", ["scaling.py", *map(str, given)])
    tool.main()
    line = json.loads(results.read_text())
    # 4 blocks; 64 patches of 4x4 pixels in 3 channels, and a class token.
    vit = original("reference", device="cpu").module
    width, hidden = vit.embed_dim, vit.blocks[0].mlp.fc1.out_features
    for phase, kept in zip(line["phases"], (64, 20), strict=True):
        tokens = kept + 1
        products = 2 * tokens * (width * 3 * width + width * width + 2 * width * hidden)
        attention = 2 * 2 * tokens * tokens * width
        by_hand = 4 * (2 * products + 3 * attention) + 2 * 2 * kept * 48 * width
        assert phase["kept"] == kept
        assert phase["flops"] == pytest.approx(by_hand)
        assert phase["counted"] == pytest.approx(phase["flops"], rel=0.02)
        assert phase["seconds"] > 0
    assert line["canvas_bytes"] == 3 * 32 * 32 * 4
    assert "| reference | 64 | " in capsys.readouterr().out


def test_the_tables(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"machine": "a machine", "torch": "2"}
    phases = [
        {"kept": 196, "flops": 4e9, "counted": 4e9, "seconds": 0.04},
        {"kept": 46, "flops": 1e9, "counted": 1e9, "seconds": 0.02},
    ]
    lines = [
        {"part": "speed", "model": "vit", "phases": phases, "activation_bytes": 21e6} | common,
        {"part": "processes", "model": "vit", "processes": 2, "generating_seconds": 9.5, "sha256": "ab" * 32} | common,
        {"part": "memory", "model": "vit", "images": 64, "images_bytes": 1e6, "generating": 5e8, "quantizing": 7e8}
        | common,
    ]
    results, page = tmp_path / "scaling.jsonl", tmp_path / "page.md"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page.write_text("<!-- scaling: scaling.jsonl -->\n<!-- end -->\n<!-- projection -->\n<!-- end -->\n")
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--results", str(results), "--write", str(page)])
    tool.main()
    text = page.read_text()
    # The rate of the first row is 100 GFLOP/s, so a quarter of the work should take a quarter of the time.
    assert "| vit | 46 | 1.00 | 1.00 | 0.020 | 50 | 0.010 |  |" in text
    assert "| vit | 2 | 9.5 | `abababababab` | - | - |" in text
    assert "| vit | 64 | 1 | 500 | 700 |" in text
    assert "a machine, one thread per process; torch 2; seed 0." in text
    # 71.7 GFLOP, 4,000 times, for a million images, at 1e14 a second.
    assert "| `dense` | 4,000 | 286.73 | 796.5 | 99.6 | 12.4 |" in text
