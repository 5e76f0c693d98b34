"""The chart of what each site costs."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dfq.chart import BAND, BARS, COLOURS, sensitivity_svg, write_chart
from dfq.errors import DfqError
from dfq.ptq.probe import Cost
from dfq.ptq.sensitivity import Sensitivity, SiteCost

SVG = "{http://www.w3.org/2000/svg}"


def chart_of(**costs: float) -> ElementTree.Element:
    sites = tuple(SiteCost(name.replace("__", "."), 4, Cost(kl, 20.0, 0.0)) for name, kl in costs.items())
    return ElementTree.fromstring(sensitivity_svg(found(sites)))


def found(sites: tuple[SiteCost, ...]) -> Sensitivity:
    return Sensitivity("a<b", "w4a4", "default", 4, "smi", sites, Cost(0.1, 20.0, 0.0))


def bars(root: ElementTree.Element) -> list[ElementTree.Element]:
    return [rect for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]


def texts(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def test_bars_are_logarithms() -> None:
    root = chart_of(blocks__0__attn__q=1.0, blocks__0__mlp__fc1__weight=0.01, head__input=0.1, blocks__9__x=0.0001)
    # The axis runs over the four decades from 1e-4 to 1.
    assert [float(bar.attrib["width"]) for bar in bars(root)] == pytest.approx([BARS, BARS / 2, BARS * 3 / 4, 1.0])
    assert [bar.attrib["fill"] for bar in bars(root)] == [
        COLOURS[kind] for kind in ("attention", "weight", "input", "other")
    ]
    assert {"1e-4", "1e0", "blocks.0.mlp.fc1.weight", "1.0e-02", "20.0 dB"} <= set(texts(root))


def test_costs_far_below_the_largest() -> None:
    root = chart_of(blocks__0__attn__q=0.5, blocks__0__attn__k=1e-11, blocks__0__attn__v=0.0)
    # A bar of one pixel, and none where there is nothing.
    assert [float(bar.attrib["width"]) for bar in bars(root)][1:] == [1.0]


def test_rows_of_one_block_stand_on_one_ground() -> None:
    names = ("patch_embed__proj__input", "patch_embed__proj__weight", "blocks__0__attn__q", "blocks__0__residual_mlp")
    root = chart_of(**dict.fromkeys(names, 0.1), blocks__1__mlp__fc1__input=0.1, pos_embed=0.1)
    tinted = [float(rect.attrib["y"]) for rect in root.iter(f"{SVG}rect") if rect.attrib["fill"] == BAND]
    rows = sorted(float(bar.attrib["y"]) - 2 for bar in bars(root))
    assert tinted == [rows[2], rows[3], rows[5]]


def test_nothing_to_draw_and_names_that_need_escaping() -> None:
    assert "a<b, w4a4, recipe default, 4 images (smi)" in texts(ElementTree.fromstring(sensitivity_svg(found(()))))
    lossless = found((SiteCost("head.input", 8, Cost(0.0, math.inf, 0.0)),))
    root = ElementTree.fromstring(sensitivity_svg(lossless))
    assert bars(root) == []
    assert "identical" in texts(root)


def test_only_kinds_that_there_are_get_a_colour() -> None:
    assert {"weights", "inputs of layers"} & set(texts(chart_of(head__weight=0.1))) == {"weights"}


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DfqError, match="cannot write"):
        write_chart(found(()), tmp_path / "missing" / "chart.svg")
