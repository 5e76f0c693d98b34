"""The folder that a transfer leaves behind."""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_bytes

from calibration import METHODS
from calibration.calibration_set import remove_set
from calibration.files import (
    read_json,
    read_text,
    remove_file,
    replace_file,
    sha256_of,
    take_folder,
    write_json,
)
from calibration.team import team
from dfq.checkpoint import load, save
from dfq.errors import DfqError
from dfq.models import Model
from dfq.ptq.engine import QuantizedModel
from dfq.transfer.curve import write_curve
from dfq.transfer.record import LOG, STATE, StateFile, rounds_of, write_log
from dfq.transfer.result import Distillation
from dfq.transfer.sources import FURTHER
from dfq.versions import versions
from dfq.weights import load_into, read_weights

FORMAT = "dfq.distillation"
VERSION = 1
MANIFEST = "distillation.json"
WEIGHTS = "student.safetensors"
QUANTIZED = "student"
POOL = "pool"
CURVE = "curve.svg"


class TransferFolder:
    """What a transfer leaves behind, and whose it is.

    held: no other run writes to the folder until it closes. Another run that lies there is deleted by `begin`.
    """

    def __init__(self, path: Path, run: dict[str, Any], held: ExitStack, *, overwrite: bool) -> None:
        self.path = path
        # As it will be read back: JSON knows lists, not tuples.
        self._run = json.loads(json.dumps(run))
        self.state = StateFile(path / STATE, self._run)
        self._replaces = False
        self._manifest = team().lead(lambda: self._claim(held, overwrite))

    def _claim(self, held: ExitStack, overwrite: bool) -> dict[str, Any]:
        self._lock = take_folder(self.path)
        held.callback(self._lock.release)
        path = self.path / MANIFEST
        fresh = {"format": FORMAT, "version": VERSION, "complete": False, "run": self._run, "versions": versions()}
        if path.exists():
            manifest = read_json(path)
            if manifest.get("format") != FORMAT:
                raise DfqError(f"{path} does not describe a transfer; choose another --out")
            if (manifest.get("version"), manifest.get("run")) == (VERSION, self._run):
                return manifest
            if not overwrite:
                other = manifest.get("run")
                other = other if isinstance(other, dict) else {}
                differing = [key for key in self._run if other.get(key) != self._run[key]]
                raise DfqError(
                    f"{self.path} holds a transfer of another run (it differs in {', '.join(differing) or 'version'}); "
                    "choose another --out or give --overwrite"
                )
            self._replaces = True
            return fresh
        if any(self.path.iterdir()):
            raise DfqError(f"{self.path} is not empty and holds no transfer; choose another --out")
        write_json(path, fresh)
        return fresh

    def begin(self, kept: Collection[str]) -> None:
        """Delete another run that is to be replaced; what can be refused has been. kept: pools that are this run's.

        Raises DfqError where something cannot be deleted.
        """
        if not self._replaces:
            return
        for name in (STATE, WEIGHTS, LOG, CURVE):
            remove_file(self.path / name)
        pools = self.path / POOL
        for pool in (pools, *(pools / name for name in METHODS), *(pools / (FURTHER + name) for name in METHODS)):
            if pool.name not in kept and pool.is_dir():
                remove_set(pool)
                with suppress(OSError):
                    pool.rmdir()
        write_json(self.path / MANIFEST, self._manifest)

    def finished(self, student: Model | QuantizedModel) -> Distillation | None:
        """What lies there, the weights given to `student`; None where it is not finished."""
        if not self._manifest.get("complete"):
            return None
        try:
            rounds = tuple(rounds_of(json.loads(line) for line in read_text(self.path / LOG).splitlines()))
            if not rounds:
                raise ValueError("no rounds")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise DfqError(f"{self.path / LOG} is damaged ({error}): give --overwrite to make it again") from error
        teacher, top1 = self._manifest.get("teacher"), self._manifest.get("teacher_top1")
        if not isinstance(teacher, str) or not isinstance(top1, int | float | None):
            raise DfqError(f"{self.path / MANIFEST} is damaged (of the teacher): give --overwrite to make it again")
        if isinstance(student, QuantizedModel):
            vars(student).update(vars(load(self.path / QUANTIZED, device=student.device)))
        else:
            weights = self.path / WEIGHTS
            if not weights.is_file() or sha256_of(weights) != self._manifest.get("sha256"):
                raise DfqError(f"{weights} is missing or damaged: give --overwrite to make it again")
            load_into(student.module, read_weights(weights), student.name, weights)
        return Distillation(student, teacher, rounds, top1)

    def finish(self, result: Distillation) -> None:
        """Write the student, the log and the curve; the manifest comes last."""
        checksum = None
        if isinstance(result.student, QuantizedModel):
            save(result.student, self.path / QUANTIZED)
        else:
            state = result.student.module.state_dict()
            content = to_bytes({name: t.detach().cpu().contiguous() for name, t in state.items()}, {"format": "pt"})
            replace_file(self.path / WEIGHTS, lambda partial: partial.write_bytes(content))
            checksum = sha256_of(self.path / WEIGHTS)
        write_log(result.rounds, self.path / LOG)
        write_curve(
            result.rounds, f"{result.student.name}, taught by {result.teacher}", result.teacher_top1, self.path / CURVE
        )
        self._manifest |= {
            "complete": True,
            "teacher": result.teacher,
            "teacher_top1": result.teacher_top1,
            "sha256": checksum,
        }
        write_json(self.path / MANIFEST, self._manifest)
        self.state.remove()
