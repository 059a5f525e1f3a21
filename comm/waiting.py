"""What this rank is waiting for at the moment, so that whoever ends it can say so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class WaitBoard:
    """Holds one line while a wait lasts. Written by the thread that waits, read by any other.

    A wait in the communication library cannot be interrupted from Python; a thread that watches for
    signals reads here where the rank stands.
    """

    def __init__(self) -> None:
        self.now = ""

    @contextmanager
    def waiting(self, what: str, peers: Sequence[int]) -> Iterator[None]:
        """Within this context the rank waits for `what` from the global ranks `peers`."""
        before = self.now
        self.now = f"waiting for {what} from {name_ranks(peers)}"
        try:
            yield
        finally:
            self.now = before


def name_ranks(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 1, 2"."""
    listed = ", ".join(map(str, ranks))
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"
