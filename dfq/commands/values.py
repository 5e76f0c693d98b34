"""The values that options take, each read from the text on the command line."""

from __future__ import annotations

import argparse
import math
import re

# Those of dfq.runtime, which is slow to import, the default first.
RUNTIMES = ("onnxruntime", "openvino")


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None


def positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def count(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {value}")
    return value


def iterations_or_auto(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number or auto, not {text!r}")
    return positive(text)


def seed_number(text: str) -> int:
    value = _whole(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2^63 - 1, not {value}")
    return value


def above_zero(text: str) -> float:
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def size_or_share(text: str) -> float:
    """Bytes, or up to 1 a share."""
    match = re.fullmatch(r"([0-9.]+) *(%|[kKMG]?i?B)?", text)
    try:
        value = float(match[1]) * _UNITS[match[2] or ""] if match else 0.0
    except (ValueError, KeyError):
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a size such as 3.5MB, or a share such as 0.7 or 70%, not {text!r}")
    return value


_UNITS = {"": 1.0, "%": 0.01, "B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9}
_UNITS |= {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
    return value
