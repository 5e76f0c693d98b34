"""Files that are whole or absent: written beside their name, then renamed into place. Folders with one owner."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import finalize

from calibration.errors import DfqError

if sys.platform != "win32":
    import fcntl

MAX_TEXT_BYTES = 2**28
"""Texts are read whole. A longer one is none that dfq wrote: the manifest of a million images is half as long."""


def make_directory(path: Path) -> None:
    """Create `path` and its parents, and see that it can be written to. Raises DfqError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DfqError(f"cannot create the folder {path}: {error.strerror or error}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise DfqError(f"cannot write to the folder {path}: permission denied; choose another --out")


class FolderLock:
    """A folder that no other run writes to while this is held: until `release`, or until the process ends, however.

    The lock is on the folder itself and leaves no file behind. Windows and some network file systems have none; there
    nobody is kept out. Raises DfqError where another run holds it.
    """

    def __init__(self, path: Path) -> None:
        self.held = False
        self.release: Callable[[], object] = lambda: None
        if sys.platform == "win32":
            return
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DfqError(f"cannot read the folder {path}: {error.strerror or error}") from error
        self.release = finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.held = True
        except BlockingIOError:
            self.release()
            raise DfqError(
                f"another process is at work in {path}: wait until it is done, or choose another --out"
            ) from None
        except OSError:
            self.release()


def take_folder(path: Path) -> FolderLock:
    """Create `path` where need be and keep other runs out; what a run that was killed had half written is deleted.

    Raises DfqError as `make_directory` and `FolderLock` do.
    """
    make_directory(path)
    lock = FolderLock(path)
    if lock.held:
        for left in path.glob(".*.partial"):
            remove_file(left)
    return lock


def remove_file(path: Path) -> None:
    """Delete `path`, if it is there. Raises DfqError where it cannot be, as a folder."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise DfqError(f"cannot delete {path}: {error.strerror or error}; move it away") from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `path`, then rename it there. Raises DfqError, leaving nothing behind."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    except OSError as error:
        raise DfqError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON. Raises DfqError where it cannot be written."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_text(path: Path) -> str:
    """UTF-8. Raises ValueError for other bytes and for more than `MAX_TEXT_BYTES`, OSError for what is no file."""
    if path.exists() and not path.is_file():
        raise OSError("it is not a file")
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(f"it has more than {MAX_TEXT_BYTES} bytes")
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DfqError where there is none."""
    try:
        value = json.loads(read_text(path))
    # ValueError: not JSON, not UTF-8, or an integer of more digits than Python reads.
    except (OSError, ValueError, RecursionError) as error:
        raise DfqError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise DfqError(f"{path} does not hold a JSON object")
    return value


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes. Raises DfqError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DfqError(f"cannot read {path}: {error.strerror or error}") from error
