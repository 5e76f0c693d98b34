"""For the API pages (mkdocs.yml): what a docstring says of arguments, as a list.

Docstrings here are prose. `name: meaning.` at the beginning of a sentence says what an argument, or a field of a
dataclass, is; on a page it is found sooner as an entry of a list. Everything else is left as it is written.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Alias, Class, Docstring, Extension, Function, Object


class DocstringArguments(Extension):
    """Rewrites docstrings of functions and classes as they are loaded."""

    def on_function(self, *, func: Function, **_: Any) -> None:
        _rewrite(func, [parameter.name for parameter in func.parameters])

    def on_class(self, *, cls: Class, **_: Any) -> None:
        _rewrite(cls, list(cls.members))


def _rewrite(owner: Object | Alias, names: list[str]) -> None:
    if isinstance(owner.docstring, Docstring):
        owner.docstring.value = listed(owner.docstring.value, names)


def listed(text: str, names: list[str]) -> str:
    """The text with a list for every paragraph that says what one of `names` is."""
    return "\n\n".join(_paragraph(part, names) for part in re.split(r"\n\s*\n", text))


def _paragraph(text: str, names: list[str]) -> str:
    starts = list(_START.finditer(text))
    # One that is not in `names` is a field that was inherited.
    if not any(name in names for start in starts for name in start[1].split(", ")):
        return text
    before = text[: starts[0].start()].strip()
    entries = []
    for this, following in zip(starts, [*starts[1:], None], strict=True):
        meaning = text[this.end() : following.start() if following else len(text)].strip().removesuffix(";")
        said = ", ".join(f"`{name}`" for name in this[1].split(", "))
        entries.append(f"- {said}: " + meaning.replace("\n", "\n  "))
    return "\n\n".join([*([before] if before else []), "\n".join(entries)])


# Where a sentence begins: with the paragraph, or behind a full stop, a semicolon or a bracket.
_START = re.compile(r"(?:^|(?<=[.;)]\s))([a-z_]\w*(?:, [a-z_]\w*)*):\s+")
