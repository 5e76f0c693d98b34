"""Published numbers and ours side by side, in Markdown: cells of `published.py`, lines of `reproduce.py`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from accuracy_table import between_marks
from published import NUM_IMAGES, Cell, differences, published_cells, source_text, title

MARK = "<!-- reproduction: {name} -->\n"
IMAGENET = 50_000
"""Images of ImageNet-1k val, which the published numbers are of."""
_PARTS = ("generate", "quantize", "evaluate", "speed")


def to_markdown(cells: Sequence[Cell], lines: Sequence[dict[str, Any]], skipped: str = "") -> str:
    """All these cells, whether there is a line of them or not. skipped: why cells on real images are not made."""
    best = best_lines(lines)
    parts = []
    for table in dict.fromkeys(cell.table for cell in cells):
        own = [cell for cell in cells if cell.table == table]
        parts.append(f"### {title(table)}")
        speed = [cell for cell in own if cell.kind == "speed"]
        if speed:
            parts.append(_speed_table(speed, best))
        parts.append(_accuracy_table([cell for cell in own if cell.kind != "speed"], best, skipped))
        sources = dict.fromkeys(cell.source for cell in own if cell.source)
        parts.append("\n".join(f"* *{source}*: {source_text(source)}." for source in sources))
        parts.append("What is not as published:\n\n" + "\n".join(f"* {text}" for text in differences(table)))
        parts.append(_measured_on([best[cell.key] for cell in own if _done(best.get(cell.key))]))
    return "\n\n".join(part for part in parts if part) + "\n"


def with_tables(page: str, name: str, lines: Sequence[dict[str, Any]], models: Collection[str] | None = None) -> str:
    """`page` with what stands between the marks for the results file `name` replaced by the tables of its lines.

    They hold the tables that have a line, and of the models those that have one.
    """
    found = {line["model"] for line in lines} if models is None else set(models)
    tables = {line["table"] for line in lines}
    cells = [cell for cell in published_cells() if cell.model in found and cell.table in tables]
    return between_marks(page, MARK.format(name=name), to_markdown(cells, lines))


def best_lines(lines: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, Any]]:
    """For each cell the line to show: of those that were finished the one of most images, then of most iterations, then
    the last; where none was, the last failure."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in lines:
        key = (line["table"], line["model"], line["kind"], line["name"], line["bits"])
        if key not in found or _weight(line) >= _weight(found[key]):
            found[key] = line
    return found


def _weight(line: dict[str, Any]) -> tuple[bool, int, int]:
    return "error" not in line, line.get("num_images", 0), line.get("iterations") or 0


def _done(line: dict[str, Any] | None) -> bool:
    return line is not None and "error" not in line


def _accuracy_table(cells: Sequence[Cell], best: dict[tuple[str, ...], dict[str, Any]], skipped: str) -> str:
    rows = [
        "| model | images by | bits | published | ours [95 %] | difference | published drop | our drop [95 %] "
        "| seconds: generate + quantize + evaluate (estimated) | ours measured on |",
        "|---" * 10 + "|",
    ]
    for cell in cells:
        row = [cell.model, f"`{cell.name}`", cell.bits.upper()]
        row.append(_published(cell))
        line = best.get(cell.key)
        if line is not None and _done(line):
            row += _found(cell, line)
        else:
            row += [_reason(cell, line, skipped), "-", _points(cell.published_drop), "-", "-", "-"]
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)


def _published(cell: Cell) -> str:
    return f"{cell.published:.2f} ({cell.source})" if cell.published is not None else f"- ({cell.unknown})"


def _found(cell: Cell, line: dict[str, Any]) -> list[str]:
    low, high = line["top1_ci95"]
    drop_low, drop_high = line["drop_ci95"]
    return [
        f"{line['top1']:.2f} [{low:.2f}, {high:.2f}]",
        "-" if cell.published is None else f"{line['top1'] - cell.published:+.2f}",
        _points(cell.published_drop),
        f"{line['drop']:.2f} [{drop_low:.2f}, {drop_high:.2f}]",
        _seconds(line),
        _departures(cell, line),
    ]


