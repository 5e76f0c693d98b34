"""What a result was made with."""

from __future__ import annotations

import importlib
import platform
from functools import cache

import numpy
import timm
import torch

from dfq import __version__


@cache
def versions(*packages: str) -> dict[str, str]:
    """Versions of everything that can move a number; with those of further installed packages that had a part in it."""
    always: dict[str, str] = {
        "dfq": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }
    return always | {package: str(importlib.import_module(package).__version__).split("-")[0] for package in packages}
