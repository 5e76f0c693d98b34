"""A picture of a calibration set, for eyes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from calibration.calibration_set import CalibrationSet
from calibration.sheet import Sheet, class_name, enlarge, on_ground

COLUMNS = 8
MOST = 32


def write_preview(calibration: CalibrationSet, path: Path, class_names: Sequence[str] | None = None) -> None:
    """The first images, eight to a row; patches that are no part of the image are left blank.

    Under each stands its class, where it has a label (`class 207` where `class_names` has no name for it), and the
    model's confidence in it, where that is known. Raises DfqError where the picture cannot be written.
    """
    inside = calibration.grid.to_pixels(calibration.mask[:MOST])
    tiles = enlarge(on_ground(calibration.images[:MOST], inside))
    labels, confidence = calibration.labels, calibration.confidence
    columns = min(COLUMNS, len(tiles))
    height, width = tiles.shape[-2:]
    sheet = Sheet(-(-len(tiles) // columns), columns, (height, width), captions=labels is not None)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        sheet.paste(row, column, tile)
        if labels is not None:
            percent = f"  {100 * float(confidence[index]):.0f} %" if confidence is not None else ""
            sheet.caption(row, column, class_name(int(labels[index]), class_names), percent)
    sheet.save(path)
