"""`dfq completion`: a script with which a shell completes `dfq`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dfq.commands.command import Command

_SHELLS = {
    "bash": "~/.local/share/bash-completion/completions/dfq",
    "zsh": "_dfq in a folder of $fpath",
    "fish": "~/.config/fish/completions/dfq.fish",
}


def options(parser: argparse.ArgumentParser) -> None:
    places = "; ".join(f"{shell}: {place}" for shell, place in _SHELLS.items())
    parser.add_argument(
        "shell",
        choices=tuple(_SHELLS),
        metavar="SHELL",
        help=f"bash, zsh or fish; put the script where it looks: {places}",
    )


def run(arguments: argparse.Namespace) -> None:
    import shtab

    from calibration import METHODS
    from dfq.architectures import REFERENCE, supported_names
    from dfq.cli import build_parser
    from dfq.recipe import preset_names

    shell: str = arguments.shell
    # Written into the script, so that a shell need not start Python, and that torch, for them.
    models = _NamesOrFiles("dfq_model_or_file", [REFERENCE, *supported_names()])
    recipes = _NamesOrFiles("dfq_recipe_or_file", preset_names())
    words = {
        "method": list(METHODS),
        "bits": ["w8a8", "w4a8", "w4a4"],
        "device": ["cpu", "cuda"],
        "train": ["linear", "last-1", "full"],
    }
    parser = build_parser()
    for action in _actions(parser):
        completed: Any = action
        if action.dest in ("model", "teacher", "student") and action.type is not Path:
            completed.complete = {shell: models.call(shell)}
        elif action.dest == "recipe":
            completed.complete = {shell: recipes.call(shell)}
        elif action.dest in words:
            action.choices = words[action.dest]
        elif action.type is Path:
            completed.complete = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE
    functions = "\n".join(names.define(shell) for names in (models, recipes))
    print(shtab.complete(parser, shell, preamble=functions))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Of all commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action


class _NamesOrFiles:
    """A function of a shell's that completes names, and files beside them."""

    def __init__(self, function: str, names: list[str]) -> None:
        self.function = f"_{function}"
        self.names = " ".join(names)

    def call(self, shell: str) -> str:
        return f"({self.function})" if shell == "fish" else self.function

    def define(self, shell: str) -> str:
        body = {
            "bash": f'() {{\n  compgen -W "{self.names}" -- "$1"\n  compgen -f -- "$1"\n}}',
            "zsh": f"() {{\n  compadd -- {self.names}\n  _files\n}}",
            "fish": f"\n  printf '%s\\n' {self.names}\n  __fish_complete_path (commandline -ct)\nend",
        }[shell]
        return f"function {self.function}{body}\n"


COMMAND = Command(
    "completion",
    "print a script with which bash, zsh or fish complete dfq at the Tab key",
    "dfq completion bash > ~/.local/share/bash-completion/completions/dfq",
    options,
    run,
)
