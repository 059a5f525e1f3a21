"""Says on stderr what `counterflow simulate` is at, where that takes long."""

from __future__ import annotations

import sys
from threading import Timer
from types import TracebackType
from typing import Self

# Where no terminal is looked at, nothing is said of what takes less.
AFTER_S = 3.0

_WIDTH = 30


class Progress:
    """In a terminal a line that changes and goes away; elsewhere one line, after AFTER_S."""

    def __init__(self) -> None:
        self._name = ""
        self._shows = sys.stderr.isatty()
        self._timer = Timer(AFTER_S, self._say)
        self._timer.daemon = True  # so that an interrupt need not wait for it

    def __enter__(self) -> Self:
        if not self._shows:
            self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        if self._shows:
            self.tell("")

    def tell(self, name: str) -> None:
        """What is simulated from now on."""
        self._name = name
        if self._shows:
            print(f"\r{name[:_WIDTH]:<{_WIDTH}}\r", end="", file=sys.stderr, flush=True)

    def _say(self) -> None:
        now = f", now at {self._name}" if self._name else ""
        print(f"counterflow: simulating{now}; this takes a while", file=sys.stderr, flush=True)
