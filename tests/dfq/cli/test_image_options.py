"""Options of the `dfq` command that say how calibration images are made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dfq
from calibration import METHODS
from calibration.calibration_set import CalibrationSet
from calibration.methods import DEFAULT_METHOD

DEFAULT = METHODS[DEFAULT_METHOD]
AUTO = {"iterations": DEFAULT.settings.iterations, "enough": DEFAULT.settings.enough}
Files = dict[str, bytes]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), AUTO),
        (("--method", "smi"), {"schedule": {"name": "progressive_stop", "stops": "in proportion"}}),
        (("--iterations", "auto"), AUTO),
        (("--iterations", 70), {"iterations": 70, "enough": None}),
        (("--schedule", "dense"), {"schedule": {"name": "dense"}}),
        (("--schedule", "pri"), {"schedule": {"name": "rebirth", "division": 4}}),
        (("--schedule", "pri", "--division", 7), {"schedule": {"division": 7}}),
        (("--method", "pri", "--division", 2), {"schedule": {"name": "rebirth", "division": 2}}),
        (("--method", "smi", "--stop-at", 5, 10, "--stop-ratio", 0.5), {"schedule": {"stops": [5, 10], "ratio": 0.5}}),
        (("--schedule", "smi", "--stop-ratio", 0.5), {"schedule": {"stops": "in proportion", "ratio": 0.5}}),
        (("--method", "dense", "--schedule", "smi", "--stop-at", 0), {"schedule": {"stops": [0], "ratio": 0.3}}),
        (("--method", "apa-smi", "--stop-at", 9), {"soft_labels": True, "schedule": {"stops": [9]}}),
        (("--method", "smi", "--learning-rate", 0.05), {"optimiser": {"learning_rate": 0.05, "betas": [0.5, 0.99]}}),
    ],
)
@pytest.mark.parametrize("command", ["generate", "quantize"])
def test_how_images_are_made(
    status: Callable[..., int],
    command: str,
    options: tuple[object, ...],
    expected: dict[str, Any],
    noise: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the options say, as the run describes itself; what they do not say is left as the method has it."""
    runs: list[dict[str, Any]] = []

    def generate(*_: object, run: dict[str, Any], **__: object) -> list[CalibrationSet]:
        runs.append(run)
        return [noise]

    monkeypatch.setattr("calibration.generate", generate)
    if command == "quantize":
        options += ("--recipe", "paper")
    assert status(command, "reference", *options, "--device", "cpu", "--out", tmp_path / "out", "--quiet") == 0
    (run,) = runs
    for name, value in expected.items():
        found = run["inversion"][name]
        assert (found | value if isinstance(value, dict) else value) == found, name


@pytest.mark.parametrize("initial", ["noise", "pink", "leaves"])
def test_where_inversion_starts(status: Callable[..., int], initial: str, tmp_path: Path) -> None:
    command = ("generate", "reference", "-n", 2, "--iterations", 1, "--device", "cpu", "--quiet", "--out", tmp_path)
    assert status(*command, "--init", initial) == 0
    assert dfq.load_calibration_set(tmp_path).run["initial"] == initial


def test_sparse_images_of_a_canvas_and_their_trace(
    status: Callable[..., int], files_below: Callable[[Path], Files], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    command = ("generate", "reference", "-n", 6, "-b", 1, "--iterations", 8, "--device", "cpu", "--out", out)
    command += ("--schedule", "pri", "--trace")
    assert status(*command) == 0
    said = capsys.readouterr()
    assert said.out.startswith("6 images, mean confidence ")
    assert ", 16 of 64 patches each\n" in said.out
    assert "trace.png how they came about" in said.out
    assert (out / "trace.png").is_file()
    made = dfq.load_calibration_set(out)
    assert made.iterations is not None
    assert made.iterations.tolist() == [2, 4, 6, 8, 2, 4]
    # Killed after its first batch, and run again.
    before = files_below(out)
    manifest = json.loads(before["manifest.json"])
    (out / "shard-00001.safetensors").unlink()
    (out / "manifest.json").write_text(json.dumps(manifest | {"complete": False, "shards": []}))
    assert status(*command) == 0
    assert files_below(out) == before


def test_another_way_to_make_images_is_another_run(
    status: Callable[..., int], refused: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("generate", "reference", "--method", "smi", "-n", 1, "--iterations", 4, "--device", "cpu", "--quiet")
    command = (*command, "--out", tmp_path)
    assert status(*command, "--trace") == 0
    for changes in (
        ("--init", "pink"),
        ("--schedule", "dense"),
        ("--stop-at", 2),
        ("--stop-ratio", 0.4),
        ("--learning-rate", 0.2),
        ("--iterations", "auto"),
    ):
        refused((*command, *changes), 1, "holds a calibration set of another run", tmp_path)
    assert status(*command, "--init", "pink", "--overwrite") == 0
    assert "trace.png" not in capsys.readouterr().out
    assert dfq.load_calibration_set(tmp_path).run["initial"] == "pink"


@pytest.mark.parametrize("command", ["generate", "quantize"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--method", "smi", "--stop-at", 5, 3),
            "the iterations at which patches stop must ascend from 0 or later, not (5, 3)",
        ),
        (("--method", "smi", "--stop-at", 5, 5), "must ascend from 0 or later, not (5, 5)"),
        (("--schedule", "smi", "--stop-ratio", 1), "the ratio of patches that stop must lie in [0, 1), not 1.0"),
        (("--schedule", "smi", "--stop-ratio", -0.1), "the ratio of patches that stop must lie in [0, 1), not -0.1"),
        (("--learning-rate", 0), "the learning rate must be positive, not 0.0"),
        (("--learning-rate", -1), "the learning rate must be positive, not -1.0"),
        (("--schedule", "dense", "--stop-at", 5), "--stop-at and --stop-ratio belong to --schedule smi"),
        (("--method", "pri", "--stop-ratio", 0.5), "--stop-at and --stop-ratio belong to --schedule smi"),
        (("--division", 3), "--division belongs to --schedule pri"),
        (("--method", "pri", "--schedule", "smi", "--division", 3), "--division belongs to --schedule pri"),
        (("--schedule", "pri", "--division", 8, "--iterations", 7), "7 iterations cannot be divided into 8 parts"),
        (("--method", "gaussian", "--init", "pink"), "gaussian inverts nothing: "),
        (("--method", "pink", "--schedule", "smi"), "pink inverts nothing: "),
        (("--method", "leaves", "--learning-rate", 1), "leaves inverts nothing: "),
    ],
)
def test_ways_to_make_images_that_exclude_each_other(
    refused: Callable[..., None],
    command: str,
    options: tuple[object, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_model(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(dfq, "load_model", load_model, raising=False)
    refused((command, "reference", *options, "--out", tmp_path / "out"), 2, said)
    assert not (tmp_path / "out").exists()


def test_more_images_of_a_canvas_than_the_model_has_patches(refused: Callable[..., None], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("generate", "reference", "--schedule", "pri", "--division", 65, "--device", "cpu", "--out", out)
    refused(command, 1, "64 patches cannot be divided into 65 images", out)
    assert not out.exists()
