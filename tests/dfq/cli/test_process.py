"""The `dfq` command as a process: what it prints, how it ends."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

import dfq

NOISE = ("--method", "gaussian", "-n", "8", "--device", "cpu")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Buffered, as at a user's: then a reader that goes away shows only when the program ends.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False, env=environment
    )


def test_errors_of_the_program_are_one_line_unless_debugged(
    status: Callable[..., int], refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_args: object, **_kwargs: object) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr(dfq, "load_model", broken, raising=False)
    command = ("generate", "reference", "--out", tmp_path / "out")
    refused(command, 1, "unexpected ZeroDivisionError: first line; --debug shows where")
    with pytest.raises(ZeroDivisionError):
        status(*command, "--debug")


def test_interrupted(
    status: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dfq, "load_model", interrupt, raising=False)
    assert status("generate", "reference", "--out", tmp_path / "out") == 130
    assert capsys.readouterr().err == "dfq: interrupted; the same command goes on where it stopped\n"
    assert status("evaluate", "reference") == 130
    assert capsys.readouterr().err == "dfq: interrupted\n"


def test_repeated_calls_say_everything_once_and_leave_logging_alone(
    status: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, root = logging.getLogger("dfq"), logging.getLogger()
    before = (own.level, list(own.handlers), list(root.handlers), list(warnings.filters))
    for index in range(3):
        assert status("generate", "reference", *NOISE, "--out", tmp_path / str(index)) == 0
        said = capsys.readouterr()
        assert said.err.count("reference: 32x32") == 1
        assert status("generate", "reference", *NOISE, "--quiet", "--out", tmp_path / f"quiet {index}") == 0
        assert capsys.readouterr().err == ""
    assert (own.level, list(own.handlers), list(root.handlers), list(warnings.filters)) == before


def test_what_other_libraries_say_to_developers_is_not_shown(
    status: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model

    def talkative(*args: object, **kwargs: object) -> torch.nn.Module:
        warnings.warn("this will change in the next version", FutureWarning, stacklevel=2)
        logging.getLogger("timm.models").warning("no pretrained configuration specified")
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", talkative)
    # As in a process of its own, where nothing else listens.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    arguments = ("vit_tiny_patch16_224", "--random-weights", "--image-size", 32, *NOISE, "--out", tmp_path / "out")
    assert status("generate", *arguments) == 0
    said = capsys.readouterr()
    assert "next version" not in said.err
    assert "no pretrained configuration" not in said.err
    assert "vit_tiny_patch16_224: 32x32" in said.err


def test_version() -> None:
    done = python("-m", "dfq", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"dfq {dfq.__version__}\n", "")


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys\nfrom dfq.cli import main\ntry:\n    main(['quantize', '--help'])\n"
        "finally:\n    print('torch' in sys.modules, 'timm' in sys.modules)"
    )
    done = python("-c", program)
    assert done.stdout.startswith("usage: dfq quantize ")
    assert "example:\n  dfq quantize" in done.stdout
    assert done.stdout.endswith("False False\n")
    assert done.stderr == ""


def test_a_reader_that_goes_away_is_no_failure() -> None:
    program = (
        "import os, sys\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\nfrom dfq.cli import run\n"
        "sys.argv = ['dfq', 'list', 'recipes']\nrun()"
    )
    done = python("-c", program)
    assert (done.returncode, done.stderr) == (0, "")
