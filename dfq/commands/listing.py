"""`dfq list`: what there is."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from dfq.commands.command import Command


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", choices=("models", "methods", "recipes"), metavar="WHAT", help="models, methods or recipes"
    )
    parser.add_argument(
        "filter",
        nargs="?",
        default="",
        metavar="FILTER",
        help="only names with this in them, or like 'vit_tiny*'; of models any that timm knows, where without a filter "
        "only those are listed that dfq was tried on",
    )


def run(arguments: argparse.Namespace) -> None:
    wanted: str = arguments.filter
    if arguments.what == "models":
        if wanted:
            _list_models(wanted)
        else:
            _list_tried()
        return
    from dfq.errors import DfqError

    if arguments.what == "methods":
        from calibration import METHODS

        every = [(name, method.summary) for name, method in METHODS.items()]
    else:
        from dfq.recipe import load_recipe, preset_names

        every = [(name, load_recipe(name).summary) for name in preset_names()]
    rows = [(name, summary) for name, summary in every if wanted in name or fnmatchcase(name, wanted)]
    if not rows:
        known = ", ".join(name for name, _ in every)
        raise DfqError(f"none of the {arguments.what} is called {wanted!r}; there are {known}")
    for line in _columns(rows, _widths(rows)):
        print(line)
    if arguments.what == "recipes" and not wanted:
        print("\nEach also with weights in groups, for 4 bits and fewer: `fast-g64` shares a scale among 64.")


_HEADER = ("sparse inversion, by", "dense inversion", "quantization")


def _list_tried() -> None:
    from dfq.tried import TRIED

    rows: list[Sequence[str]] = [("tried", *_HEADER, "what it has")]
    for name, row in TRIED.items():
        can = (cell.partition(":")[0] for cell in (row.sparse, row.dense, row.quantization))
        rows.append((name, *can, row.has))
    for line in _columns(rows, _widths(rows)):
        print(line)
    print("\n`reference` comes with dfq. `dfq list models FILTER` tells of other names that timm knows, and why not.")


def _list_models(wanted: str) -> None:
    """One after another, as each takes a moment: it has to be built."""
    from dfq.architectures import REFERENCE, supported_names
    from dfq.errors import DfqError
    from dfq.support import describe_support
    from dfq.tried import TRIED

    names = supported_names(wanted)
    if wanted in REFERENCE or fnmatchcase(REFERENCE, wanted):
        names = [REFERENCE, *names]
    if not names:
        raise DfqError(f"no model that dfq knows is called {wanted!r}; `dfq list models` shows some")
    reasons: dict[str, None] = {}

    def rows() -> Iterator[tuple[str, ...]]:
        yield "model", *_HEADER, "tried"
        for name in names:
            support = describe_support(name)
            reasons.update(dict.fromkeys(support.refusals))
            yield (
                name,
                support.saliency or "no",
                "no" if support.dense_refusal else "yes, head needed" if support.head_needed else "yes",
                "no" if support.quantization_refusal else "yes",
                "yes" if name in TRIED or name == REFERENCE else "",
            )

    widest = [(max(names, key=len), *_HEADER, ""), ("", "", "yes, head needed", "", "")]
    for line in _columns(rows(), _widths(widest)):
        print(line, flush=True)
    if reasons:
        print("\nWhy not:", *reasons, sep="\n")


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _columns(rows: Iterable[Sequence[str]], widths: Sequence[int]) -> Iterator[str]:
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


COMMAND = Command("list", "say what there is: models, methods, recipes", "dfq list models 'vit_tiny*'", options, run)
