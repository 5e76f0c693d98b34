"""A report in a real browser: it asks for nothing, says nothing to the console, and fits on a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dfq

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def pages(quantized_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of a report and of a comparison."""
    out = tmp_path_factory.mktemp("browser")
    one = dfq.report(quantized_folder, out / "one.html", progress=False)
    two = dfq.report([quantized_folder, quantized_folder], out / "two.html", progress=False)
    return {"one": one.as_uri(), "two": two.as_uri()}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("which", ["one", "two"])
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_it_opens(browser: Any, pages: dict[str, str], which: str, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(pages[which])
    assert [url for url in asked if not url.startswith("data:")] == [pages[which]]
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    loaded = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(loaded) == (6 if which == "one" else 0)
    assert all(loaded)
    page.close()


def test_it_is_dark_where_the_reader_wants_it_so(browser: Any, pages: dict[str, str]) -> None:
    def brightness(scheme: str, element: str, what: str) -> int:
        page = browser.new_page(color_scheme=scheme)
        page.goto(pages["one"])
        colour = page.evaluate(f"getComputedStyle(document.querySelector('{element}')).{what}")
        page.close()
        return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))

    for element, what in (("body", "color"), ("figure svg", "fill")):
        assert brightness("dark", element, what) > 500 > brightness("light", element, what)
    assert brightness("dark", "body", "backgroundColor") < 150


def test_a_keyboard_reaches_what_scrolls(browser: Any, pages: dict[str, str]) -> None:
    page = browser.new_page()
    page.goto(pages["one"])
    unreachable = page.evaluate("[...document.querySelectorAll('.scroll')].filter(e => e.tabIndex < 0).length")
    unnamed = page.evaluate("[...document.querySelectorAll('.scroll')].filter(e => !e.ariaLabel).length")
    assert (unreachable, unnamed) == (0, 0)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the results"
    page.close()
