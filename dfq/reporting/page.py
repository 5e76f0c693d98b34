"""`report`: one HTML file on a quantized model, or on several side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from calibration.files import make_directory, replace_file
from dfq.chart import sensitivity_svg
from dfq.errors import UsageError
from dfq.ptq.mixed_precision import recipe_to_toml
from dfq.reporting import views
from dfq.reporting.account import Account, account
from dfq.reporting.charts import Line, Point, interval_chart, line_chart
from dfq.reporting.commands import RECIPE_FILE, calibration_run, quantize_command, uses_preset
from dfq.versions import versions

Folder = Path | str | os.PathLike[str]


def report(
    directories: Folder | Sequence[Folder],
    out: Folder | None = None,
    *,
    evaluation: Folder | None = None,
    bench: Folder | None = None,
    sensitivity: Folder | None = None,
    calibration: Folder | None = None,
    checkpoint: Folder | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Path:
    """Write one HTML page, which needs nothing else to be seen, about what `dfq quantize` left in a folder.

    It says what was lost, saved and gained, how the model was made and how to make it again, and shows the images it
    was calibrated on and where the network loses precision; that is measured now, on the first 32 of these images.
    Several folders are compared instead.

    out: the file, by default `report.html` in the folder; of several it has to be said. evaluation, bench, sensitivity:
    what `dfq evaluate`, `dfq bench` and `dfq sensitivity` wrote with `--json`, by default `evaluation.json`,
    `bench.json` and `sensitivity.json` in the folder, where they are; calibration: the images, by default
    `calibration/` there. checkpoint: the original weights, if they are not where they were; where they are not to be
    had, the page goes without what is compared with them, and says so.

    Gives the path of the page. Raises DfqError where a folder holds no quantized model, where a file is something else
    or of another model, and UsageError where something is given for several folders that can only belong to one.
    """
    folders = [Path(directories)] if isinstance(directories, str | os.PathLike) else [Path(f) for f in directories]
    own = {"evaluation": evaluation, "bench": bench, "sensitivity": sensitivity}
    if not folders:
        raise UsageError("there is nothing to report: give the folder of a quantized model")
    if len(folders) > 1:
        single = [name for name, value in own.items() if value is not None]
        if single:
            raise UsageError(
                f"--{single[0]} is of one model, and {len(folders)} are compared; put {single[0]} into its folder"
            )
        if out is None:
            raise UsageError("of several models --out has to say where the page goes")
    path = folders[0] / "report.html" if out is None else Path(out)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name the file to write, such as {path / 'report.html'}")
    accounts = [
        account(
            folder,
            results={name: None if value is None else Path(value) for name, value in own.items()},
            calibration=None if calibration is None else Path(calibration),
            checkpoint=None if checkpoint is None else Path(checkpoint),
            device=device,
            progress=progress,
        )
        for folder in folders
    ]
    text = _one(accounts[0]) if len(accounts) == 1 else _several(accounts)
    make_directory(path.absolute().parent)
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return path


def _one(of: Account) -> str:
    quantized, found, measured = of.quantized, of.results, of.measured
    sections: dict[str, Any] = {
        "title": f"{quantized.name}, {quantized.bits.upper()}",
        "cards": views.verdict(of),
        "how": views.how_rows(of),
        "accuracy": None if found.evaluation is None else views.accuracy_rows(found.evaluation),
        "classes": [] if found.evaluation is None else views.class_rows(of, found.evaluation),
        "changed": [] if found.evaluation is None else views.changed_rows(of, found.evaluation),
        "speed": None if found.bench is None else views.speed_rows(found.bench),
        "bench": found.bench,
        "threads": None if found.bench is None else views.threads(found.bench),
        "pictures": views.pictures(of),
        "blank": views.blank_patches(of),
        "measured": measured,
        "depth": None if measured is None or not measured.stages else _depth([of]),
        "matrices": [] if measured is None else views.matrices(measured),
        "worst": [] if measured is None else views.site_rows(views.worst_sites(measured)),
        "sites": [] if measured is None else views.site_rows(measured.sites),
        "sensitivity": found.sensitivity,
        "costs": None if found.sensitivity is None else Markup(sensitivity_svg(found.sensitivity)),
        "missing": [*of.missing, *found.left_out],
        "folder": of.folder,
        "command": quantize_command(quantized, of.name),
        "recipe": recipe_to_toml(quantized.recipe),
        "recipe_file": None if uses_preset(quantized) else RECIPE_FILE,
        "run": json.dumps(calibration_run(quantized), indent=2),
        "made_with": of.versions,
        "fingerprint": quantized.origin.fingerprint,
        "checksum": of.checksum,
    }
    return _rendered("one.html.jinja", sections)


def _several(accounts: Sequence[Account]) -> str:
    points = [
        Point(of.name, of.quantized.weight_bytes / 1e6, against.drop, *against.drop_ci95)
        for of in accounts
        if of.results.evaluation is not None and (against := of.results.evaluation.comparison) is not None
    ]
    front = None
    if points:
        front = Markup(interval_chart("Points lost over size", "points lost", points, "MB"))
    sections: dict[str, Any] = {
        "title": f"{len(accounts)} quantized models",
        "rows": views.comparison_rows(accounts),
        "front": front,
        "depth": _depth(accounts) if any(of.measured is not None and of.measured.stages for of in accounts) else None,
        "different": len({_images_of(of) for of in accounts}) > 1,
        "accounts": [(of.name, quantize_command(of.quantized, of.name), of.checksum) for of in accounts],
        "missing": [f"{of.name}: {said}" for of in accounts for said in (*of.missing, *of.results.left_out)],
    }
    return _rendered("several.html.jinja", sections)


def _images_of(of: Account) -> tuple[int, float] | None:
    """By what two evaluations are told to be of other images."""
    found = of.results.evaluation
    against = None if found is None else found.comparison
    return None if found is None or against is None else (found.num_images, against.baseline_top1)


def _depth(accounts: Sequence[Account]) -> Markup:
    """How far each network is from full precision after every stage."""
    known = [{stage.name: stage.sqnr_db for stage in of.measured.stages} if of.measured else {} for of in accounts]
    stages = list(dict.fromkeys(name for values in known for name in values))
    lines = [
        Line(of.name, tuple(values.get(name) for name in stages)) for of, values in zip(accounts, known, strict=True)
    ]
    return Markup(line_chart("SQNR after each stage", "dB", stages, lines))


def _rendered(template: str, sections: Mapping[str, Any]) -> str:
    # Whatever stands in a file that somebody else made is text here, never markup.
    environment = Environment(
        loader=PackageLoader("dfq.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(sections, versions=versions())
