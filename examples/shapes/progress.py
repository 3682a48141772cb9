"""One line that says how far a program is."""

from __future__ import annotations

import sys
import time

_INTERVAL_S = 0.1
_PLAIN_INTERVAL_S = 10.0


class StatusLine:
    """A line on standard error that is overwritten as work goes on.

    Where the output is no terminal (a log, a pipe) a plain line appears instead, every
    ten seconds at most.
    """

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._last = float("-inf")
        self._width = 0

    def update(self, text: str) -> None:
        """Shows a text, unless another one was shown a moment ago."""
        now = time.monotonic()
        interval = _INTERVAL_S if self._terminal else _PLAIN_INTERVAL_S
        if now - self._last < interval:
            return
        self._last = now
        if self._terminal:
            print(f"\r{text:<{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Takes the line away, before other output."""
        if self._terminal and self._width:
            print("\r" + " " * self._width + "\r", end="", file=sys.stderr, flush=True)
        self._width = 0
