"""The one exception for what the user can mend, and what helps to."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DfqError(Exception):
    """What is wrong, with which file or value, and what to do, in one sentence."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What follows a word that nobody knows: the nearest of those known, in brackets; empty where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
