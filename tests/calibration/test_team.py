"""Processes that share the work: what each gets, and what happens when the first one fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from calibration.errors import DfqError
from calibration.team import ALONE, Team, joined, team

PROGRAM = """
import json, sys
from pathlib import Path

import torch

from calibration.errors import DfqError
from calibration.team import LeaderError, joined, team

with joined() as us:
    assert team() == us
    found = {"rank": us.rank, "size": us.size, "leads": us.leads, "part": list(us.part_of(5))}
    found["gathered"] = us.gather({"of": us.rank})
    us.wait()
    found["led"] = us.lead(lambda: f"said by {us.rank}")

    def fail():
        raise DfqError("there is no such folder")

    try:
        us.lead(fail)
    except DfqError as error:
        found["failed"] = [str(error), isinstance(error, LeaderError)]
    tensors = [torch.full((2, 2), float(us.rank + 1)), torch.tensor([0.1 * us.rank])]
    us.add(tensors)
    found["added"] = [tensor.tolist() for tensor in tensors]
    count = torch.tensor(7 + us.rank)
    us.follow([count])
    found["followed"] = int(count)
    Path(sys.argv[1], f"{us.rank}.json").write_text(json.dumps(found))
assert team().size == 1
"""


def launch(processes: int, program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """As `torchrun` does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), str(program)]
    return subprocess.run(
        [*command, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_what_each_process_gets(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = launch(3, program, tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [(each["rank"], each["size"], each["leads"]) for each in found] == [
        (0, 3, True),
        (1, 3, False),
        (2, 3, False),
    ]
    assert [each["part"] for each in found] == [[0, 3], [1, 4], [2]]
    for each in found:
        assert each["gathered"] == [{"of": 0}, {"of": 1}, {"of": 2}]
        assert each["led"] == "said by 0"
        assert each["failed"] == ["there is no such folder", each["rank"] > 0]
        assert each["added"][0] == [[6.0, 6.0], [6.0, 6.0]]
        assert each["added"] == found[0]["added"]
        assert each["added"][1][0] == pytest.approx(0.3)
        assert each["followed"] == 7


def test_alone() -> None:
    assert team() is ALONE
    with joined() as us:
        assert us is ALONE
    assert list(us.part_of(3)) == [0, 1, 2]
    assert us.gather("x") == ["x"]
    assert us.lead(lambda: 3) == 3
    value = torch.tensor([1.5])
    us.add([value])
    us.follow([value])
    assert value.item() == 1.5

    def fail() -> None:
        raise DfqError("no")

    with pytest.raises(DfqError, match=r"^no$"):
        us.lead(fail)


def test_every_thing_is_somebodys() -> None:
    for size in (1, 2, 3, 5):
        parts = [list(Team(rank, size).part_of(7)) for rank in range(size)]
        assert sorted(index for part in parts for index in part) == list(range(7))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_others_that_cannot_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(DfqError, match=r"^cannot reach the other processes \(.*\); start them all by torchrun$"),
        joined(),
    ):
        pass
