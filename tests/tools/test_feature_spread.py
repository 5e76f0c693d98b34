"""The tool that compares how far features are spread, against distances worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import dfq


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> Any:
    return load_tool("feature_spread")


def test_the_spread_by_hand(tool: Any) -> None:
    # Two images of two tokens: means (1, 0) and (0, 0), distances 1, 1 and 2, 2.
    tokens = torch.tensor([[[0.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, -2.0]]])
    assert tool.spread(tokens) == pytest.approx(2.5**0.5)


def test_twice_as_far_is_two(tool: Any) -> None:
    model = dfq.load_model("reference", device="cpu")
    images = dfq.generate(model, "leaves", 6, progress=False)
    prefix = model.module.num_prefix_tokens
    passed: list[torch.Tensor] = []
    model.module.blocks[1].register_forward_pre_hook(lambda _, inputs: passed.append(inputs[0]))  # type: ignore[index,union-attr]
    for batch, _ in images.batches(6, torch.device("cpu")):
        model(batch)
    found = list(tool.spreads_of(model, images, prefix))
    assert len(found) == 4
    (features,) = passed
    patches = features[:, prefix:]
    by_hand = ((patches - patches.mean(0)) ** 2).sum(-1).mean() ** 0.5
    assert found[1]["patches"] == pytest.approx(float(by_hand), rel=1e-4)


def test_its_table_goes_into_a_page(
    tool: Any, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "out" / "r.jsonl"
    command = ["feature_spread.py", "--model", "reference", "--images", str(digits), "--results", str(results)]
    for _ in range(2):
        monkeypatch.setattr("sys.argv", [*command, "--source", "gaussian", "--count", "8"])
        tool.main()
    (line,) = [json.loads(text) for text in results.read_text().splitlines()]
    assert len(line["ratios"]) == 4
    assert all(ratio > 0 for ratios in line["ratios"] for ratio in ratios.values())
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- feature spread: r.jsonl -->\nold\n<!-- end -->\nb\n")
    monkeypatch.setattr("sys.argv", ["feature_spread.py", "--results", str(results), "--write", str(page)])
    capsys.readouterr()
    tool.main()
    assert "old" not in page.read_text()
    assert f"| reference | patches | {line['ratios'][0]['patches']:.2f} | " in page.read_text()
