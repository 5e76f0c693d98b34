"""The tool that tries changes of a recipe: each changes something, and the difference is that of pairs of images."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import dfq
from dfq.recipe import load_recipe


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> Any:
    return load_tool("recipe_trials")


def test_every_change_is_one(tool: Any) -> None:
    fast, recipe = load_recipe("fast"), load_recipe("accurate")
    changed = {name: change(recipe) for name, change in tool.CHANGES.items()}
    assert changed.pop(tool.AS_IT_IS) == recipe
    # `accurate` has ranges per token at 8 bits, `fast` has not.
    assert [name for name, other in changed.items() if other == recipe] == ["ranges per token at 8 bits too"]
    assert tool.CHANGES["ranges per token at 8 bits too"](fast) != fast
    assert len({json.dumps(other.to_dict()) for other in changed.values()}) == len(changed)
    assert changed["three times the steps"].reconstruction.iterations == 3 * recipe.reconstruction.iterations
    with pytest.raises(SystemExit, match="the recipe fast tunes no blocks"):
        tool.CHANGES["twice the steps"](load_recipe("fast"))


def test_the_divergence_and_its_difference_by_hand(tool: Any) -> None:
    # 3/4 and 1/4 against one half each, and the same twice.
    expected, found = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]), torch.zeros(2, 2)
    costs = tool.divergence(found, expected)
    assert costs.tolist() == pytest.approx([0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.0])
    usual = torch.tensor([1.0, 2.0, 3.0, 6.0])
    # Differences 1, 0, 0, -1: no mean; their standard deviation is sqrt(2 / 3), that of the mean half of it.
    by_hand = tool.paired(usual + torch.tensor([1.0, 0.0, 0.0, -1.0]), usual)
    assert by_hand == {"difference": 0.0, "standard_error": pytest.approx(math.sqrt(2 / 3) / 2)}
    with pytest.raises(SystemExit, match="measured on 4 images, not 3"):
        tool.paired(usual[:3], usual)


def test_a_run_goes_on_and_its_table_goes_into_a_page(
    tool: Any, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "out" / "r.jsonl"
    command = ["recipe_trials.py", "--model", "reference", "--images", str(digits), "--results", str(results)]
    command += ["--source", "gaussian:8", "--limit", "20", "--bits", "w3a3"]
    quantize, made = dfq.quantize, []
    monkeypatch.setattr(dfq, "quantize", lambda *args, **kwargs: made.append(1) or quantize(*args, **kwargs))
    for trials in (["channels rescaled too"], ["channels rescaled too", "no rotation"]):
        monkeypatch.setattr("sys.argv", [*command, "--trials", *trials])
        tool.main()
    assert len(made) == 3
    lines = [json.loads(text) for text in results.read_text().splitlines()]
    assert [line["trial"] for line in lines] == ["as it is", "channels rescaled too", "no rotation"]
    usual, *others = lines
    assert (usual["difference"], usual["standard_error"]) == (0, 0)
    for line in others:
        assert line["difference"] == pytest.approx(line["kl"] - usual["kl"])
        assert line["standard_error"] > 0
    moved = others[0]
    monkeypatch.setattr("sys.argv", [*command, "--recipe", "repq", "--trials", "no rotation"])
    with pytest.raises(SystemExit, match="'no rotation' changes nothing in the recipe repq"):
        tool.main()
    capsys.readouterr()
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- recipe trials: r.jsonl -->\nold\n<!-- end -->\nb\n")
    monkeypatch.setattr("sys.argv", ["recipe_trials.py", "--results", str(results), "--write", str(page)])
    tool.main()
    assert "old" not in page.read_text()
    assert f"| channels rescaled too | {moved['kl']:.4f} | {moved['difference']:+.4f} ± " in page.read_text()


@pytest.mark.parametrize(
    ("name", "marks", "where", "files"),
    [
        ("recipe_trials", "recipe trials", "methods.md", ["recipe-trials.jsonl"]),
        ("feature_spread", "feature spread", "methods.md", ["feature-spread.jsonl"]),
        ("distill_table", "students", "distillation.md", ["students.jsonl", "students-many.jsonl"]),
    ],
)
def test_the_page_is_made_from_its_lines(
    load_tool: Callable[[str], ModuleType], name: str, marks: str, where: str, files: list[str]
) -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / where).read_text()
    assert re.findall(rf"<!-- {marks}: (\S+) -->", page) == files
    for file in files:
        lines = [json.loads(text) for text in (docs / file).read_text().splitlines()]
        assert load_tool(name).with_tables(page, file, lines) == page
