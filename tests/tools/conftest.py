"""Tools as modules, and digits to run them on."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from dfq import reference

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="session")
def load_tool() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a program of `tools/` by name; they find one another as when they are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))

        def load(name: str) -> ModuleType:
            spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, name, module)  # dataclasses look themselves up there
            spec.loader.exec_module(module)
            return module

        yield load


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Forty held-out digits as pictures, one folder per class."""
    images, labels = reference.digits("test")
    for index in range(40):
        folder = tmp_path / "digits" / str(labels[index].item())
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index].permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    return tmp_path / "digits"
