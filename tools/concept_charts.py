"""The charts of docs/concepts.md as SVG: grids under a histogram, levels that an outlier leaves, bytes by kind.

Each function takes numbers and gives text, in the style of `dfq.chart`; `concept_pictures.py` measures the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dfq.chart import BAND, COLOURS, FAINT, INK, label

BLUE, ORANGE, GRAY = COLOURS["weight"], COLOURS["input"], COLOURS["other"]
# Okabe and Ito's palette, as that of `dfq.chart`, with three more of its colours.
PALETTE = (*COLOURS.values(), "#cc79a7", "#56b4e9", "#d55e00")

# Pixels: names at the left, the plot, figures at the right, a margin; the histogram's height, a row's, a tick's.
NAMES, PLOT, FIGURES, MARGIN = 200, 440, 190, 12
HIGH, ROW, TICK = 150, 30, 16
WIDTH = NAMES + PLOT + FIGURES + MARGIN
# Where zero stands beside a logarithmic axis, which has no place for it: pixels left of the axis.
ZERO_AT = 22


@dataclass(frozen=True)
class Grid:
    """The levels of one quantizer, ascending, and what is to be said of it, a text for each column."""

    name: str
    levels: Sequence[float]
    figures: Sequence[str]


@dataclass(frozen=True)
class Axis:
    """low, high: its ends; logarithmic: whether decades are equally long."""

    low: float
    high: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Pixels from the left end, between 0 and `PLOT` for a value on the axis."""
        low, high, value = (math.log10(each) if self.logarithmic else each for each in (self.low, self.high, value))
        return (value - low) / (high - low) * PLOT

    def place_or_zero(self, value: float) -> float:
        """The same, and for what a logarithmic axis has no place for a place left of it."""
        return -ZERO_AT if self.logarithmic and value <= 0 else self.place(value)

    def marks(self) -> list[tuple[float, str]]:
        """Values to be marked and their names."""
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            return [(10.0**exponent, "1" if exponent == 0 else f"1e{exponent}") for exponent in range(first, last + 1)]
        step = 10.0 ** math.floor(math.log10(self.high - self.low))
        step = next(each for each in (step / 5, step / 2, step, 2 * step) if (self.high - self.low) / each <= 8)
        count = range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
        return [(index * step, f"{index * step:g}") for index in count]


def grids_svg(
    title: str, lines: Sequence[str], axis: Axis, counts: Sequence[int], heads: Sequence[str], grids: Sequence[Grid]
) -> str:
    """A histogram of a tensor's values, how many on a logarithmic axis, and under it the levels of some quantizers.

    lines: what stands below the title; counts: of values in equally long parts of the axis; heads: over the figures.
    """
    top = 44 + 16 * len(lines)
    floor = top + HIGH
    bottom = floor + 26 + ROW * len(grids)
    parts = [*_sheet(title, lines, bottom + 26), *_axis(axis, floor, bottom)]
    decades = max(1, math.ceil(math.log10(max(*counts, 2))))
    parts.append(label(NAMES - 8, top + 4, f"1e{decades} values", anchor="end"))
    parts.append(label(NAMES - 8, floor, "1", anchor="end"))
    wide = PLOT / len(counts)
    for index, count in enumerate(counts):
        if count:
            # A single value would have the logarithm 0 and not be seen.
            high = max(1.5, math.log10(count) / decades * HIGH)
            parts.append(_box(NAMES + index * wide, floor - high, wide - 0.5, high, GRAY))
    columns = [NAMES + PLOT + FIGURES * (index + 1) / len(heads) for index in range(len(heads))]
    parts += [label(x, floor + 16, head, anchor="end") for x, head in zip(columns, heads, strict=True)]
    for row, grid in enumerate(grids):
        y = floor + 26 + ROW * row
        parts += _row(y, grid, axis, columns, tinted=row % 2 == 0)
    if axis.logarithmic:
        parts.append(label(NAMES - ZERO_AT, bottom + 16, "0", anchor="middle"))
    return _joined(parts)


