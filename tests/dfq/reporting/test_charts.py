"""Charts of a report."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from dfq.reporting.charts import Line, Point, interval_chart, line_chart

SVG = "{http://www.w3.org/2000/svg}"


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", text)]


def test_a_line_goes_up_where_values_grow_and_has_a_gap_where_there_is_none() -> None:
    chart = ElementTree.fromstring(
        line_chart("A <title>", "dB", ["stem", "a & b", "head"], [Line("one", (10.0, None, 30.0))])
    )
    (line,) = chart.iter(f"{SVG}polyline")
    first, last = (numbers(pair) for pair in line.attrib["points"].split())
    assert first[0] < last[0]
    assert first[1] > last[1]
    assert chart.findtext(f"{SVG}title") == "A <title>"
    assert chart.attrib["role"] == "img"
    said = [title.text for dot in chart.iter(f"{SVG}circle") for title in dot]
    assert said == ["one, stem: 10.0", "one, head: 30.0"]
    assert "a & b" in [text.text for text in chart.iter(f"{SVG}text")]


def test_values_lie_where_the_ticks_say() -> None:
    """The line of a tick and a dot of the same value are at the same height."""
    chart = ElementTree.fromstring(line_chart("t", "dB", ["a", "b"], [Line("x", (0.0, 40.0)), Line("y", (20.0, 10.0))]))
    heights = {text.text: float(text.attrib["y"]) - 4 for text in chart.iter(f"{SVG}text") if text.text in ("20", "40")}
    dots = {dot[0].text: float(dot.attrib["cy"]) for dot in chart.iter(f"{SVG}circle")}
    assert dots["x, b: 40.0"] == pytest.approx(heights["40"], abs=0.1)
    assert dots["y, a: 20.0"] == pytest.approx(heights["20"], abs=0.1)


def test_whiskers_reach_as_far_as_the_interval() -> None:
    points = [Point("four", 3.3, 2.0, -1.0, 5.0), Point("eight", 6.0, 0.0, -0.5, 0.5)]
    chart = ElementTree.fromstring(interval_chart("Front", "points lost", points, "MB"))
    dots = [dot for dot in chart.iter(f"{SVG}circle") if "[" in (dot[0].text or "")]
    whiskers = [numbers(path.attrib["d"])[1:3] for path in chart.iter(f"{SVG}path")]
    assert [dot[0].text for dot in dots] == ["four: 2.00 [-1.00, 5.00] at 3.30", "eight: 0.00 [-0.50, 0.50] at 6.00"]
    at = [float(dot.attrib["cy"]) for dot in dots]
    per_point = (at[1] - at[0]) / 2
    assert per_point > 0, "less lost is lower"
    assert whiskers[0] == pytest.approx([at[0] + 3 * per_point, at[0] - 3 * per_point], abs=0.2)
    left = [float(dot.attrib["cx"]) for dot in dots]
    assert left[0] < left[1]


@pytest.mark.parametrize("values", [(math.inf, math.inf), (None, None), (5.0, 5.0), (1e-9, -1e9)])
def test_values_that_leave_nothing_to_draw_are_no_error(values: tuple[float | None, ...]) -> None:
    ElementTree.fromstring(line_chart("t", "dB", ["a", "b"], [Line("x", values)]))


def test_one_point_at_zero() -> None:
    ElementTree.fromstring(interval_chart("t", "y", [Point("x", 0.0, 0.0, 0.0, 0.0)], "x"))
