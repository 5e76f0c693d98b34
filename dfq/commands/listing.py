"""`dfq list`: what there is."""

from __future__ import annotations

import argparse

from dfq.commands.command import Command


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("models", "methods", "recipes"))
    parser.add_argument(
        "filter",
        nargs="?",
        default="",
        metavar="FILTER",
        help="models: names like this one, such as 'vit_tiny*', and what can be done with each",
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.what == "methods":
        from calibration import METHODS

        rows = [(name, method.summary) for name, method in METHODS.items()]
    elif arguments.what == "recipes":
        from dfq.recipe import load_recipe, preset_names

        rows = [(name, load_recipe(name).summary) for name in preset_names()]
    else:
        rows = _models(arguments.filter)
    width = max(len(name) for name, _ in rows)
    for name, summary in rows:
        print(f"{name:<{width}}  {summary}".rstrip())


def _models(filter: str) -> list[tuple[str, str]]:
    """Names and, where a filter keeps them few, what can be done with each: that takes building it."""
    from dfq.architectures import supported_names
    from dfq.errors import DfqError
    from dfq.support import describe_support

    names = supported_names(filter)
    if not names:
        raise DfqError(f"no model that dfq knows is called {filter!r}; wildcards help: 'vit_tiny*'")
    if not filter:
        return [(name, "") for name in names]
    return [(name, describe_support(name).describe()) for name in names]


COMMAND = Command(
    "list",
    "say what there is",
    "dfq list methods",
    options,
    run,
)
