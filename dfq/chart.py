"""A chart of what each site costs: one SVG file that needs nothing else to be seen."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

from calibration.files import replace_file
from dfq.ptq.sensitivity import KINDS, Sensitivity

# Told apart also by those who see no red or no green (Okabe and Ito's palette).
COLOURS = {"weight": "#0072b2", "input": "#e69f00", "attention": "#009e73", "other": "#999999"}
INK, FAINT, BAND = "#303030", "#d0d0d0", "#f4f6f9"

# Pixels: a row, a letter of its label, the longest bar, what stands above the rows, the numbers beside them.
ROW, LETTER, BARS, TOP, NUMBERS = 15, 6.7, 460, 92, 150
DECADES = 6
"""How far below the largest KL the axis reaches at most."""


def write_chart(found: Sensitivity, path: Path) -> None:
    """Raises DfqError where the file cannot be written."""
    text = sensitivity_svg(found)
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def sensitivity_svg(found: Sensitivity) -> str:
    """A bar for each site in the order of the network: its KL on a logarithmic axis; beside it KL and SQNR in figures.

    A KL below the axis has a bar of one pixel, and a KL of zero none.
    """
    low, high = _decades([site.cost.kl for site in found.sites])
    left = 24 + LETTER * max((len(site.name) for site in found.sites), default=0)
    bottom = TOP + ROW * len(found.sites)
    width, height = left + BARS + NUMBERS, bottom + 28

    def place(kl: float) -> float:
        """Pixels right of `left`."""
        return min(1.0, max(0.0, (math.log10(kl) - low) / (high - low))) * BARS

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'height="{height}" font-family="ui-monospace, Menlo, Consolas, monospace" font-size="11" fill="{INK}">',
        f'<rect width="{width:.0f}" height="{height}" fill="#ffffff"/>',
        label(12, 22, "What each site costs, quantized alone", size=15),
        label(12, 40, found.describe().replace("  ", ", ")),
        *_legend(found),
        *_bands(found, width),
    ]
    for exponent in range(low, high + 1):
        x = left + place(10.0**exponent)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP - 4}" x2="{x:.1f}" y2="{bottom}" stroke="{FAINT}"/>')
        parts += [label(x, y, f"1e{exponent}", anchor="middle") for y in (TOP - 8, bottom + 15)]
    columns = (left + BARS + 84, width - 12)
    parts += [label(x, TOP - 8, head, anchor="end") for x, head in zip(columns, ("KL, nats", "SQNR"), strict=True)]
    for row, site in enumerate(found.sites):
        y = TOP + ROW * row
        cost = site.cost
        sqnr = f"{cost.sqnr_db:.1f} dB" if math.isfinite(cost.sqnr_db) else "identical"
        parts.append(label(left - 8, y + 11, site.name, anchor="end"))
        if cost.kl > 0:
            length = max(1.0, place(cost.kl))
            parts.append(
                f'<rect x="{left:.1f}" y="{y + 2}" width="{length:.1f}" height="{ROW - 4}" '
                f'fill="{COLOURS[site.kind]}"><title>{escape(site.name)}, {site.bits} bits</title></rect>'
            )
        parts += [
            label(x, y + 11, text, anchor="end") for x, text in zip(columns, (f"{cost.kl:.1e}", sqnr), strict=True)
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _decades(values: list[float]) -> tuple[int, int]:
    """Exponents of ten at the ends of the axis."""
    positive = [value for value in values if value > 0]
    if not positive:
        return -1, 0
    high = math.ceil(math.log10(max(positive)))
    return max(high - DECADES, min(math.floor(math.log10(min(positive))), high - 1)), high


def _legend(found: Sensitivity) -> Iterator[str]:
    """A coloured square and words for each kind of site that there is."""
    x = 12.0
    for kind, what in KINDS.items():
        if any(site.kind == kind for site in found.sites):
            yield f'<rect x="{x:.1f}" y="52" width="10" height="10" fill="{COLOURS[kind]}"/>'
            yield label(x + 15, 61, what)
            x += 15 + LETTER * len(what) + 20


def _bands(found: Sensitivity, width: float) -> Iterator[str]:
    """A tinted ground under every other block."""
    previous, tinted = "", False
    for row, site in enumerate(found.sites):
        block = re.split(r"\.(?:attn|mlp)\.|\.\w+$", site.name)[0]
        tinted ^= row > 0 and block != previous
        previous = block
        if tinted:
            yield f'<rect y="{TOP + ROW * row}" width="{width:.0f}" height="{ROW}" fill="{BAND}"/>'


def label(x: float, y: float, text: str, *, size: int = 11, anchor: str = "start") -> str:
    """A piece of text at a place, in pixels."""
    return f'<text x="{x:.1f}" y="{y:g}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'
