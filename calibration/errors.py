"""The one exception for what the user can mend."""

from __future__ import annotations


class DfqError(Exception):
    """What is wrong, with which file or value, and what to do, in one sentence."""
