"""Commands in several processes: the same files and the same counts as in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from calibration.files import sha256_of

PROGRAM = """
import os, sys
import torch
from calibration.team import joined
from dfq.cli import main
from dfq.transfer import teaching

# In bf16, which is taken where the processor has it, another order of summing moves gradients by more than could be
# told from a mistake.
teaching.resolve_precision = lambda *_: torch.float32
os.chdir(sys.argv[1])
teach = "distill reference reference --student-random-weights --method leaves -n 6 --rounds 2 --steps 4 "
commands = [
    "generate reference --method smi -n 11 --batch-size 2 --iterations 4 --seed 3 -o set",
    "quantize reference --recipe paper --bits w4a8 -n 4 --batch-size 2 --iterations 2 -o quantized",
    "evaluate quantized --baseline --batch-size 16 --limit 100 --json result.json",
    teach + "--windows 1 -o linear",
    teach + "--train full -o full",
    "generate reference --method smi -n 12 --batch-size 2 --iterations 4 --seed 3 -o set",
]
with joined() as team:
    for command in commands:
        print(main([*command.split(), "--device", "cpu"]))
        # The next one wants what the first process has left.
        team.wait()
"""


def run(where: Path, launcher: list[str]) -> subprocess.CompletedProcess[str]:
    where.mkdir()
    program = where / "program.py"
    program.write_text(PROGRAM)
    return subprocess.run(
        [sys.executable, *launcher, str(program), str(where)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    where = tmp_path_factory.mktemp("team") / "alone"
    return where, run(where, [])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    where = tmp_path_factory.mktemp("team") / "shared"
    return where, run(where, ["-m", "torch.distributed.run", "--nproc-per-node", "2"])


Done = tuple[Path, subprocess.CompletedProcess[str]]


def sums(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in folder.rglob("*.*")}


def without_speed(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    assert result.pop("images_per_second") > 0
    return result  # type: ignore[no-any-return]


@pytest.mark.parametrize("folder", ["set", "quantized"])
def test_the_same_files(alone: Done, shared: Done, folder: str) -> None:
    one, many = sums(alone[0] / folder), sums(shared[0] / folder)
    assert one == many
    assert len(one) >= 4


def test_the_same_counts(alone: Done, shared: Done) -> None:
    one, many = without_speed(alone[0] / "result.json"), without_speed(shared[0] / "result.json")
    assert one == many
    assert one["num_images"] == 100


def test_the_same_classifier_and_nearly_the_same_student(alone: Done, shared: Done) -> None:
    for name in ("linear", "full"):
        one, many = (load_file(where / name / "student.safetensors") for where, _ in (alone, shared))
        assert sums(alone[0] / name / "pool") == sums(shared[0] / name / "pool")
        for key, weights in one.items():
            if name == "linear":
                assert torch.equal(weights, many[key])
            else:
                # Gradients are added in another order.
                torch.testing.assert_close(weights, many[key], rtol=1e-4, atol=1e-5)
    logs = [(where / "full" / "log.jsonl").read_text().splitlines() for where, _ in (alone, shared)]
    for ours, theirs in zip(*logs, strict=True):
        assert json.loads(ours)["divergence"] == pytest.approx(json.loads(theirs)["divergence"], rel=1e-4)


def test_one_speaks_for_all(alone: Done, shared: Done) -> None:
    # The last command asks for other images in a folder that is taken.
    for _, done in (alone, shared):
        assert done.stdout.count("kept in set; ") == 1
        assert done.stdout.count("drop") == 1
        assert done.stderr.count("dfq: error: set holds a calibration set of another run") == 1
    assert alone[1].stdout.splitlines()[-1] == "1"
    assert alone[1].returncode == shared[1].returncode == 0
