"""What docs/recipes.md says of recipes is what dfq reads."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from dfq.recipe import Compensation, OutputSearch, Recipe, Reconstruction, SiteSettings, load_recipe, preset_names

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
ROWS = [[cell.strip() for cell in row.strip("|").split("|")] for row in PAGE.splitlines() if row.startswith("|")]
ALGORITHMS = {"range_search": OutputSearch, "compensation": Compensation, "reconstruction": Reconstruction}


def test_the_example_is_a_recipe(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "mine.toml").write_text(example)
    recipe = load_recipe(tmp_path / "mine.toml")
    assert recipe.compensation == Compensation()
    assert recipe.settings("blocks.11.attn.softmax", is_weight=False).bits == 8


def test_every_preset_has_a_row() -> None:
    assert {f"`{name}`" for name in preset_names()} <= {row[0] for row in ROWS}


@pytest.mark.parametrize("kind", [SiteSettings, Recipe, *ALGORITHMS.values()])
def test_every_key_is_named(kind: type) -> None:
    assert [f.name for f in fields(kind) if f.name != "name" and not re.search(rf"[`\[\n]{f.name}\b", PAGE)] == []


@pytest.mark.parametrize("table", list(ALGORITHMS))
def test_an_empty_table_has_the_values_of_the_page(table: str) -> None:
    rows = ROWS[next(index for index, row in enumerate(ROWS) if row[0] == f"`[{table}]`") :]
    own = [rows[0], *(row for row in rows[1 : next((i for i, row in enumerate(rows[1:], 1) if row[0]), len(rows))])]
    said = {}
    for _, keys, defaults, _ in own:
        said |= dict(zip(re.findall(r"`(\w+)`", keys), defaults.split(", "), strict=True))
    usual = {f.name: getattr(ALGORITHMS[table](), f.name) for f in fields(ALGORITHMS[table])}
    assert set(said) == set(usual)
    for key, value in usual.items():
        if isinstance(value, str):
            assert said[key] == value
        elif isinstance(value, tuple):
            assert said[key] == str(list(value))
        else:
            assert float(said[key]) == value
