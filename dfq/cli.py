"""The `dfq` command: parse, call, report. What it can do is in `dfq.commands`.

Exit status: 0 done, 1 failed, 2 wrong usage, 3 finished but a gate failed (--max-drop), 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path

from dfq import __version__
from dfq.commands import COMMANDS, Command
from dfq.commands.parser import Parser
from dfq.progress import LineHandler

WRONG_USAGE = 2
INTERRUPTED = 130


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status."""
    parser = build_parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        return WRONG_USAGE
    arguments = parser.parse_args(argv)
    command: Command = arguments.command
    try:
        with _reporting(quiet=arguments.quiet, debug=arguments.debug):
            status = _in_team(command, arguments) if "WORLD_SIZE" in os.environ else int(command.run(arguments) or 0)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        goes_on = "; the same command goes on where it stopped" if command.resumes else ""
        print(f"dfq: interrupted{goes_on}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (head, less) has gone: not a failure, and nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if arguments.debug:
            raise
        return _explain(error)


def build_parser() -> Parser:
    """The parser of `dfq` and its commands; what it gives has the chosen Command as `command`."""
    parser = Parser(
        prog="dfq",
        usage="dfq COMMAND ...",
        description="Data-free quantization of Vision Transformers: from a pretrained timm ViT and not one real image "
        "to a low-bit model, measured beside full precision.",
        epilog="Try `dfq demo` first. `dfq COMMAND --help` tells more, with an example.",
    )
    parser.add_argument("--version", action="version", version=f"dfq {__version__}")
    commands = parser.add_subparsers(title="commands", prog="dfq", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    return parser


def _in_team(command: Command, arguments: argparse.Namespace) -> int:
    """The command in one of the processes that `torchrun` started; gives the exit status."""
    from calibration.team import joined

    with joined() as team, ExitStack() as stack:
        if not team.leads:
            if not command.shared:
                return 0
            arguments.quiet = True
            logging.getLogger("dfq").setLevel(logging.ERROR)
            stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        return int(command.run(arguments) or 0)


def _explain(error: Exception) -> int:
    """Say in one line what went wrong; gives the exit status."""
    from calibration.team import LeaderError
    from dfq.errors import DfqError, UsageError

    if isinstance(error, LeaderError):
        # torchrun ends all processes when one has failed: not before the first has said why.
        time.sleep(1)
        return 1
    if isinstance(error, DfqError):
        said = str(error)
    else:
        first_line = (str(error) or "no message").splitlines()[0]
        said = f"unexpected {type(error).__name__}: {first_line}; --debug shows where"
    rank = int(os.environ.get("RANK", "0"))
    who = f" in process {rank}" if rank else ""
    print(f"dfq: error{who}: {said}", file=sys.stderr)
    return WRONG_USAGE if isinstance(error, UsageError) else 1


@contextmanager
def _reporting(*, quiet: bool, debug: bool) -> Iterator[None]:
    """While it is open, dfq's log lines go to stderr, and what other libraries say to their developers goes nowhere."""
    own, root, hub = logging.getLogger("dfq"), logging.getLogger(), logging.getLogger("huggingface_hub")
    level, hub_level = own.level, hub.level
    lines, nowhere = LineHandler(), logging.NullHandler()
    own.setLevel(logging.WARNING if quiet else logging.INFO)
    own.addHandler(lines)
    if not debug:
        # It prints every attempt that fails, and the last of them is told anyway.
        hub.setLevel(logging.ERROR)
    # Without any handler Python would print the warnings of timm and others.
    root.addHandler(nowhere)
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
            yield
    finally:
        own.removeHandler(lines)
        root.removeHandler(nowhere)
        own.setLevel(level)
        hub.setLevel(hub_level)
