"""Where a rank stands that saves or reads a checkpoint, for whoever waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from ...comm.waiting import WaitBoard, name_ranks
from .storage import WAITING


class _Wait(NamedTuple):
    """Who waits for what from whom."""

    thread: int
    what: str
    peers: Sequence[int]


class Stand:
    """What is being done for the checkpoint of a step, and since when.

    `say` is called by the thread that does it. While a wait for it lasts, the board's line tells it
    too, so that whoever watches the line sees that bytes move.
    """

    def __init__(self, step: int, board: WaitBoard) -> None:
        self.step, self._board = step, board
        self._wait: _Wait | None = None
        self.say(WAITING)

    def say(self, doing: str) -> None:
        """Something else is being done, or more of it is."""
        self.doing, self.since = doing, time.monotonic()
        if self._wait is not None and self._wait.thread == threading.get_ident():
            self.show()

    def show(self) -> None:
        """Put what is being done on the board; for the thread that waits."""
        if self._wait is not None:
            ranks = name_ranks(self._wait.peers)
            self._board.now = f"waiting for {self._wait.what} ({self.doing}) from {ranks}"

    @contextmanager
    def waiting(self, what: str, peers: Sequence[int]) -> Iterator[None]:
        """Within this context this thread waits for `what` from the global ranks `peers`."""
        with self._board.waiting(what, peers):
            self._wait = _Wait(threading.get_ident(), what, peers)
            try:
                yield
            finally:
                self._wait = None
