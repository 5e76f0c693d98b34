"""Charts of a report, as SVG that stands inside a page.

What they show in colour they also say in words, and every number in them stands in a table of the page. Their ink is
given as attributes, over which the page's style has its way: it turns them light on dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from dfq.chart import COLOURS, FAINT, INK, label

SERIES = (COLOURS["weight"], COLOURS["input"], COLOURS["attention"], "#cc79a7", "#56b4e9", "#d55e00")
"""Colours of what is drawn together, in turn."""

# Pixels.
WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 34, 58
WHISKER = 5


@dataclass(frozen=True)
class Line:
    """Values in the order of the steps they belong to; None where there is none."""

    name: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Point:
    """A place with an interval upwards and downwards, and what stands beside it."""

    name: str
    x: float
    y: float
    low: float
    high: float


def line_chart(title: str, unit: str, steps: Sequence[str], lines: Sequence[Line]) -> str:
    """Lines over equally spaced steps, whose names are written upright below them."""
    values = [value for line in lines for value in line.values if value is not None and math.isfinite(value)]
    axis = _Axis.over([0.0, *values])
    tall = TOP + 200 + 7 * max(map(len, steps)) + 12
    bottom = TOP + 200

    def x(index: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (index + 0.5) / len(steps)

    def y(value: float) -> float:
        return bottom - (bottom - TOP) * axis.share(value)

    parts = [*_opening(title, tall), label(4, 14, unit)]
    parts += _rungs(axis, y)
    for index, step in enumerate(steps):
        at = f"{x(index) + 4:.1f} {bottom + 8}"
        parts.append(f'<text transform="translate({at}) rotate(-90)" text-anchor="end">{escape(step)}</text>')
    parts += _legend([line.name for line in lines])
    for line, colour in zip(lines, _colours(len(lines)), strict=True):
        places = [
            (x(index), y(value), f"{line.name}, {step}: {value:.1f}")
            for index, (step, value) in enumerate(zip(steps, line.values, strict=True))
            if value is not None and math.isfinite(value)
        ]
        drawn = " ".join(f"{left:.1f},{top:.1f}" for left, top, _ in places)
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [_dot(left, top, colour, said) for left, top, said in places]
    return "\n".join([*parts, "</svg>"])


def interval_chart(title: str, unit: str, points: Sequence[Point], across: str) -> str:
    """Points with whiskers: `y` and its interval upwards, in `unit`, over `x`, which is said by `across`."""
    vertical = _Axis.over([value for point in points for value in (point.low, point.high)])
    horizontal = _Axis.over([0.0, *(point.x for point in points)])
    bottom = HEIGHT - BOTTOM

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * horizontal.share(value)

    def y(value: float) -> float:
        return bottom - (bottom - TOP) * vertical.share(value)

    parts = [*_opening(title, HEIGHT), label(4, 14, unit)]
    parts += _rungs(vertical, y)
    for tick in horizontal.ticks:
        parts.append(_rule(x(tick), TOP, x(tick), bottom))
        parts.append(label(x(tick), bottom + 16, f"{tick:g}", anchor="middle"))
    parts.append(label((LEFT + WIDTH - RIGHT) / 2, bottom + 34, across, anchor="middle"))
    parts += _legend([point.name for point in points])
    for point, colour in zip(points, _colours(len(points)), strict=True):
        middle, low, high = x(point.x), y(point.low), y(point.high)
        path = f"M{middle:.1f} {low:.1f}V{high:.1f}"
        path += "".join(f"M{middle - WHISKER:.1f} {end:.1f}H{middle + WHISKER:.1f}" for end in (low, high))
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        said = f"{point.name}: {point.y:.2f} [{point.low:.2f}, {point.high:.2f}] at {point.x:.2f}"
        parts.append(_dot(middle, y(point.y), colour, said, radius=4.5))
    return "\n".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Axis:
    """ticks: round numbers, the first and the last of which are its ends."""

    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float]) -> _Axis:
        """One that all values lie on."""
        low, high = min(values), max(values)
        span = high - low or abs(high) or 1.0
        magnitude = 10.0 ** math.floor(math.log10(span / 4))
        step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if magnitude * factor * 5 >= span)
        first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
        return cls(tuple(step * number for number in range(first, last + 1)))

    def share(self, value: float) -> float:
        """How far along it a value lies, in [0, 1]."""
        return (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])


def _opening(title: str, height: float) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}">',
        f"<title>{escape(title)}</title>",
    ]


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{FAINT}"/>'


def _rungs(axis: _Axis, y: Callable[[float], float]) -> Iterator[str]:
    """A line across the chart at every tick, and its number left of it."""
    for tick in axis.ticks:
        yield _rule(LEFT, y(tick), WIDTH - RIGHT, y(tick))
        yield label(LEFT - 8, y(tick) + 4, f"{tick:g}", anchor="end")


def _dot(x: float, y: float, colour: str, said: str, *, radius: float = 3.5) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"><title>{escape(said)}</title></circle>'


def _colours(count: int) -> list[str]:
    return [SERIES[index % len(SERIES)] for index in range(count)]


def _legend(names: Sequence[str]) -> Iterator[str]:
    """A dot and a name each, in one row above the chart; none where there is but one."""
    if len(names) < 2:
        return
    room = (WIDTH - LEFT - RIGHT) / len(names)
    for index, (name, colour) in enumerate(zip(names, _colours(len(names)), strict=True)):
        x = LEFT + 20 + index * room
        yield _dot(x, 10, colour, name, radius=4.5)
        longest = max(3, int((room - 24) / 6.5))
        yield label(x + 9, 14, name if len(name) <= longest else name[: longest - 1] + "…", size=12)