def _points(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _seconds(line: dict[str, Any]) -> str:
    """By part, and beside it what a dry run had foretold, where there was one."""

    def told(seconds: dict[str, float | None]) -> str:
        return " + ".join(
            "?" if seconds[part] is None else f"{seconds[part]:.0f}" for part in _PARTS if part in seconds
        )

    estimated = line.get("estimated")
    return told(line["seconds"]) + (f" ({told(estimated)})" if estimated else "")


def _departures(cell: Cell, line: dict[str, Any]) -> str:
    """The images, and in what this run was not the published setting."""
    told = []
    if cell.kind == "accuracy":
        told.append(f"{line['num_images']:,} images")
        if line["num_images"] < IMAGENET:
            told[-1] += f" instead of {IMAGENET:,}"
    if cell.iterations and line["iterations"] != cell.iterations:
        told.append(f"{line['iterations']:,} of {cell.iterations:,} iterations")
    if cell.iterations and line["precision"] != "fp32":
        told.append(f"inverted in {line['precision']}")
    if line.get("calibrated_on_measured"):
        told.append(f"the {NUM_IMAGES} images for calibration are among them")
    return "; ".join(told) or "as published"


def _reason(cell: Cell, line: dict[str, Any] | None, skipped: str) -> str:
    """Why there is no number."""
    if cell.kind == "none":
        return f"cannot be made: {cell.cannot}"
    if line is not None:
        return f"failed: {line['error']}"
    if cell.images == "real" and skipped:
        return f"skipped: {skipped}"
    return "not run"


def _speed_table(cells: Sequence[Cell], best: dict[tuple[str, ...], dict[str, Any]]) -> str:
    rows = [
        "| model | times quicker than dense: published | ours, by the clock [lowest, highest round] | difference "
        "| ours, by FLOPs | seconds for an image: dense | sparse | seconds it took (estimated) | ours measured on |",
        "|---" * 9 + "|",
    ]
    for cell in cells:
        line = best.get(cell.key)
        row = [cell.model, f"up to {_published(cell)}"]
        if line is not None and _done(line):
            low, high = line["ratio_range"]
            per_image = line["seconds_per_image"]
            row += [f"{line['ratio']:.2f} [{low:.2f}, {high:.2f}]", f"{line['ratio'] - (cell.published or 0.0):+.2f}"]
            row += [f"{line['flops_ratio']:.2f}", f"{per_image['dense']:.2f}", f"{per_image['smi']:.2f}"]
            row += [_seconds(line), _departures(cell, line)]
        else:
            row += [_reason(cell, line, ""), *["-"] * 6]
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)


def _measured_on(lines: Sequence[dict[str, Any]]) -> str:
    """Full precision and weights of each model, and where all of it ran."""
    if not lines:
        return ""
    told = []
    for model in dict.fromkeys(line["model"] for line in lines):
        line = max((line for line in lines if line["model"] == model), key=lambda line: line.get("num_images", 0))
        cell = next(cell for cell in published_cells([line["table"]]) if cell.model == model)
        text = f"{model}: {cell.timm}, weights {line['weights']}; {line['preprocessing']}"
        if "baseline_top1" in line:
            full = "not known" if cell.full is None else f"{cell.full:.2f}"
            text += f"; full precision {line['baseline_top1']:.2f} on {line['num_images']:,} images, published {full}"
        told.append(f"* {text}.")
    first = lines[0]
    known = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    where = {f"{line['machine']}, device {line['device']}, {line['threads']} threads" for line in lines}
    seeds = ", ".join(map(str, sorted({line["seed"] for line in lines})))
    told.append(f"* {'; '.join(sorted(where))}; seed {seeds}; {known}.")
    return "Ours:\n\n" + "\n".join(told)
