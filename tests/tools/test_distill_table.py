"""The table of students: no cell twice, and what it says at equal images and at equal time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> Any:
    load_tool("accuracy_table")
    return load_tool("distill_table")


def test_methods_share_a_round_and_may_have_iterations_of_their_own(tool: Any) -> None:
    plans = tool.plans_of("waves@100+smi", 20, 3)
    assert [(plan.name, plan.num_images, plan.iterations, plan.seed) for plan in plans] == [
        ("waves", 10, 100, 3),
        ("smi", 10, None, 3),
    ]
    # As many again are made of the student.
    assert [plan.num_images for plan in tool.plans_of("both:waves", 20, 3)] == [10]


def test_photographs_take_the_place_of_images(
    tool: Any, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    arguments = ["--teacher", "reference", "--student", "reference", "--images", digits, "--results", results]
    arguments += ["--methods", "real", "--seeds", 0, 1, "--rounds", 1, "--round-images", 12]
    monkeypatch.setattr(sys, "argv", ["distill_table.py", *map(str, arguments), "--real-images", str(digits)])
    tool.main()
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["method"], line["result"]["images"]) for line in lines] == [("real", 12)] * 2
    # Each seed draws its own.
    divergences = {line["result"]["rounds"][0]["divergence"] for line in lines}
    assert len(divergences) == 2
    monkeypatch.setattr(sys, "argv", ["distill_table.py", *map(str, arguments[:8]), "--methods", "others"])
    with pytest.raises(SystemExit):
        tool.main()
    assert "others needs a folder: give --other-images" in capsys.readouterr().err


def test_a_cell_is_made_once(tool: Any, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results.jsonl"
    arguments = ["--teacher", "reference", "--student", "reference", "--images", digits, "--results", results]
    arguments += ["--methods", "gaussian+leaves", "both:leaves", "--seeds", 0, "--rounds", 2, "--round-images", 8]
    arguments += ["--fits", "ridge, no windows", "sgd, temperature 20"]
    monkeypatch.setattr(sys, "argv", ["distill_table.py", *map(str, arguments)])
    tool.main()
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    fits = ["ridge", "ridge, no windows", "sgd, temperature 20"]
    assert [line["method"] for line in lines] == ["gaussian+leaves"] * 3 + ["both:leaves"] * 3
    assert [line["fit"] for line in lines] == fits * 2
    for line in lines:
        # The other fits have the whole pool from the first round on.
        first = 8 if line["fit"] == "ridge" else 16
        assert [entry["images"] for entry in line["result"]["rounds"]] == [first, 16]
        assert line["result"]["teacher_top1"] > 90
    before = results.read_bytes()
    tool.main()
    assert results.read_bytes() == before

    page = tmp_path / "page.md"
    page.write_text("<!-- students: results.jsonl -->\n<!-- end -->\n")
    monkeypatch.setattr(sys, "argv", ["distill_table.py", "--results", str(results), "--write", str(page)])
    tool.main()
    assert "| `both:leaves` |" in page.read_text()


def made(method: str, seed: int, *rounds: tuple[int, float, float | None], fit: str = "ridge") -> dict[str, Any]:
    entries = [
        {"images": images, "generating_seconds": seconds - 1, "training_seconds": 1.0, "top1": top1}
        for images, seconds, top1 in rounds
    ]
    return {
        "method": method,
        "seed": seed,
        "student": "small",
        "teacher": "large",
        "fit": fit,
        "machine": "abacus",
        "threads": 2,
        "torch": "2.15.0",
        "result": {"rounds": entries, "images": rounds[-1][0], "top1": rounds[-1][2], "teacher_top1": 80.0},
    }


def test_a_long_run_is_shown_as_it_grew(tool: Any) -> None:
    lines = [
        made("slow", seed, *((10 * n, 50.0, n + float(seed) if n % 2 == 0 else None) for n in range(1, 13)))
        for seed in (0, 2)
    ]
    rows = tool.to_markdown(lines).splitlines()
    assert rows[4] == "| images by `slow` | 20 | 40 | 60 | 80 | 100 | 120 |"
    assert rows[6].startswith("| top-1 | 3.0 (2.0 to 4.0) | 5.0 (4.0 to 6.0) | ")
    few = [made("slow", 0, *((10 * n, 50.0, float(n)) for n in range(1, 6)))]
    assert "| images by `slow` |" not in tool.to_markdown(few)


def test_equal_images_and_equal_time(tool: Any) -> None:
    text = tool.to_markdown(
        [
            made("slow", 0, (10, 100.0, 40.0), (20, 100.0, 60.0)),
            made("slow", 1, (10, 90.0, 44.0), (20, 90.0, 50.0)),
            made("quick", 0, (10, 40.0, 30.0), (20, 60.0, 35.0)),
            made("none", 0, (10, 2.0, 10.0), (20, 2.0, 12.0)),
            made("real", 0, (20, 2.0, 61.0), (20, 2.0, 63.0)),
        ]
    )
    rows = text.splitlines()
    assert rows[0] == "| images by | 10 images | 20 images | seconds for 20 | after 75 s | after 150 s |"
    assert rows[2] == "| `slow` | 42.0 (40.0 to 44.0) | 55.0 (50.0 to 60.0) | 190 | - | 42.0 (40.0 to 44.0) |"
    assert rows[3] == "| `quick` | 30.0 | 35.0 | 100 | 30.0 | 35.0 |"
    assert rows[4] == "| `none` | 10.0 | 12.0 | 4 | 12.0 | 12.0 |"
    assert rows[5] == "| `real` | - | 63.0 | 4 | 63.0 | 63.0 |"
    assert "that has 80.0; the mean over seeds 0, 1, in brackets" in text
    assert "that has 80.0; seed 0. abacus" in tool.to_markdown([made("quick", 0, (10, 40.0, 30.0))])


def test_other_fits_have_a_table_of_their_own(tool: Any) -> None:
    text = tool.to_markdown(
        [
            made("waves", 0, (10, 40.0, 30.0), (20, 60.0, 35.0)),
            made("waves", 0, (20, 1.0, 20.0), (20, 1.0, 22.0), fit="sgd"),
            made("waves", 1, (20, 1.0, 20.0), (20, 1.0, 24.0), fit="sgd"),
            made("leaves", 0, (10, 1.0, 12.0), (20, 1.0, 13.0)),
        ]
    )
    rows = text.splitlines()
    assert [row.split(" |")[0] for row in rows[2:4]] == ["| `waves`", "| `leaves`"]
    assert rows[5:9] == [
        "| taught on 20 images by `waves` | |",
        "|---|---|",
        "| ridge | 35.0 |",
        "| sgd | 23.0 (22.0 to 24.0) |",
    ]


def test_nothing_within_the_time(tool: Any) -> None:
    rounds = made("slow", 0, (10, 100.0, 40.0))["result"]["rounds"]
    assert tool.after(rounds, 99.0) is None
    assert tool.after(rounds, 100.0) == 40.0
