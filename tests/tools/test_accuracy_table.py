"""The table tool: its Markdown, and that the published page says what the published lines say."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("accuracy_table", ROOT / "tools" / "accuracy_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def line(**changes: Any) -> dict[str, Any]:
    content = {
        "model": "vit",
        "source": "smi",
        "recipe": "paper",
        "bits": "w8a8",
        "seed": 0,
        "num_images": 100,
        "baseline_top1": 80.0,
        "drop": 1.0,
        "drop_ci95": [-0.5, 2.5],
        "agreement": 95.0,
        "iterations": 500,
        "generate_seconds": 61.4,
        "quantize_seconds": 3.0,
        "machine": "a machine",
        "versions": {"dfq": "0"},
    }
    return content | changes


def test_a_row_is_a_recipe_with_its_images_and_a_column_a_pair_of_bits(tool: Any) -> None:
    lines = [
        line(),
        line(bits="w4a8", drop=4.0, quantize_seconds=5.0, mark="†"),
        line(recipe="folder/mine.toml", source="real:64", calibration_images=64, iterations=0, generate_seconds=0.0),
        line(recipe="folder/mine.toml", source="real", bits="w4a8", drop=0.04, iterations=0, generate_seconds=0.0),
    ]
    table = [row for row in tool.to_markdown(lines).splitlines() if row.startswith("|")]
    assert table == [
        "| recipe | calibration | s | W8A8 | W4A8 |",
        "|---|---|---|---|---|",
        "| `paper` | 32 `smi`, 500 iterations | 61 + 5 | 1.0 [-0.5, 2.5]; 95.0 % | 4.0 [-0.5, 2.5]; 95.0 %† |",
        "| `mine` | 64 `real` | 0 + 3 | 1.0 [-0.5, 2.5]; 95.0 % | - |",
        "| `mine` | 32 `real` | 0 + 3 | - | 0.0 [-0.5, 2.5]; 95.0 % |",
    ]


def test_a_cell_of_several_seeds_has_their_mean_and_their_span(tool: Any) -> None:
    lines = [
        line(drop=1.0, agreement=95.0),
        line(bits="w4a8", drop=3.0),
        line(seed=1, drop=2.0, agreement=96.0),
        line(seed=2, drop=0.6, agreement=94.6),
    ]
    text = tool.to_markdown(lines)
    # (1 + 2 + 0.6) / 3 and (95 + 96 + 94.6) / 3
    assert "| 61 + 3 | 1.2 (0.6 to 2.0, 3 seeds); 95.2 % | 3.0 [-0.5, 2.5]; 95.0 % |" in text
    assert "Seeds 0, 1, 2; a machine" in text


def test_tables_replace_what_stands_between_the_marks(tool: Any) -> None:
    page = "a\n<!-- tables: r.jsonl -->\nold\n<!-- end -->\nb\n"
    written = tool.with_tables(page, "r.jsonl", [line()])
    assert written.startswith("a\n<!-- tables: r.jsonl -->\n")
    assert written.endswith("<!-- end -->\nb\n")
    assert "old" not in written
    assert tool.with_tables(written, "r.jsonl", [line()]) == written
    with pytest.raises(SystemExit, match="lacks the marks"):
        tool.with_tables("no marks", "r.jsonl", [line()])


def test_the_page_of_results_is_made_from_its_lines(tool: Any) -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    names = re.findall(r"<!-- tables: (\S+) -->", page)
    assert names
    for name in names:
        lines = [json.loads(text) for text in (ROOT / "docs" / name).read_text().splitlines()]
        assert tool.with_tables(page, name, lines) == page
