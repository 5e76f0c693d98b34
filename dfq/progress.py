"""Bars that tell how far a long run is, and log lines that do not run into them."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm


def progress_bar(total: int | None, what: str, unit: str, *, shown: bool = True, bar_format: str | None = None) -> tqdm:
    """A bar on stderr that goes away when it is closed; none where stderr is no terminal, or unless `shown`."""
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        bar_format=bar_format,
        file=sys.stderr,
        leave=False,
        dynamic_ncols=True,
        disable=None if shown else True,
    )


class LineHandler(logging.Handler):
    """Writes log lines to stderr, above the bars that are open there."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
