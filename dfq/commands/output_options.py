"""What a command leaves behind, and where."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_output_options(parser: argparse.ArgumentParser, what: str) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help=what)
    group.add_argument("--overwrite", action="store_true", help="replace what another run left there")


def check_files(arguments: argparse.Namespace, suffixes: dict[str, str]) -> None:
    """Raise UsageError where a file that is to be written in the end cannot be."""
    from dfq.errors import UsageError

    for option, suffix in suffixes.items():
        path = getattr(arguments, option)
        if path is None:
            continue
        if not path.absolute().parent.is_dir():
            raise UsageError(f"--{option} {path}: there is no folder {path.parent}")
        if not path.name.endswith(suffix):
            raise UsageError(f"--{option} {path}: the name must end in {suffix}")
