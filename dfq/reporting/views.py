"""What stands in the tables of a report: numbers as people read them, in the rows and columns they read them in."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO

from PIL import Image
from torch import Tensor

from calibration import CalibrationSet
from calibration.sheet import class_name, enlarge, on_ground
from dfq.datasets import class_captions
from dfq.evaluation import ClassCounts, Comparison, Evaluation
from dfq.models import PYTORCH
from dfq.reporting.account import Account
from dfq.reporting.commands import calibration_run
from dfq.reporting.measure import Measured, SiteRounding
from dfq.reporting.results import Speeds
from dfq.statistics import wilson_interval

Rows = list[tuple[str, ...]]

_IN_BLOCK = re.compile(r"((?:layers\.\d+\.)?blocks\.\d+)\.(.+)")
_QUALITY = 85
"""Of the pictures, as JPEG counts."""


@dataclass(frozen=True)
class Card:
    """One of the few things that a reader takes home."""

    title: str
    value: str
    detail: str
    measured: bool = True


@dataclass(frozen=True)
class Cell:
    """level: how strongly it is tinted, in [0, 1]."""

    text: str
    level: float = 0.0


@dataclass(frozen=True)
class Matrix:
    """A number for each place within a block (rows) and each block (columns)."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True)
class Picture:
    """A calibration image as a `data:` address."""

    address: str
    caption: str
    width: int
    height: int


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


