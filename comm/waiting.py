"""What this rank is waiting for, so that whoever ends it can say so, and how long it has waited."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class WaitBoard:
    """Holds one line while a wait lasts. Written by the thread that waits, read by any other.

    A wait in the communication library cannot be interrupted from Python; a thread that watches for
    signals reads here where the rank stands.

    Attributes:
        now: the line; "" where nothing is waited for.
        waited_s: seconds that the thread which made the board has been in waits. Waits within waits
            count once, and those of other threads, which hold up nobody by themselves, not at all.
    """

    def __init__(self) -> None:
        self.now = ""
        self.waited_s = 0.0
        self._thread = threading.get_ident()
        self._inside = False  # that thread is in a wait

    @contextmanager
    def waiting(self, what: str, peers: Sequence[int]) -> Iterator[None]:
        """Within this context the rank waits for `what` from the global ranks `peers`."""
        before = self.now
        self.now = f"waiting for {what} from {name_ranks(peers)}"
        counts = not self._inside and threading.get_ident() == self._thread
        if counts:
            self._inside = True
        began = time.perf_counter()
        try:
            yield
        finally:
            if counts:
                self.waited_s += time.perf_counter() - began
                self._inside = False
            self.now = before


def name_ranks(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 1, 2"."""
    listed = ", ".join(map(str, ranks))
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"
