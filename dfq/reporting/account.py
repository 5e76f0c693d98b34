"""All that a report says of one quantized model, gathered from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from calibration import CalibrationSet, load_calibration_set
from dfq.architectures import without_weights
from dfq.checkpoint import CONFIG, WEIGHTS, load, read_description
from dfq.errors import DfqError
from dfq.models import load_original
from dfq.ptq.engine import QuantizedModel
from dfq.reporting.measure import Measured, measure
from dfq.reporting.results import Results, read_results

_CALIBRATION = "calibration"
MOST_IMAGES = 32
"""So many are shown, and measured on: more would tell little more."""


@dataclass(frozen=True)
class Account:
    """What is known of the quantized model in `folder`.

    checksum: SHA-256 of its weights; file_bytes: of what has to be handed over, weights and configuration; float_bytes:
    of its parameters in float32; images: that it was calibrated on, where they are at hand; measured: what was found
    on the first of them; versions: of what quantized it; missing: a sentence on everything that a report would have,
    and why it is not there.
    """

    folder: Path
    quantized: QuantizedModel
    checksum: str
    file_bytes: int
    float_bytes: int
    results: Results
    images: CalibrationSet | None
    measured: Measured | None
    versions: dict[str, str]
    missing: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the folder, for people."""
        return self.folder.resolve().name


def account(
    folder: Path | str,
    *,
    results: Mapping[str, Path | str | None] | None = None,
    calibration: Path | str | None = None,
    checkpoint: Path | str | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Account:
    """Read what lies in `folder`, and measure where it loses precision on the images it was calibrated on.

    results: files with what was measured before, see `read_results`; calibration: the folder of the images, if it is
    not the one in `folder`; checkpoint: the original weights, if they are not where they were.

    Raises DfqError where there is no quantized model, or something that was asked for cannot be had.
    """
    folder = Path(folder)
    quantized = load(folder, device=device)
    origin = quantized.origin
    # By what stands here `load` has just checked the weights.
    description = read_description(folder)
    checksum = str(description["sha256"])
    missing: list[str] = []
    images = None
    if calibration is not None or (folder / _CALIBRATION).is_dir():
        images = load_calibration_set(calibration or folder / _CALIBRATION)
        if images.run != quantized.calibration.get("run"):
            missing.append("The images shown and measured on are not those that it was calibrated on.")
        images = images.first(MOST_IMAGES)
    else:
        missing.append("The images it was calibrated on are not in its folder: --calibration DIR says where they are.")
    original = None
    if images is not None:
        try:
            original = load_original(origin, quantized.preprocessing, checkpoint=checkpoint, device=device)
        except DfqError as error:
            if checkpoint is not None:
                raise
            missing.append(f"It is not compared with full precision layer by layer: {error}.")
    versions = description.get("versions")
    network = without_weights(origin.architecture, origin.arguments)
    return Account(
        folder=folder,
        quantized=quantized,
        checksum=checksum,
        file_bytes=sum((folder / name).stat().st_size for name in (CONFIG, WEIGHTS)),
        float_bytes=sum(4 * parameter.numel() for parameter in network.parameters()),
        results=read_results(folder, quantized, checksum, results or {}),
        images=images,
        measured=None if images is None else measure(quantized, images, original, progress=progress),
        versions={str(name): str(number) for name, number in versions.items()} if isinstance(versions, dict) else {},
        missing=tuple(missing),
    )
