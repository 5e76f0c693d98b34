"""The tool that quantizes one kind of site at a time: what it leaves alone, and that it does no cell twice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import dfq
from calibration.calibration_set import CalibrationSet
from dfq.models import Model
from dfq.ptq.probe import Cost

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> Any:
    return load_tool("site_kinds")


@pytest.fixture(scope="module")
def reference() -> Model:
    return dfq.load_model("reference", device="cpu")


@pytest.fixture(scope="module")
def images(reference: Model) -> CalibrationSet:
    return dfq.generate(reference, "leaves", 8, progress=False)


def test_every_setting_of_every_kind_quantizes_its_sites_and_no_others(
    tool: Any, reference: Model, images: CalibrationSet
) -> None:
    exact = tool.logits_of(reference, images)
    every = set(dfq.quantize(reference, "w8a8", calibration=images, recipe="paper", progress=False).sites)
    every |= {f"blocks.{i}.attn.{slot}" for i in range(4) for slot in ("q", "k", "v", "softmax")}
    for kind, (patterns, settings) in tool.KINDS.items():
        own = {name for name in every if any(fnmatchcase(name, pattern) for pattern in patterns)}
        described = []
        for setting in settings:
            recipe = tool.alone(kind, setting)
            quantized = dfq.quantize(reference, "w4a4", calibration=images, recipe=recipe, progress=False)
            assert set(quantized.sites) == own
            assert Cost.of(exact, tool.logits_of(quantized, images)).kl > 1e-5
            described.append(json.dumps([q.describe() for q in quantized.sites.values()]))
        assert len(own) in (4, 8, 12, 16)
        if kind not in ("after GELU", "weights of blocks"):  # where the weights of errors differ, not the quantizers
            assert len(set(described)) == len(settings)


def test_probabilities_want_a_grid_that_is_fine_near_zero(tool: Any, reference: Model, images: CalibrationSet) -> None:
    exact = tool.logits_of(reference, images)

    def kl(setting: str) -> float:
        recipe = tool.alone("after softmax", setting)
        quantized = dfq.quantize(reference, "w8a3", calibration=images, recipe=recipe, progress=False)
        return Cost.of(exact, tool.logits_of(quantized, images)).kl

    assert kl("log, base searched") < kl("uniform") / 2


def test_a_run_goes_on_and_its_tables_go_into_a_page(
    tool: Any, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool, "KINDS", {"after LayerNorm": tool.KINDS["after LayerNorm"]})
    results = tmp_path / "out" / "r.jsonl"
    command = ["site_kinds.py", "--model", "reference", "--images", str(digits), "--results", str(results)]
    command += ["--source", "gaussian:8", "--limit", "20"]
    for bits, cells in ((["w4a4"], 2), (["w4a4", "w3a3"], 4)):
        monkeypatch.setattr("sys.argv", [*command, "--bits", *bits])
        tool.main()
        said = capsys.readouterr().out.splitlines()
        assert sum(text.startswith("reference w") for text in said) == 2
        assert sum(text.startswith("| after ") for text in said) == 2
        lines = [json.loads(text) for text in results.read_text().splitlines()]
        assert len(lines) == cells
        assert {line["num_images"] for line in lines} == {20}
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- site kinds: r.jsonl -->\nold\n<!-- end -->\nb\n")
    monkeypatch.setattr("sys.argv", ["site_kinds.py", "--results", str(results), "--write", str(page)])
    tool.main()
    assert "old" not in page.read_text()
    assert re.search(r"\| after LayerNorm \| per channel \| \d\.\d{3}; [\d.]+ % \| ", page.read_text())


def test_a_cell_that_is_missing(tool: Any) -> None:
    line = {"model": "vit", "source": "natural", "bits": "w4a4", "seed": 0, "kind": "after GELU", "setting": "uniform"}
    line |= {"kl": 0.12345, "agreement": 98.0, "num_images": 150, "iterations": 20, "calibration_images": 32}
    line |= {"machine": "a machine", "threads": 1, "versions": {"dfq": "0"}}
    text = tool.to_markdown([line, line | {"bits": "w3a3", "setting": "log"}])
    assert "| after GELU | uniform | 0.123; 98.0 % | - |" in text
    assert "| after GELU | log | - | 0.123; 98.0 % |" in text
    assert "ranges from 32 `natural`, 20 iterations" in text


def test_the_page_of_recipes_is_made_from_its_lines(tool: Any) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    names = re.findall(r"<!-- site kinds: (\S+) -->", page)
    assert names
    for name in names:
        assert tool.with_tables(page, name, tool.read_lines(ROOT / "docs" / name)) == page
