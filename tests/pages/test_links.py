"""Links lead somewhere, and every public name has its place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dfq

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    links = re.findall(r"\]\(((?!https?:|#)[^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_readme_has_links() -> None:
    assert "](docs/tutorial.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_public_name_is_documented_once() -> None:
    pages = sorted((ROOT / "docs/api").glob("*.md"))
    named = re.findall(r"^::: dfq\.(\w+)$", "\n".join(page.read_text() for page in pages), re.MULTILINE)
    assert sorted(named) == sorted(dfq.__all__)