def decibels(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else "exact"


def interval(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.1f} to {ends[1]:.1f}"


def verdict(account: Account) -> list[Card]:
    """Accuracy, size and speed."""
    return [_accuracy_card(account), _size_card(account), _speed_card(account)]


def _accuracy_card(account: Account) -> Card:
    found = account.results.evaluation
    if found is None:
        return Card("Accuracy", "not measured", "", measured=False)
    against = found.comparison
    if against is None:
        return Card("Accuracy", f"{found.top1:.1f} %", f"top-1 on {found.num_images} images; full precision unmeasured")
    return Card(
        "Accuracy",
        f"{against.drop:.1f} points lost",
        f"95 % interval {interval(against.drop_ci95)}. Top-1 is {found.top1:.1f} %, in full precision "
        f"{against.baseline_top1:.1f} %, on the same {found.num_images} images. {judgement(against)}",
    )


def judgement(against: Comparison) -> str:
    """What the interval of a drop says, in words."""
    low, high = against.drop_ci95
    if low > 0:
        return "That it lost something is sure."
    if high < 0:
        return "It does better than full precision on these images."
    return "The interval holds 0: on these images it may be chance."


def _size_card(account: Account) -> Card:
    packed = account.quantized.weight_bytes
    return Card(
        "Size",
        megabytes(packed),
        f"{account.float_bytes / packed:.1f} times smaller than in float32 ({megabytes(account.float_bytes)}); "
        f"its folder takes {megabytes(account.file_bytes)}",
    )


def _speed_card(account: Account) -> Card:
    found = account.results.bench
    best = None if found is None else found.best
    if found is None or best is None:
        return Card("Speed", "not measured", "", measured=False)
    slower = "; that is slower" if best.over_fp32 < 1 else ""
    return Card(
        "Speed",
        f"{best.over_fp32:.2f} times fp32",
        f"{best.images_per_second:.1f} images/s in {best.runtime} on {threads(found)} of {found.cpu}{slower}. One "
        f"image takes {best.latency_ms:.1f} ms.",
    )


def threads(found: Speeds) -> str:
    return f"{found.threads} thread{'s' if found.threads > 1 else ''}"


def how_rows(account: Account) -> Rows:
    """What was quantized, and how."""
    quantized = account.quantized
    recipe, origin = quantized.recipe, quantized.origin
    weights = sum(name.endswith(".weight") for name in quantized.sites)
    ends = recipe.first_last_bits
    run = calibration_run(quantized)
    made = "photographs" if run.get("method") == "real" else f"made by {run.get('method', 'unknown means')}"
    source = origin.checkpoint or ("random weights" if origin.random_weights else "timm's pretrained weights")
    return [
        ("Model", f"{origin.name}, {quantized.num_classes} classes"),
        ("Weights from", source),
        ("Bits", quantized.bits.upper() + ("" if ends is None else f"; patch embedding and classifier {ends}")),
        ("Quantized tensors", f"{weights} of weights, {len(quantized.sites) - weights} of activations"),
        ("Recipe", f"{recipe.name}: {recipe.summary}" if recipe.summary else recipe.name),
        ("Calibrated on", f"{quantized.calibration.get('num_images', '?')} images, {made}"),
        ("Preprocessing", quantized.preprocessing.describe()),
    ]


def accuracy_rows(found: Evaluation) -> Rows:
    """(what, value, interval or remark)."""

    def share(name: str, percent: float) -> tuple[str, str, str]:
        low, high = wilson_interval(round(percent * found.num_images / 100), found.num_images)
        return name, f"{percent:.2f} %", interval((100 * low, 100 * high)) + " %"

    rows: Rows = [share("top-1", found.top1), share("top-5", found.top5)]
    against = found.comparison
    if against is not None:
        rows += [
            share("top-1 in full precision", against.baseline_top1),
            (
                "drop",
                f"{against.drop:.2f} points",
                f"{interval(against.drop_ci95)} points; p = {against.mcnemar_p:.2g}",
            ),
            share("same answer as full precision", against.agreement),
            ("SQNR of the logits", decibels(against.logit_sqnr_db), "power of the logits over that of their change"),
        ]
    where = f"fake-quantized, on {found.device}" if found.runtime == PYTORCH else f"in {found.runtime}"
    return [*rows, ("images", str(found.num_images), where)]


def speed_rows(found: Speeds) -> Rows:
    """(runtime, bits, MB, ms for one image, images/s, times fp32 in latency, in throughput)."""
    return [
        (
            row.runtime,
            row.bits,
            f"{row.size / 1e6:.2f}",
            f"{row.latency_ms:.1f}",
            f"{row.images_per_second:.1f}",
            f"{row.latency_over_fp32:.2f}",
            f"{row.over_fp32:.2f}",
        )
        for row in found.rows
    ]


def pictures(account: Account) -> list[Picture]:
    """The images, what is no part of them left blank."""
    images = account.images
    if images is None:
        return []
    tiles = enlarge(on_ground(images.images, images.grid.to_pixels(images.mask)))
    return [_picture(tile, _caption(images, index, account)) for index, tile in enumerate(tiles)]


def blank_patches(account: Account) -> str:
    """What the ones left blank in `pictures` were in calibration; nothing where there are none."""
    if account.images is None or not account.images.is_sparse:
        return ""
    if account.quantized.recipe.background == "leaves":
        return "Patches that are left blank are no part of an image: in calibration dead leaves stood in their place."
    return "Patches that are left blank were never shown to the model."


def _caption(images: CalibrationSet, index: int, account: Account) -> str:
    if images.labels is None:
        return f"image {index + 1}"
    said = class_name(int(images.labels[index]), class_captions(account.quantized))
    return said if images.confidence is None else f"{said}, {100 * float(images.confidence[index]):.0f} %"


def _picture(tile: Tensor, caption: str) -> Picture:
    content = BytesIO()
    Image.fromarray(tile.permute(1, 2, 0).numpy()).save(content, format="JPEG", quality=_QUALITY)
    encoded = base64.b64encode(content.getvalue()).decode("ascii")
    return Picture(f"data:image/jpeg;base64,{encoded}", caption, tile.shape[-1], tile.shape[-2])


def matrices(measured: Measured) -> list[Matrix]:
    """Of all sites and layers that are in blocks."""
    roundings = [(site.name, site.sqnr_db) for site in measured.sites if math.isfinite(site.sqnr_db)]
    sites = _matrix(
        "Rounding of each activation, SQNR in dB",
        "Power of the values over that of what rounding alone changed. The stronger the tint, the lower.",
        roundings,
        lambda value: f"{value:.0f}",
        _lowness([value for _, value in roundings]),
    )
    largest = [(site.name, max(abs(site.low), abs(site.high))) for site in measured.sites]
    sizes = [math.log10(value) for _, value in largest if value > 0]
    smallest, biggest = min(sizes, default=0.0), max(sizes, default=0.0)
    ranges = _matrix(
        "Largest magnitude of each activation",
        "As it came to the quantizer. A row that is tinted in one block only has outliers there.",
        largest,
        lambda value: f"{value:.3g}",
        lambda value: _between(math.log10(value), smallest, biggest) if value > 0 else 0.0,
    )
    distances = [(layer.name, layer.sqnr_db) for layer in measured.layers if math.isfinite(layer.sqnr_db)]
    layers = _matrix(
        "What each layer gives, beside full precision, SQNR in dB",
        "All that was lost up to there. Of qkv only q and k: recipes may rescale the channels of v.",
        distances,
        lambda value: f"{value:.0f}",
        _lowness([value for _, value in distances]),
    )
    return [matrix for matrix in (layers, sites, ranges) if matrix.rows]


def _between(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.0


def _lowness(values: Sequence[float]) -> Callable[[float], float]:
    low, high = min(values, default=0.0), max(values, default=0.0)
    return lambda value: 1.0 - _between(value, low, high) if high > low else 0.0


def _matrix(
    title: str,
    note: str,
    values: Sequence[tuple[str, float]],
    text: Callable[[float], str],
    level: Callable[[float], float],
) -> Matrix:
    cells: dict[str, dict[str, Cell]] = {}
    columns: dict[str, None] = {}
    for name, value in values:
        match = _IN_BLOCK.fullmatch(name)
        if match:
            columns.setdefault(match[1])
            cells.setdefault(match[2], {})[match[1]] = Cell(text(value), level(value))
    rows = ((row, tuple(found.get(column, Cell("")) for column in columns)) for row, found in cells.items())
    return Matrix(title, note, tuple(columns), tuple(rows))


def site_rows(sites: Iterable[SiteRounding]) -> Rows:
    """(site, bits, quantizer, values from, to, after rounding from, to, SQNR)."""
    return [
        (
            site.name,
            str(site.bits),
            site.quantizer,
            *(f"{value:.3g}" for value in (site.low, site.high, site.kept_low, site.kept_high)),
            decibels(site.sqnr_db),
        )
        for site in sites
    ]


def worst_sites(measured: Measured, count: int = 10) -> list[SiteRounding]:
    """Those where rounding costs most, the worst first."""
    return sorted(measured.sites, key=lambda site: site.sqnr_db)[:count]


def class_rows(account: Account, found: Evaluation, count: int = 20) -> Rows:
    """(class, images, percent right in full precision, quantized, change in points) where most was lost or gained."""
    names = class_captions(account.quantized)

    def change(counts: ClassCounts) -> float:
        return 100 * (counts.right - (counts.baseline_right or 0)) / counts.num_images

    moved = [counts for counts in found.classes if counts.baseline_right is not None and change(counts) != 0]
    moved.sort(key=lambda counts: (change(counts), counts.label))
    if len(moved) > count:
        moved = [*moved[: count // 2], *moved[-(count // 2) :]]
    return [
        (
            class_name(counts.label, names),
            str(counts.num_images),
            f"{100 * (counts.baseline_right or 0) / counts.num_images:.0f}",
            f"{100 * counts.right / counts.num_images:.0f}",
            f"{change(counts):+.0f}",
        )
        for counts in moved
    ]


def changed_rows(account: Account, found: Evaluation, count: int = 20) -> Rows:
    """(answer of full precision, of the quantized model, images), the most frequent first."""
    names = class_captions(account.quantized)
    return [
        (class_name(answer, names), class_name(other, names), str(number))
        for answer, other, number in found.changed[:count]
    ]


def comparison_rows(accounts: Sequence[Account]) -> Rows:
    """A row each: (folder, bits, recipe, calibrated on, MB, top-1, drop, its interval, same answer, times fp32)."""
    rows: Rows = []
    for account in accounts:
        found, bench = account.results.evaluation, account.results.bench
        against = None if found is None else found.comparison
        best = None if bench is None else bench.best
        method = calibration_run(account.quantized).get("method", "?")
        rows.append(
            (
                account.name,
                account.quantized.bits.upper(),
                account.quantized.recipe.name,
                f"{account.quantized.calibration.get('num_images', '?')} {method}",
                f"{account.quantized.weight_bytes / 1e6:.2f}",
                "-" if found is None else f"{found.top1:.2f}",
                "-" if against is None else f"{against.drop:.2f}",
                "-" if against is None else interval(against.drop_ci95),
                "-" if against is None else f"{against.agreement:.1f}",
                "-" if best is None else f"{best.over_fp32:.2f} ({best.runtime})",
            )
        )
    return rows
