"""What goes wrong for reasons the user can mend.

The base class lives in `calibration`, the lowest floor that reads files and folders; everything raised on
purpose by `dfq` and `calibration` is a `DfqError`, so one `except dfq.DfqError` catches it all.
"""

from __future__ import annotations

from calibration.errors import DfqError

__all__ = ["CheckpointError", "DfqError", "RecipeError", "UnsupportedModelError", "UsageError"]


class UsageError(DfqError):
    """The call itself is wrong (bits, options that exclude each other); found before any work starts."""


class RecipeError(UsageError):
    """A recipe that cannot be read, or names what is not there."""


class UnsupportedModelError(DfqError):
    """A model that is not a Vision Transformer dfq understands."""


class CheckpointError(DfqError):
    """A weights file that is missing, damaged, of another model, or unsafe to read."""
