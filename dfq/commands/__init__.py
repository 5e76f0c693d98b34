"""The commands of `dfq`, a file each, in the order in which `dfq --help` lists them.

Options are named as in timm's `validate.py` where it has one. A file holds a command's options, what it calls and what
it prints; the rest is in the library.
"""

from __future__ import annotations

from dfq.commands import (
    bench,
    completion,
    demo,
    distill,
    evaluate,
    export,
    generate,
    listing,
    quantize,
    report,
    sensitivity,
)
from dfq.commands.command import Command

__all__ = ["COMMANDS", "Command"]

COMMANDS: tuple[Command, ...] = (
    generate.COMMAND,
    quantize.COMMAND,
    sensitivity.COMMAND,
    evaluate.COMMAND,
    export.COMMAND,
    bench.COMMAND,
    report.COMMAND,
    distill.COMMAND,
    listing.COMMAND,
    demo.COMMAND,
    completion.COMMAND,
)
