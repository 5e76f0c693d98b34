"""How `dfq` reads its command line and speaks of it: helps to copy from, mistakes in one line."""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all errors of `dfq`, with the nearest name where one was mistyped."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"dfq: error: {message}; see `{self.prog} --help`\n")

    # argparse's own signature is overloaded for namespaces of other types.
    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = getattr(arguments, "command", None)
            parser = self if command is None else _commands_of(self)[command.name]
            parser.error(f"unknown {_said(unknown, parser)}")
        return arguments

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        wrong = f"{str(value)!r}{_near(str(value), known)}"
        if isinstance(action, argparse._SubParsersAction):
            self.error(f"unknown command {wrong}")
        raise argparse.ArgumentError(action, f"unknown value {wrong}: choose from {', '.join(known)}")


def _commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


def _said(unknown: Sequence[str], parser: argparse.ArgumentParser) -> str:
    first = unknown[0].partition("=")[0]
    if not first.startswith("-"):
        return f"argument {unknown[0]!r}"
    return f"option {first!r}{_near(first, parser._option_string_actions)}"


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


class _Formatter(argparse.HelpFormatter):
    """Does not break words at hyphens, as in `hf-hub:`, leaves examples so that they can be copied."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        # argparse forgets that the names of commands are indented.
        names = [len(sub.metavar or sub.dest) for sub in getattr(action, "_choices_actions", ())]
        self._action_max_length = max([self._action_max_length, *(length + 4 for length in names)])

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        head, newline, example = text.partition("example:\n")
        if not newline:
            return textwrap.fill(" ".join(text.split()), width, break_on_hyphens=False)
        lines = [""]
        for part in re.split(r" (?=-)", example):
            if lines[-1] and len(lines[-1]) + len(part) > width - 10:
                lines.append("")
            lines[-1] = f"{lines[-1]} {part}".strip()
        return head + newline + "  " + " \\\n      ".join(lines)
