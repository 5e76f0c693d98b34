"""The tables of `bench_inversion.py`, from the record it writes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from accuracy_table import between_marks


def contender_of(record: dict[str, Any], name: str) -> dict[str, Any]:
    return next(contender for contender in record["contenders"] if contender["name"] == name)


def median_seconds(record: dict[str, Any]) -> list[float]:
    return [median(phase["seconds"]) for phase in record["phases"]]


def projected(contender: dict[str, Any], per_iteration: Sequence[float]) -> float:
    """The sum over phases of iterations x `per_iteration`: of one canvas or of the batch, as that is."""
    return float(sum(n * cost for n, cost in zip(contender["iterations"], per_iteration, strict=True)))


def speedup(contender: dict[str, Any], base: dict[str, Any], cost: Sequence[float]) -> float:
    """How many images `contender` makes for what one costs by `base`."""
    images = contender["images_per_canvas"] / base["images_per_canvas"]
    return float(images * projected(base, cost) / projected(contender, cost))


def to_markdown(record: dict[str, Any]) -> str:
    """The table of contenders, that of phases, and what they were measured on."""
    size = "x".join(map(str, record["image_size"]))
    division = contender_of(record, "pri")["images_per_canvas"]
    fp32, bf16 = (number(record["matmul_flops_per_second"][name] / 1e9) for name in ("fp32", "bf16"))
    known = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"""\
**{record["model"]}**, {size} pixels, batches of {record["batch_size"]} canvases, {record["iterations"]:,} iterations;
`plain` in fp32, the others in {record["precision"]}. Times are projected: the sum over phases of iterations x
seconds per iteration, each phase run alone (second table). In brackets the lowest and the highest of the rounds.
`FLOPs alone` is the ratio if all arithmetic ran equally fast. An image of `pri` is 1/{division} of a canvas. Peak
memory is what a batch needs beyond the loaded model.

{contender_rows(record)}

Phases; with looks, every tenth iteration also looks at the unmoved images. The peak is that of the first block's own
matrix products, on all tokens: {fp32} GFLOP/s in fp32, {bf16} in bf16.

{phase_rows(record)}

{check_rows(record)}Medians of {record["rounds"]} rounds, {record["steps"]} iterations of each phase in each.
Device {record["device"]}, {record["threads"]} threads; {record["machine"]}; seed {record["seed"]}; {known}.
"""


def contender_rows(record: dict[str, Any]) -> str:
    total = record["iterations"]
    plain, dense = contender_of(record, "plain"), contender_of(record, "dense")
    flops = [phase["flops"] for phase in record["phases"]]
    rows = [
        f"| contender | patches x iterations | s/iteration | iterations/s | s per image at {total:,} iterations | "
        "images/hour | x plain | x dense | x plain, FLOPs alone | x dense, FLOPs alone | GFLOP per image | "
        "peak memory, MB |",
        "|---" * 12 + "|",
    ]
    for one in record["contenders"]:
        seconds = projected(one, median_seconds(record))
        images = record["batch_size"] * one["images_per_canvas"]
        memory = "-" if one["peak_memory"] is None else number(one["peak_memory"] / 1e6)
        parts = [f"{phase['kept']} x {n:,}" for phase, n in zip(record["phases"], one["iterations"], strict=True) if n]
        cells = [
            f"`{one['name']}`",
            ", ".join(parts),
            number(seconds / total),
            number(total / seconds),
            number(seconds / images),
            number(3600 * images / seconds),
            speedup_cell(record, one, plain),
            speedup_cell(record, one, dense),
            number(speedup(one, plain, flops)),
            number(speedup(one, dense, flops)),
            number(projected(one, flops) / one["images_per_canvas"] / 1e9),
            memory,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def speedup_cell(record: dict[str, Any], contender: dict[str, Any], base: dict[str, Any]) -> str:
    if contender["name"] == base["name"]:
        return "1"
    rounds = zip(*(phase["seconds"] for phase in record["phases"]), strict=True)
    ratios = [speedup(contender, base, seconds) for seconds in rounds]
    middle = speedup(contender, base, median_seconds(record))
    return f"{number(middle)} [{number(min(ratios))}, {number(max(ratios))}]"


def phase_rows(record: dict[str, Any]) -> str:
    rows = [
        "| loop | patches | looks | s/iteration | GFLOP per canvas and iteration | GFLOP/s | share of peak |",
        "|---" * 7 + "|",
    ]
    for phase in record["phases"]:
        seconds = phase["seconds"]
        speed = phase["flops"] * record["batch_size"] / median(seconds)
        peak = record["matmul_flops_per_second"]["fp32" if phase["plain"] else record["precision"]]
        cells = [
            "plain" if phase["plain"] else "dfq",
            str(phase["kept"]),
            "yes" if phase["looks"] else "no",
            f"{number(median(seconds))} [{number(min(seconds))}, {number(max(seconds))}]",
            number(phase["flops"] / 1e9),
            number(speed / 1e9),
            f"{speed / peak:.0%}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def check_rows(record: dict[str, Any]) -> str:
    if not record["whole"]:
        return ""
    rows = ["| really run | iterations | s projected | s measured | measured / projected |", "|---" * 5 + "|"]
    for check in record["whole"]:
        cells = [number(check["projected"]), number(check["measured"]), f"{check['measured'] / check['projected']:.2f}"]
        rows.append(f"| `{check['name']}` | {check['iterations']:,} | {' | '.join(cells)} |")
    return "\n".join([*rows, "", ""])


def number(value: float) -> str:
    """Three digits at least: 0.0123, 4.50, 78.9, 123, 45,678."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def with_table(page: str, name: str, record: dict[str, Any]) -> str:
    """`page` with what stands between the marks for the JSON file `name` replaced by its tables."""
    return between_marks(page, f"<!-- table: {name} -->\n", to_markdown(record))
