"""Sudden death: a run that is killed again and again leaves the files of one that is not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def tool(load_tool: Callable[[str], ModuleType]) -> Any:
    load_tool("accuracy_table")
    return load_tool("survive_kills")


def call(tool: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["survive_kills.py", *map(str, arguments)])
    tool.main()


def test_killed_at_random_moments(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "kills.jsonl"
    command = "generate reference --method smi -n 6 --batch-size 1 --iterations 40"
    call(tool, monkeypatch, "--kills", 2, "--command", command, "--results", results)
    line = json.loads(results.read_text())
    assert line["kills"] >= 2
    # Six batches, a manifest and a preview.
    assert line["files"] == 8
    assert line["seconds_undisturbed"] > 0


def test_a_difference_is_told(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        """One that writes other bytes each time."""

        def __init__(self, out: Path) -> None:
            out.mkdir()
            (out / "a.txt").write_text(str(out))

        def killed_after(self, *_: object) -> bool:
            return False

        def wait_for_success(self) -> None:
            pass

    monkeypatch.setattr(tool, "run", lambda _arguments, _processes, out: Run(out))
    with pytest.raises(SystemExit, match=r"after 0 kills these differ from the undisturbed run: a\.txt"):
        call(tool, monkeypatch, "--kills", 1)


def test_a_command_that_fails(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"the command failed:\n.*dfq: error: .*no_such_model"):
        call(tool, monkeypatch, "--command", "generate no_such_model")
