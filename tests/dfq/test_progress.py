"""Bars as a terminal sees them, and as nobody does."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from dfq.progress import LineHandler, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_left(written: str) -> list[str]:
    """What stands on the screen in the end: of what was written to a line, the last to its end."""
    return [line.split("\r")[-1].rstrip() for line in written.split("\n")]


def test_nothing_is_left_of_a_bar_but_the_lines_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    record = logging.LogRecord("dfq", logging.INFO, "", 0, "half of it", None, None)
    with progress_bar(4, "work", "step") as bar:
        bar.update(2)
        bar.refresh()
        LineHandler().emit(record)
        bar.update(2)
    assert "work:  50%" in screen.getvalue()
    assert "2/4" in screen.getvalue()
    assert lines_left(screen.getvalue()) == ["half of it", ""]


@pytest.mark.parametrize(("screen", "shown"), [(io.StringIO, True), (Terminal, False)])
def test_no_bar_for_a_file_or_where_none_is_wanted(
    screen: type[io.StringIO], shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = screen()
    monkeypatch.setattr(sys, "stderr", written)
    with progress_bar(4, "work", "step", shown=shown) as bar:
        bar.update(4)
    assert written.getvalue() == ""