def outlier_svg(
    title: str, lines: Sequence[str], sizes: Sequence[float], apart: int, axis: Axis, heads: Sequence[str],
    grids: Sequence[Grid],
) -> str:  # fmt: skip
    """The largest magnitude of every channel, that of `apart` marked; below, levels where the other channels are."""
    top = 44 + 16 * len(lines)
    floor = top + HIGH
    between = floor + 58
    bottom = between + ROW * len(grids)
    parts = _sheet(title, lines, bottom + 26)
    highest = sizes[apart]
    wide = PLOT / len(sizes)
    bars = " ".join(
        f"M{NAMES + (channel + 0.5) * wide:.1f} {floor}v{-size / highest * HIGH:.1f}"
        for channel, size in enumerate(sizes)
        if channel != apart
    )
    parts.append(f'<path d="{bars}" stroke="{BLUE}" stroke-width="{wide:.2f}"/>')
    parts.append(_box(NAMES + (apart + 0.5) * wide - 1.5, top, 3, HIGH, ORANGE))
    others = max(size for channel, size in enumerate(sizes) if channel != apart)
    parts.append(f'<line x1="{NAMES}" y1="{floor}" x2="{NAMES + PLOT}" y2="{floor}" stroke="{INK}"/>')
    x = NAMES + PLOT + 8
    parts += [label(x, top + 10, f"channel {apart}: {sizes[apart]:.4g}")]
    parts += [label(x, floor - 4, f"all others: at most {others:.3g}")]
    parts += [label(NAMES - 8, top + 10, "largest magnitude", anchor="end")]
    parts += [label(NAMES, floor + 15, "channel 0"), label(NAMES + PLOT, floor + 15, str(len(sizes) - 1), anchor="end")]
    parts += [label(MARGIN, between - 12, "levels where all other channels are")]
    parts += _axis(axis, between, bottom)
    columns = [NAMES + PLOT + FIGURES * (index + 1) / len(heads) for index in range(len(heads))]
    parts += [label(x, between - 12, head, anchor="end") for x, head in zip(columns, heads, strict=True)]
    for row, grid in enumerate(grids):
        parts += _row(between + ROW * row, grid, axis, columns, tinted=row % 2 == 0)
    return _joined(parts)


def sizes_svg(title: str, lines: Sequence[str], bytes_of: Mapping[str, Mapping[str, int]]) -> str:
    """A bar for each model of `bytes_of`, divided by kind of tensor; bytes_of: {model: {kind: bytes}}."""
    kinds = list(dict.fromkeys(kind for one in bytes_of.values() for kind in one))
    top = 44 + 16 * len(lines)
    longest = max(sum(one.values()) for one in bytes_of.values())
    unit, power = ("MB", 1e6) if longest >= 1e6 else ("kB", 1e3)
    below = top + (ROW + 8) * len(bytes_of) + 12
    parts = _sheet(title, lines, below + 18 * (len(kinds) + 1) + 8)
    left = 60
    for row, (name, one) in enumerate(bytes_of.items()):
        x, y = float(left), top + (ROW + 8) * row
        parts.append(label(left - 8, y + 19, name, anchor="end"))
        for kind, colour in zip(kinds, PALETTE, strict=False):
            long = one.get(kind, 0) / longest * (WIDTH - left - 120)
            parts.append(_box(x, y, long, ROW, colour))
            x += long
        parts.append(label(x + 8, y + 19, f"{sum(one.values()) / power:.2f} {unit}"))
    columns = [NAMES + 80 + 110 * (index + 1) for index in range(len(bytes_of))]
    parts += [label(x, below + 12, name, anchor="end") for x, name in zip(columns, bytes_of, strict=True)]
    for row, (kind, colour) in enumerate(zip(kinds, PALETTE, strict=False)):
        y = below + 18 * (row + 1)
        parts += [_box(left, y + 3, 10, 10, colour), label(left + 16, y + 12, kind)]
        for x, one in zip(columns, bytes_of.values(), strict=True):
            parts.append(label(x, y + 12, f"{one.get(kind, 0) / power:.3f} {unit}", anchor="end"))
    return _joined(parts)


def _row(y: float, grid: Grid, axis: Axis, columns: Sequence[float], *, tinted: bool) -> Iterable[str]:
    if tinted:
        yield _box(0, y, WIDTH, ROW, BAND)
    yield label(MARGIN, y + 19, grid.name)
    shown = [level for level in grid.levels if axis.low <= level <= axis.high or (axis.logarithmic and level <= 0)]
    wide = 1 if len(grid.levels) > 64 else 2
    # One path for all: hundreds of levels as elements of their own would make a large file.
    ticks = " ".join(f"M{NAMES + axis.place_or_zero(level):.1f} {y + 7:.0f}v{TICK}" for level in shown)
    yield f'<path d="{ticks}" stroke="{BLUE}" stroke-width="{wide}"/>'
    yield from (label(x, y + 19, text, anchor="end") for x, text in zip(columns, grid.figures, strict=True))


def _axis(axis: Axis, floor: float, bottom: float) -> Iterable[str]:
    yield f'<line x1="{NAMES}" y1="{floor}" x2="{NAMES + PLOT}" y2="{floor}" stroke="{INK}"/>'
    for value, name in axis.marks():
        x = NAMES + axis.place(value)
        yield f'<line x1="{x:.1f}" y1="{floor}" x2="{x:.1f}" y2="{bottom + 4}" stroke="{FAINT}"/>'
        yield label(x, bottom + 16, name, anchor="middle")


def _sheet(title: str, lines: Sequence[str], height: float) -> list[str]:
    """White paper, so that a dark page does not swallow the ink, with what stands at the top of it."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" font-family="ui-monospace, Menlo, Consolas, monospace" font-size="11" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>',
        label(MARGIN, 22, title, size=15),
        *(label(MARGIN, 40 + 16 * index, line) for index, line in enumerate(lines)),
    ]


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _joined(parts: Iterable[str]) -> str:
    return "\n".join([*parts, "</svg>"]) + "\n"
