"""The published tables, read from `published.toml`, as cells to make again."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("published.toml")
NUM_IMAGES = 32
"""Of every published calibration here."""

_KEYS = {"kind", "name", "images", "iterations", "learning_rate", "bits", "source", "factor", "top1", "models"}
_KEYS |= {"unknown", "cannot"}


@dataclass(frozen=True)
class Cell:
    """One number of a published table, and how dfq comes to its own.

    kind: `accuracy`, `speed` (how many times quicker than dense inversion), or `none` where dfq cannot, `cannot` saying
    why; model: as the papers name it; images: a method of dfq, or `real`; iterations and learning_rate: of inversion,
    None where there is none, or the method's own; published: percent, or the factor, None where it is not known, for
    the reason `unknown`; full: percent of full precision as published.
    """

    table: str
    model: str
    timm: str
    kind: str
    name: str
    images: str
    bits: str
    recipe: str
    iterations: int | None = None
    learning_rate: float | None = None
    published: float | None = None
    full: float | None = None
    source: str = ""
    unknown: str = ""
    cannot: str = ""

    @property
    def published_drop(self) -> float | None:
        """Points."""
        return None if self.published is None or self.full is None else self.full - self.published

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What tells it from every other cell."""
        return self.table, self.model, self.kind, self.name, self.bits


def published_cells(tables: list[str] | None = None, models: list[str] | None = None) -> list[Cell]:
    """The cells of these tables and models, in order, all by default. models: names of the papers or of timm."""
    wanted = None if models is None else {model_called(name) for name in models}
    return [
        cell
        for table in tables or table_names()
        for model in model_names()
        for cell in _cells(table, model)
        if wanted is None or model in wanted
    ]


def model_called(name: str) -> str:
    """The paper's name of a model, given that or timm's, with or without its tag. ValueError where it is neither."""
    for label, model in _content()["models"].items():
        if name in (label, model["timm"], model["timm"].partition(".")[0]):
            return str(label)
    raise ValueError(f"{name!r} is in none of the tables: choose from {', '.join(model_names())}")


def table_names() -> list[str]:
    return list(_content()["tables"])


def model_names() -> list[str]:
    """Smallest first."""
    return list(_content()["models"])


def title(table: str) -> str:
    return str(_content()["tables"][table]["title"])


def differences(table: str) -> list[str]:
    """What dfq does otherwise than the paper, in sentences."""
    return list(_content()["tables"][table]["differs"])


def source_text(source: str) -> str:
    return str(_content()["sources"][source])


def _cells(table: str, model: str) -> list[Cell]:
    content = _content()
    own, about = content["tables"][table], content["models"][model]
    cells = []
    for row in own["rows"]:
        top1: dict[str, float] = row.get("top1", {})
        if model not in (top1 or row["models"]):
            continue
        cells.append(
            Cell(
                table=table,
                model=model,
                timm=about["timm"],
                kind=row.get("kind", "accuracy"),
                name=row.get("name", row["images"]),
                images=row["images"],
                bits=row.get("bits", ""),
                recipe=own["recipe"],
                iterations=row.get("iterations"),
                learning_rate=row.get("learning_rate"),
                published=top1.get(model, row.get("factor")),
                full=about.get("top1"),
                source=row.get("source", ""),
                unknown=row.get("unknown", ""),
                cannot=row.get("cannot", ""),
            )
        )
    return cells


@cache
def _content() -> dict[str, Any]:
    content = tomllib.loads(FILE.read_text())
    for table in content["tables"].values():
        for row in table["rows"]:
            if row.keys() - _KEYS:
                raise ValueError(f"{FILE.name}: unknown keys {sorted(row.keys() - _KEYS)}")
            if ("top1" in row or "factor" in row) != ("source" in row):
                raise ValueError(f"{FILE.name}: numbers and a source belong together: {row}")
    return content
