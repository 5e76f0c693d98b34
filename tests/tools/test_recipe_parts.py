"""The tool that takes the recipe `fast` apart: that every part is one, and that together they are all of it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import dfq
from dfq.models import Model
from dfq.ptq.modules import adapt
from dfq.ptq.sites import plan_sites
from dfq.recipe import Recipe, SiteSettings, load_recipe, parse_bits

FAST = load_recipe("fast")
TUNING = load_recipe("accurate").reconstruction
assert TUNING is not None
TUNED = replace(FAST, reconstruction=TUNING)
PLAIN = SiteSettings(quantizer="uniform", symmetric=False, granularity="tensor", range="mse")
PARTS = ["grids", "outliers apart", "errors that count differently", "tokens by gradient", "stretching"]
PARTS += ["rescaled channels", "ranges per token", "means of positions", "rotation", "late normalization"]
PARTS += ["compensation", "reconstruction"]


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> Any:
    return load_tool("recipe_parts")


@pytest.fixture(scope="module")
def reference() -> Model:
    return dfq.load_model("reference", device="cpu")


@pytest.fixture(scope="module")
def settings(reference: Model) -> Callable[[Recipe], dict[str, SiteSettings]]:
    network = adapt(copy.deepcopy(reference.module))
    return lambda recipe: {p.site.name: p.settings for p in plan_sites(network, recipe, parse_bits("w4a4"))}


def changed(before: Any, after: Any) -> dict[str, Any]:
    """What `after` has in place of what `before` has, by name."""
    return {name: value for name, value in vars(after).items() if value != getattr(before, name)}


def test_the_parts_are_these_in_this_order(tool: Any) -> None:
    assert list(tool.PARTS) == PARTS


@pytest.mark.parametrize(
    ("part", "of_recipe", "of_sites"),
    [
        (
            "grids",
            {},
            {"softmax": {"quantizer": "uniform", "split": None}, "fc2.input": {"quantizer": "uniform", "split": None}},
        ),
        ("outliers apart", {}, {"fc2.input": {"outliers": None}}),
        ("errors that count differently", {}, {"weight": {"range": "mse"}, "fc2.input": {"range": "mse"}}),
        (
            "tokens by gradient",
            {},
            {f".{slot}": {"gradient": 0.0} for slot in ("input", "q", "k", "v", "softmax")},
        ),
        ("stretching", {"stretch": 0.0, "reconstruction": replace(TUNING, stretch=0.0)}, {}),
        (
            "rescaled channels",
            {"reparametrize": None},
            {name: {"granularity": "tensor"} for name in ("qkv.input", "fc1.input", "attn.proj.input")},
        ),
        (
            "ranges per token",
            {},
            {
                "attn.proj.input": {"dynamic_up_to": None},
                **{name: {"dynamic_up_to": None, "position_rank": 0} for name in ("qkv.input", "fc1.input")},
            },
        ),
        ("means of positions", {}, {name: {"position_rank": 0} for name in ("qkv.input", "fc1.input")}),
        ("rotation", {"rotate": None}, {}),
        ("late normalization", {"softmax": "normalized"}, {"softmax": {"range": "mse"}}),
        ("compensation", {"compensation": None}, {}),
        ("reconstruction", {"reconstruction": None}, {}),
    ],
)
def test_a_part_takes_out_what_it_says_and_nothing_else(
    tool: Any,
    settings: Callable[[Recipe], dict[str, SiteSettings]],
    part: str,
    of_recipe: dict[str, Any],
    of_sites: dict[str, dict[str, Any]],
) -> None:
    left = tool.without(TUNED, [part])
    found = changed(TUNED, left)
    assert found
    assert {
        name: value for name, value in found.items() if name not in ("weights", "activations", "sites")
    } == of_recipe
    whole, after = settings(TUNED), settings(left)
    assert set(whole) == set(after)
    for name in whole:
        expected = next((change for ending, change in of_sites.items() if name.endswith(ending)), {})
        assert changed(whole[name], after[name]) == expected, name


def test_parts_go_in_any_order_and_any_of_them_without_the_others(
    tool: Any, settings: Callable[[Recipe], dict[str, SiteSettings]]
) -> None:
    for one, other in permutations(PARTS, 2):
        assert tool.without(TUNED, [one, other]) == tool.without(TUNED, [other, one])
    of_sites = [*PARTS[:4], "rescaled channels", "ranges per token", "means of positions", "late normalization"]
    for count in range(len(of_sites) + 1):
        for some in combinations(of_sites, count):
            settings(tool.without(TUNED, some))  # raises RecipeError where settings contradict each other


def test_without_any_part_it_is_rounding_to_nearest(
    tool: Any, settings: Callable[[Recipe], dict[str, SiteSettings]]
) -> None:
    nothing = tool.recipes()["added in turn", "nothing"]
    assert (nothing.softmax, nothing.stretch) == ("normalized", 0.0)
    algorithms = ("rotate", "reparametrize", "range_search", "compensation", "reconstruction")
    assert [getattr(nothing, name) for name in algorithms] == [None] * 5
    for name, found in settings(nothing).items():
        granularity: Any = "channel" if name.endswith(".weight") else "tensor"
        if name.endswith((".q", ".k", ".v")):
            granularity = "head"
        assert found == replace(PLAIN, granularity=granularity), name


def test_rows_add_up_to_the_recipe_and_leave_out_one_part_each(tool: Any) -> None:
    rows = tool.recipes()
    in_turn = {setting: recipe for (kind, setting), recipe in rows.items() if kind == "added in turn"}
    assert list(in_turn) == ["nothing", *(f"+ {part}" for part in PARTS)]
    steps = list(in_turn.values())
    for part, before, after in zip(PARTS, steps, steps[1:], strict=False):
        assert before != after
        assert tool.without(after, [part]) == before
    assert steps[-2] == FAST
    accurate = load_recipe("accurate")
    own = {"name": accurate.name, "summary": accurate.summary, "num_images": accurate.num_images}
    # And ranges per token at 8 bits, which is no part: `fast` leaves them to integer runtimes.
    at_8_bits = {
        pattern: settings | ({"dynamic_up_to": 8} if "dynamic_up_to" in settings else {})
        for pattern, settings in steps[-1].sites.items()
    }
    assert replace(steps[-1], sites=at_8_bits, **own) == accurate

    alone = {setting: recipe for (kind, setting), recipe in rows.items() if kind == "left out alone"}
    assert list(alone) == [*(f"- {part}" for part in PARTS[:-1]), "- compensation, tuned"]
    for part in PARTS[:-1]:
        assert alone[f"- {part}"] == tool.without(FAST, [part]) != FAST
    assert alone["- compensation, tuned"] == replace(TUNED, compensation=None)
    assert len(rows) == len(in_turn) + len(alone)


def test_what_is_measured_where_nothing_is_said(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(tool.site_kinds, "measure", lambda *given: seen.extend(given))
    monkeypatch.setattr("sys.argv", ["recipe_parts.py", "--model", "vit", "--images", "photographs"])
    tool.main()
    arguments, recipes, *_ = seen
    assert (arguments.source, arguments.bits, arguments.limit) == ("natural", ["w4a8", "w4a4"], 150)
    assert recipes == tool.recipes()


def test_a_run_goes_on_and_its_table_goes_into_a_page(
    tool: Any, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two = {row: recipe for row, recipe in tool.recipes().items() if row[1] in ("nothing", "- compensation")}
    monkeypatch.setattr(tool, "recipes", lambda: two)
    results = tmp_path / "out" / "r.jsonl"
    command = ["recipe_parts.py", "--model", "reference", "--images", str(digits), "--results", str(results)]
    command += ["--source", "gaussian:4", "--limit", "20"]
    # Weights alone, which is quick.
    for bits, made, cells in ((["w4a16"], 2, 2), (["w4a16", "w3a16"], 2, 4), (["w3a16"], 0, 4)):
        monkeypatch.setattr("sys.argv", [*command, "--bits", *bits])
        tool.main()
        said = capsys.readouterr().out.splitlines()
        assert sum(text.startswith("reference w") for text in said) == made
        lines = [json.loads(text) for text in results.read_text().splitlines()]
        assert len(lines) == cells
    assert {(line["kind"], line["setting"]) for line in lines} == set(two)
    assert {line["num_images"] for line in lines} == {20}
    # Each cell has a recipe of its own.
    assert len({line["kl"] for line in lines}) == 4
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- recipe parts: r.jsonl -->\nold\n<!-- end -->\nb\n")
    monkeypatch.setattr("sys.argv", ["recipe_parts.py", "--results", str(results), "--write", str(page)])
    tool.main()
    assert "old" not in page.read_text()
    assert "| parts of `fast` | recipe | W4A16 | W3A16 |" in page.read_text()
    assert re.search(r"\| left out alone \| - compensation \| \d\.\d{3}; [\d.]+ % \| ", page.read_text())
    assert page.read_text().startswith("a\n")
    assert page.read_text().endswith("\nb\n")
