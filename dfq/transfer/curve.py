"""The curve of a transfer: one SVG file that needs nothing else to be seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calibration.files import replace_file
from dfq.chart import COLOURS, FAINT, INK, label
from dfq.transfer.record import Round

# Pixels.
WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 60, 60, 70, 44


@dataclass(frozen=True)
class _Line:
    """What is drawn in one colour: (images, value) where it was measured."""

    name: str
    colour: str
    points: list[tuple[int, float]]


def write_curve(rounds: Sequence[Round], title: str, teacher_top1: float | None, path: Path) -> None:
    """Raises DfqError where the file cannot be written."""
    text = curve_svg(rounds, title, teacher_top1)
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def curve_svg(rounds: Sequence[Round], title: str, teacher_top1: float | None) -> str:
    """Percent (left axis) and divergence (right axis) against the round.

    Top-1 on labelled images where it was measured, else the agreement with the teacher on images that were held out;
    the teacher's own top-1 is a dashed line.
    """
    lines = [
        _Line("top-1, %", COLOURS["weight"], _points(rounds, "top1")),
        _Line("agreement on held-out images, %", COLOURS["attention"], _points(rounds, "agreement")),
    ]
    divergence = _Line("divergence in training", COLOURS["input"], _points(rounds, "divergence"))
    last = max(entry.round for entry in rounds)
    highest = max(value for _, value in divergence.points) or 1.0

    def x(number: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (number - 1) / max(1, last - 1)

    def y(share: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="11" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        label(12, 22, title, size=14),
    ]
    for percent in range(0, 101, 20):
        at = y(percent / 100)
        parts.append(f'<line x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}" stroke="{FAINT}"/>')
        parts.append(label(LEFT - 8, at + 4, str(percent), anchor="end"))
        parts.append(label(WIDTH - RIGHT + 8, at + 4, f"{highest * percent / 100:.2g}"))
    ticks = sorted({1, *(round(1 + (last - 1) * part / 4) for part in range(5))})
    parts += [label(x(number), HEIGHT - BOTTOM + 16, str(number), anchor="middle") for number in ticks]
    parts.append(
        label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, f"round; {rounds[-1].images} images in the end", anchor="middle")
    )
    if teacher_top1 is not None:
        at = y(teacher_top1 / 100)
        ends = f'x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}"'
        parts.append(f'<line {ends} stroke="{INK}" stroke-dasharray="5 4"/>')
        parts.append(label(WIDTH - RIGHT - 4, at - 5, f"teacher {teacher_top1:.1f} %", anchor="end"))
    legend = 12.0
    for line, scale in ((lines[0], 100.0), (lines[1], 100.0), (divergence, highest)):
        if not line.points:
            continue
        places = [(x(number), y(value / scale)) for number, value in line.points]
        drawn = " ".join(f"{left:.1f},{top:.1f}" for left, top in places)
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{line.colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{left:.1f}" cy="{top:.1f}" r="2.5" fill="{line.colour}"/>' for left, top in places]
        parts.append(f'<rect x="{legend:.1f}" y="38" width="10" height="10" fill="{line.colour}"/>')
        parts.append(label(legend + 15, 47, line.name))
        legend += 15 + 6.7 * len(line.name) + 20
    return "\n".join([*parts, "</svg>"]) + "\n"


def _points(rounds: Sequence[Round], name: str) -> list[tuple[int, float]]:
    return [(entry.round, getattr(entry, name)) for entry in rounds if getattr(entry, name) is not None]
