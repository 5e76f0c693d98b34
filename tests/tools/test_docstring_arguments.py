"""What docstrings say of arguments becomes a list, and nothing else changes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from types import ModuleType

import pytest

pytest.importorskip("griffe", reason="of the extra `docs`")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Makes images.\n\nOne of them: the first.", "Makes images.\n\nOne of them: the first."),
        (
            "Reads.\n\nroot: a folder, or a\nfile. split, seed: of the set; out: to write.\n\nRaises DfqError.",
            "Reads.\n\n- `root`: a folder, or a\n  file.\n- `split`, `seed`: of the set\n- `out`: to write.\n\n"
            "Raises DfqError.",
        ),
        ("The rest is as it was. root: a folder.", "The rest is as it was.\n\n- `root`: a folder."),
        # An inherited field stands beside one that is the class's own.
        ("module: inherited; root: its own.", "- `module`: inherited\n- `root`: its own."),
        # A colon after some other word is a colon.
        ("note: nothing here.", "note: nothing here."),
        ("It has a root: this one.", "It has a root: this one."),
    ],
)
def test_paragraphs(load_tool: Callable[[str], ModuleType], text: str, expected: str) -> None:
    assert load_tool("docstring_arguments").listed(text, ["root", "split", "seed", "out"]) == expected


def test_functions_and_classes_are_rewritten(load_tool: Callable[[str], ModuleType]) -> None:
    import griffe

    source = textwrap.dedent(
        '''
        def read(root):
            """Reads. root: a folder."""

        class Set:
            """Images. root: where they lie."""

            root: str
        '''
    )
    extensions = griffe.load_extensions(load_tool("docstring_arguments").DocstringArguments())
    with griffe.temporary_visited_package("example", {"__init__.py": source}, extensions=extensions) as package:
        found = [package[name].docstring.value for name in ("read", "Set")]
    assert found == ["Reads.\n\n- `root`: a folder.", "Images.\n\n- `root`: where they lie."]
