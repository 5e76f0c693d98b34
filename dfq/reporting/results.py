"""What was measured of a quantized model and kept in files: its accuracy, its speed, what each site costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from calibration.files import read_json, write_json
from dfq.checkpoint import read_description
from dfq.errors import DfqError
from dfq.evaluation import Evaluation
from dfq.ptq.engine import QuantizedModel
from dfq.ptq.sensitivity import Sensitivity

NAMES = {"evaluation": "evaluation.json", "bench": "bench.json", "sensitivity": "sensitivity.json"}
"""What the files are called that are looked for beside a model."""

WEIGHTS_CHECKSUM = "weights_sha256"
"""The key under which `write_evaluation` notes of which weights it speaks."""


@dataclass(frozen=True)
class Speed:
    """A model in a runtime: see `dfq.benchmark.Row`. over_fp32: images per second over those of fp32 there."""

    runtime: str
    bits: str
    size: int
    latency_ms: float
    images_per_second: float
    latency_over_fp32: float
    over_fp32: float


@dataclass(frozen=True)
class Speeds:
    """What `dfq bench --json` wrote."""

    model: str
    bits: str
    threads: int
    cpu: str
    rows: tuple[Speed, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Speeds:
        """Raises KeyError, TypeError or ValueError for anything else."""
        rows = tuple(
            Speed(
                str(row["runtime"]),
                str(row["bits"]),
                int(row["size"]),
                float(row["latency_ms"]),
                float(row["images_per_second"]),
                float(row["speedup_over_fp32"]["latency"]),
                float(row["speedup_over_fp32"]["throughput"]),
            )
            for row in content["rows"]
        )
        return cls(
            model=str(content["model"]),
            bits=str(content["bits"]),
            threads=int(content["threads"]),
            cpu=str(content["machine"]["cpu"]),
            rows=rows,
            notes=tuple(str(note) for note in content["notes"]),
            versions={str(name): str(number) for name, number in content["versions"].items()},
        )

    @property
    def best(self) -> Speed | None:
        """Of the quantized model: the runtime in which it gives the most images per second."""
        own = [row for row in self.rows if row.bits == self.bits]
        return max(own, key=lambda row: row.images_per_second, default=None)


T = TypeVar("T")
R = TypeVar("R", Evaluation, Speeds)


@dataclass(frozen=True)
class Results:
    """What there is; left_out: why a file that lies beside the model is not among it, a sentence each."""

    evaluation: Evaluation | None = None
    bench: Speeds | None = None
    sensitivity: Sensitivity | None = None
    left_out: tuple[str, ...] = ()


def write_evaluation(found: Evaluation, path: Path, folder: Path | None = None) -> None:
    """Write what `dfq evaluate --json` does; folder: of the quantized model, if it lies in one.

    Raises DfqError where it cannot be written.
    """
    noted = {} if folder is None else {WEIGHTS_CHECKSUM: read_description(folder)["sha256"]}
    write_json(path, found.to_dict(classes=True) | noted)


def read_results(
    folder: Path, quantized: QuantizedModel, checksum: str, given: Mapping[str, Path | str | None]
) -> Results:
    """The results of the model in `folder`: from the files `given` by the keys of `NAMES`, else from those beside it.

    checksum: of its weights. Raises DfqError for a file that holds something else; where a file was not given but
    found, for one that speaks of another model, there is only a sentence in `left_out`.
    """
    readers: dict[str, Callable[[Path], Any]] = {
        "evaluation": lambda path: _evaluation(path, quantized, checksum),
        "bench": lambda path: _own(path, _parsed(path, "bench", Speeds.from_dict), quantized),
        "sensitivity": lambda path: _of_network(path, _parsed(path, "sensitivity", Sensitivity.from_dict), quantized),
    }
    found: dict[str, Any] = {}
    left_out: list[str] = []
    for kind, read in readers.items():
        chosen = given.get(kind)
        path = folder / NAMES[kind] if chosen is None else Path(chosen)
        if chosen is None and not path.exists():
            continue
        try:
            found[kind] = read(path)
        except _OtherModelError as error:
            if chosen is not None:
                raise
            left_out.append(str(error))
    return Results(**found, left_out=tuple(left_out))


class _OtherModelError(DfqError):
    """A result of another model than the one that is reported."""


def _parsed(path: Path, command: str, parse: Callable[[Mapping[str, Any]], T]) -> T:
    content = read_json(path)
    try:
        _check_finite(content)
        return parse(content)
    # AttributeError: a list or a number where a table should be.
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DfqError(f"{path} is not what `dfq {command} --json` writes ({type(error).__name__}: {error})") from error


def _check_finite(value: Any) -> None:
    """Raise ValueError for what JSON has no word for, though Python reads it."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"it holds {value}")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_finite(part)


def _evaluation(path: Path, quantized: QuantizedModel, checksum: str) -> Evaluation:
    def parse(content: Mapping[str, Any]) -> tuple[Evaluation, Any]:
        return Evaluation.from_dict(content), content.get(WEIGHTS_CHECKSUM)

    evaluation, noted = _parsed(path, "evaluate", parse)
    found = _own(path, evaluation, quantized)
    if noted not in (None, checksum):
        raise _OtherModelError(f"{path} is of other weights: quantized anew since; evaluate it again")
    return found


def _own(path: Path, found: R, quantized: QuantizedModel) -> R:
    if (found.model, found.bits) != (quantized.name, quantized.bits):
        raise _OtherModelError(
            f"{path} is of {found.model} at {found.bits}, and the model here is {quantized.name} at {quantized.bits}"
        )
    return found


def _of_network(path: Path, found: Sensitivity, quantized: QuantizedModel) -> Sensitivity:
    if found.model != quantized.name:
        raise _OtherModelError(f"{path} is of {found.model}, and the model here is {quantized.name}")
    return found
