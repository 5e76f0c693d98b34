"""What a result was made with."""

from __future__ import annotations

import platform
from functools import cache

import numpy
import timm
import torch

from dfq import __version__


@cache
def versions() -> dict[str, str]:
    """Versions of everything that can move a number."""
    return {
        "dfq": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }
