"""What a command is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# The exit status of a command that did its work and found the result not good enough.
GATE_FAILED = 3


@dataclass(frozen=True)
class Command:
    """One command of `dfq`.

    summary: what it does, as a line of the list of commands; example: one that can be typed; options: puts its own into
    a parser; run: does it, and may give an exit status. Whatever is slow to import, `run` imports. shared: the
    processes of a team do it together, other commands only their leader; resumes: the same command goes on where a run
    of it was stopped.
    """

    name: str
    summary: str
    example: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    shared: bool = False
    resumes: bool = False

    def add_to(self, commands: Any) -> None:
        """Put its parser among those of argparse's `add_subparsers`."""
        parser: argparse.ArgumentParser = commands.add_parser(
            self.name,
            help=self.summary,
            description=self.summary[0].upper() + self.summary[1:] + ".",
            epilog=f"example:\n{self.example}",
            add_help=False,
        )
        parser.set_defaults(command=self)
        self.options(parser)
        # Last, as what is particular to a command is looked for first.
        general = parser.add_argument_group("general")
        general.add_argument("-h", "--help", action="help", help="show this and exit")
        general.add_argument("--quiet", action="store_true", help="results and errors only")
        general.add_argument("--debug", action="store_true", help="show the traceback of an error")
        # All options, in a line for each, are below it.
        needed = [action for action in parser._actions if action.required]
        words = (
            f"{action.option_strings[-1]} {action.metavar}" if action.option_strings else str(action.metavar)
            for action in needed
        )
        parser.usage = " ".join([parser.prog, *words, "[OPTION ...]"])
