"""Every command and every piece of Python in README and docs is run, page by page, as it is printed.

What cannot be run is in `NOT_RUN`, with the reason, and is parsed instead. Blocks marked `text`, or as a file of some
kind, are not for running; a block without a mark is taken for commands.
"""

from __future__ import annotations

import argparse
import configparser
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never

import pytest

from dfq.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("", "bash", "sh", "shell", "console")
OTHER = ("text", "toml", "json")
NOT_RUN = {
    "make ": "sets up an environment; the demo has tests of its own (tests/dfq/test_demo.py)",
    "pip ": "installs packages",
    "torchrun ": "starts processes on one or several machines; teams have tests of their own (tests/dfq/test_team.py)",
    "python tools/": "programs that take real weights, photographs and hours; each has tests of its own (tests/tools)",
}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Snippet:
    """A fenced block. line: of its first line."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        indent, language, block = match.groups()
        line = text.count("\n", 0, match.start(3)) + 1
        lines = [line.removeprefix(indent) for line in block.splitlines()]
        found.append(Snippet(str(page.relative_to(ROOT)), line, language, "\n".join(lines)))
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command; backslashes at the end of a line and comments are the shell's."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words:
            yield words


def not_run(words: list[str]) -> str | None:
    """The entry of `NOT_RUN` that a command is in."""
    return next((start for start in NOT_RUN if f"{' '.join(words)} ".startswith(start)), None)


def run(snippet: Snippet) -> None:
    if snippet.language == "python":
        exec(compile(snippet.text, str(snippet), "exec"), {"__name__": "__main__"})
        return
    assert snippet.language in (*SHELL, *OTHER), f"{snippet} is {snippet.language}, and nobody runs it"
    for words in commands(snippet.text) if snippet.language in SHELL else ():
        if not_run(words):
            check(words)
            continue
        assert words[0] == "dfq", f"{snippet}: {words[0]} is neither run nor in NOT_RUN"
        status = main(words[1:])
        # Of miniatures the drop says nothing.
        assert status == 0 or (status == 3 and "--max-drop" in words), f"{snippet}: {shlex.join(words)}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if snippets(page)], ids=lambda page: str(page.relative_to(ROOT))
)
@pytest.mark.usefixtures("reader")
def test_every_snippet_works(page: Path) -> None:
    for snippet in snippets(page):
        run(snippet)


@pytest.mark.parametrize(
    ("language", "text", "said"),
    [
        ("", "curl https://example.org", "curl is neither run nor in NOT_RUN"),
        ("bash", "python setup.py install", "python is neither run nor in NOT_RUN"),
        ("julia", "1 + 1", "nobody runs it"),
        ("", "dfq evaluate no-such-folder --data-dir photographs", "page.md:3: dfq evaluate"),
        ("", "make coffee", "coffee"),
        ("", "pip install '.[gpu]'", "gpu"),
    ],
)
def test_a_snippet_that_does_not_work_is_found(language: str, text: str, said: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(said)):
        run(Snippet("page.md", 3, language, text))


@pytest.mark.parametrize(
    "command",
    [
        "dfq quantize reference --bit w4a8 --out out",
        "torchrun --nproc-per-node 4 -m dfq generate ... --image 8",
        "torchrun --nproc-per-node 4 -m dfq generate --out images",
        "python tools/accuracy_table.py ... --bitts w8a8",
    ],
)
def test_options_that_are_not_there_are_found(command: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(Snippet("page.md", 3, "", command))


def test_there_are_snippets_of_all_kinds() -> None:
    every = [snippet for page in PAGES for snippet in snippets(page)]
    words = [words for snippet in every if snippet.language in SHELL for words in commands(snippet.text)]
    assert {words[1] for words in words if words[0] == "dfq"} >= {
        *("generate", "quantize", "sensitivity", "evaluate", "export", "bench", "distill", "list", "report")
    }
    assert sum(snippet.language == "python" for snippet in every) >= 4
    # What nobody writes any more need not be excused.
    assert {not_run(w) for w in words} - {None} == set(NOT_RUN)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("dfq list models 'vit*'  # all", [["dfq", "list", "models", "vit*"]]),
        (
            "dfq generate a \\\n    --out b\n\n$ dfq export c",
            [["dfq", "generate", "a", "--out", "b"], ["dfq", "export", "c"]],
        ),
    ],
)
def test_commands_are_split_as_a_shell_does(block: str, expected: list[list[str]]) -> None:
    assert list(commands(block)) == expected


class ParsedError(Exception):
    """In place of what a program does once it has its arguments."""


def check(words: list[str]) -> None:
    """Is there such a target, extra, option or program? `...` stands for what was left out."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words[0] == "pip":
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        extra = re.search(r"\[(\w+)\]", words[2])
        assert extra is None or extra[1] in setup["options.extras_require"], words
    elif words[0] == "torchrun":
        assert words[words.index("-m") + 1] == "dfq", words
        parse(lambda: main(sys.argv[1:]), words[words.index("-m") + 2 :])
    else:
        parse(lambda: runpy.run_path(str(ROOT / words[1]), run_name="__main__"), words[2:])


def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Those of its commands, too."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options(command)


def parse(program: Callable[[], Any], words: list[str]) -> None:
    """Runs it as far as its arguments. Where some are left out the others need not be there."""
    partly = "..." in words
    given = [
        word
        for word, following in zip(words, [*words[1:], ""], strict=True)
        if word != "..." and not (following == "..." and word.startswith("--"))
    ]
    take = argparse.ArgumentParser.parse_known_args

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> Never:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", take)  # for its commands
        for action in options(parser) if partly else ():
            action.required = False
        _, unknown = take(parser, given)
        if unknown:
            parser.error(f"unknown: {unknown}")
        raise ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        patch.setattr(sys, "argv", ["program", *given])
        # Where Python looks first when it runs one of them.
        patch.syspath_prepend(ROOT / "tools")
        with pytest.raises(ParsedError):  # and not SystemExit, argparse's refusal
            program()
