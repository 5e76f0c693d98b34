"""What `--help` says, and what is said of a command line that is wrong."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable

import pytest

from dfq.cli import build_parser
from dfq.commands import COMMANDS

NAMES = [command.name for command in COMMANDS]


def help_of(name: str, status: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> str:
    assert status(name, "--help") == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_all_commands_are_listed(status: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--help") == 0
    said = capsys.readouterr()
    assert re.findall(r"^    (\w+)  ", said.out, re.MULTILINE) == NAMES
    assert status() == 2
    assert capsys.readouterr() == ("", said.out)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_can_be_typed(name: str, status: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    lines = help_of(name, status, capsys).partition("example:\n")[2]
    example = lines.replace("\\\n", "").partition(">")[0]
    program, *arguments = shlex.split(example)
    assert program == "dfq"
    assert build_parser().parse_args(arguments).command.name == name


@pytest.mark.parametrize("name", NAMES)
def test_help_fits_and_says_every_default(
    name: str, status: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    said = help_of(name, status, capsys)
    assert max(map(len, said.splitlines())) <= 80
    assert said.startswith(f"usage: dfq {name} ")
    (commands,) = (action for action in build_parser()._actions if action.dest == argparse.SUPPRESS and action.choices)
    assert isinstance(commands.choices, dict)
    for action in commands.choices[name]._actions:
        assert action.help, action
        if action.default not in (None, False, "", argparse.SUPPRESS):
            default = " ".join(map(str, action.default)) if isinstance(action.default, list) else str(action.default)
            assert f"(default: {default})" in action.help % {"default": action.default}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("quantise",), "unknown command 'quantise' (did you mean 'quantize'?); see `dfq --help`"),
        (("frobnicate",), "unknown command 'frobnicate'; see `dfq --help`"),
        (
            ("quantize",),
            "the following arguments are required: MODEL, -o/--out; see `dfq quantize --help`",
        ),
        (
            ("evaluate", "reference", "--basline"),
            "unknown option '--basline' (did you mean '--baseline'?); see `dfq evaluate --help`",
        ),
        (("evaluate", "reference", "other"), "unknown argument 'other'; see `dfq evaluate --help`"),
        (
            ("list", "recipies"),
            "argument WHAT: unknown value 'recipies' (did you mean 'recipes'?): choose from models, methods, recipes; "
            "see `dfq list --help`",
        ),
        (
            ("generate", "reference", "--out", "x", "-n", "1.5"),
            "argument -n/--num-images: must be a whole number, not '1.5'; see `dfq generate --help`",
        ),
        (
            ("evaluate", "reference", "--max-drop", "little"),
            "argument --max-drop: must be a finite number, not little; see `dfq evaluate --help`",
        ),
    ],
)
def test_mistakes_are_named_with_the_remedy(
    arguments: tuple[str, ...], said: str, status: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(*arguments) == 2
    assert capsys.readouterr() == ("", f"dfq: error: {said}\n")
