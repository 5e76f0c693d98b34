"""What a transfer leaves while it runs and when it is done: state, log and curve."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from calibration.files import replace_file
from dfq.errors import DfqError
from dfq.transfer.training import Trainee

FORMAT = "dfq.unfinished_student"
STATE = "student.partial"
LOG = "log.jsonl"
_MOST = 1e15


@dataclass(frozen=True)
class Round:
    """What one round came to.

    images: of the pool, those held out included; divergence: mean of the steps, see `training.divergence`; agreement:
    percent of the held-out images on which student and teacher name the same class, None where none are held out;
    top1: percent of labelled images that the student gets right, None where it was not measured; seconds: of making
    images, and of training on them.
    """

    round: int
    images: int
    divergence: float
    agreement: float | None
    top1: float | None
    generating_seconds: float
    training_seconds: float


def rounds_of(entries: Any) -> list[Round]:
    """What `asdict` gave of each, by way of JSON. Raises TypeError or ValueError where it is something else."""
    rounds = [Round(**entry) for entry in entries]
    for entry in rounds:
        for key, value in asdict(entry).items():
            missing = value is None and key in ("agreement", "top1")
            if not missing and (type(value) not in (int, float) or not abs(value) <= _MOST):
                raise ValueError(f"{key} of a round cannot be {reprlib.repr(value)}")
    return rounds


class StateFile:
    """The student and its optimizer after the last finished round, replaced as a whole after each.

    run: everything the outcome depends on. Raises DfqError where something else lies there.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self._path = path
        # As it is read back: JSON knows lists, not tuples.
        self._run = json.loads(json.dumps(run))

    def take_up(self, trainee: Trainee, optimizer: torch.optim.Optimizer) -> list[Round]:
        """Give both what lies there, and return the rounds it took; none where there is nothing."""
        if not self._path.exists():
            return []
        try:
            if not self._path.is_file():
                raise ValueError("it is not a file")
            with safe_open(self._path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[FORMAT])
            tensors = load_file(self._path)
            if header["run"] != self._run:
                raise DfqError(f"{self._path} is of another run; choose another --out or give --overwrite")
            rounds = rounds_of(header["rounds"])
            state = optimizer.state_dict()
            shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
            own: dict[int, dict[str, Any]] = {}
            for name, tensor in tensors.items():
                part, _, rest = name.partition(".")
                if part == "optimizer":
                    number, _, key = rest.partition(".")
                    if tensor.shape not in (shapes[int(number)], ()) or not tensor.is_floating_point():
                        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {tensor.dtype}")
                    own.setdefault(int(number), {})[key] = tensor.clone()
            for name, kept in trainee.kept.items():
                found = tensors[f"student.{name}"]
                if (found.shape, found.dtype) != (kept.shape, kept.dtype):
                    raise ValueError(f"{name} has shape {tuple(found.shape)}, {found.dtype}")
            optimizer.load_state_dict({**state, "state": own})
            with torch.no_grad():
                for name, kept in trainee.kept.items():
                    kept.copy_(tensors[f"student.{name}"])
            return rounds
        except DfqError:
            raise
        # The file may hold anything, and what PyTorch raises for it shares no base class but Exception.
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DfqError(f"{self._path} is damaged ({reason}): delete it, and the student is trained anew") from error

    def keep(self, trainee: Trainee, optimizer: torch.optim.Optimizer, rounds: list[Round]) -> None:
        """Replace what lies there by this."""
        tensors = {f"student.{name}": kept for name, kept in trainee.kept.items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{key}": value for key, value in state.items() if value is not None}
        header = json.dumps({"run": self._run, "rounds": [asdict(entry) for entry in rounds]})
        content = to_bytes({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, {FORMAT: header})
        replace_file(self._path, lambda partial: partial.write_bytes(content))

    def remove(self) -> None:
        """Delete it: the student is finished."""
        self._path.unlink(missing_ok=True)


def write_log(rounds: Sequence[Round], path: Path) -> None:
    """One line of JSON per round."""
    text = "".join(json.dumps(asdict(entry)) + "\n" for entry in rounds)
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))
