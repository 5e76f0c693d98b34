"""Runs of `quantize` that can be stopped: what is done, kept in one file until all of it is."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from calibration import CalibrationSet
from calibration.files import make_directory, remove_file, replace_file
from calibration.passes import resolve_precision
from dfq.checkpoint import describe_sites, restore
from dfq.errors import DfqError
from dfq.models import Model
from dfq.ptq.engine import QuantizedModel
from dfq.ptq.stages import stages
from dfq.versions import versions
from dfq.weights import fingerprint

FORMAT = "dfq.unfinished_model"
UNFINISHED = "stages.partial"
"""What the file is called in a folder that a quantized model is to be saved in."""

log = logging.getLogger("dfq")


@dataclass(frozen=True)
class Reached:
    """How far a run has come.

    stages: how many are done; full, quantized: what enters the next one, batch by batch, in full precision and as the
    quantized stages give it; the latter is kept only where stages are tuned.
    """

    stages: int
    full: list[Tensor]
    quantized: list[Tensor]


class ResumeFile:
    """Where finished stages are kept, with what the others need of them.

    It is replaced as a whole after every stage: a run that is killed leaves those before it. Raises DfqError where
    something else lies at `path`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._run: dict[str, Any] = {}
        make_directory(path.parent)
        self._header = _read_header(path)
        # What runs left that were killed while they wrote it.
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            remove_file(left)

    def take_up(
        self, quantized: QuantizedModel, model: Model, images: CalibrationSet, batch_size: int
    ) -> Reached | None:
        """Give `quantized`, of which nothing is quantized yet, the stages that lie there; None where there are none.

        Those of another run (model, images, batch_size, the recipe and bits of `quantized`, ...) are not taken up; a
        warning says so. Raises DfqError where the file is damaged.
        """
        # As it is read back: JSON knows lists, not tuples.
        self._run = json.loads(json.dumps(_describe_run(quantized, model, images, batch_size)))
        if self._header is None:
            return None
        try:
            kept = self._header["run"]
            differing = [key for key in self._run if kept.get(key) != self._run[key]]
            if differing:
                log.warning(
                    "%s is of another run (it differs in %s): starting afresh", self._path, ", ".join(differing)
                )
                return None
            tensors = load_file(self._path, device=str(quantized.device))
            described, part = self._header["sites"], _below("model", tensors)
            quantized.sites = restore(quantized.module, described, part, strict=False)
            # Copied: they lie in the file itself, at any address, and sums of the same values depend on that.
            full, entering = ([b.clone() for b in _below(name, tensors).values()] for name in ("full", "quantized"))
            reached = Reached(self._header["stages"], full, entering)
            if type(reached.stages) is not int or not 1 <= reached.stages <= len(stages(quantized.module)):
                raise ValueError(f"{reached.stages!r} stages are done")
        # The file may hold anything, and what PyTorch raises for it shares no base class but Exception.
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DfqError(f"{self._path} is damaged ({reason}): delete it, and every stage is done again") from error
        log.info("going on after %d of %d stages, from %s", reached.stages, len(stages(quantized.module)), self._path)
        return reached

    def keep(self, quantized: QuantizedModel, done: int, full: Sequence[Tensor], entering: Sequence[Tensor]) -> None:
        """Replace what lies there by the first `done` stages of `quantized`; full, entering: see `Reached`."""
        finished = stages(quantized.module)[:done]
        tensors = {
            f"model.{name}": tensor
            for name, tensor in quantized.tensors().items()
            if any(stage.owns(name) for stage in finished)
        }
        for part, batches in (("full", full), ("quantized", entering)):
            tensors |= {f"{part}.{index:05d}": batch for index, batch in enumerate(batches)}
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        header = json.dumps({"run": self._run, "stages": done, "sites": describe_sites(quantized)})

        def write(partial: Path) -> None:
            try:
                save_file(content, partial, {FORMAT: header})
            except SafetensorError as error:
                # Of a full disk, too.
                raise OSError(str(error)) from error

        replace_file(self._path, write)


def _read_header(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        if not path.is_file():
            raise OSError("it is not a file")
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(FORMAT, "null"))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise DfqError(f"{path} is damaged, or of something else ({error}): delete it or name another file") from error
    if not isinstance(header, dict):
        raise DfqError(f"{path} is not of an unfinished run, and would be replaced: name another file to resume from")
    return header


def _below(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is called `part.` and more, by the rest of the name and in its order."""
    return {name.partition(".")[2]: tensors[name] for name in sorted(tensors) if name.startswith(f"{part}.")}


def _describe_run(quantized: QuantizedModel, model: Model, images: CalibrationSet, batch_size: int) -> dict[str, Any]:
    """Everything the outcome depends on, but for the make of the hardware."""
    pixels = hashlib.sha256()
    for tensor in (images.images, images.mask):
        pixels.update(tensor.contiguous().numpy().tobytes())
    return {
        "bits": quantized.bits,
        "recipe": quantized.recipe.to_dict(),
        "model": model.origin.to_dict() | {"fingerprint": fingerprint(model.module)},
        "calibration images": {"sha256": pixels.hexdigest(), "mean": images.mean, "std": images.std},
        "batch size": batch_size,
        "device": {"type": model.device.type, "precision": str(resolve_precision("auto", model.device))},
        "versions": versions(),
    }
