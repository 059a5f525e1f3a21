"""The alarm of a run: a key in the store where ranks meet, which every watchdog looks at.

Rung by a rank that cannot go on, or by the agent of a machine that has lost one.
"""

from __future__ import annotations

import json
import os
import select
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

FINISHED = "has finished"  # how a rank is gone that ended well

_KEY = "alarm"


def board(store: Store, attempt: int) -> Store:
    """The part of `store` that belongs to the watchdogs of the ranks' `attempt`-th start."""
    from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]

    return PrefixStore(f"attempt{attempt}/watchdog", store)


def ring(board: Store, why: str) -> None:
    """Alarm all ranks, if nobody has yet."""
    board.compare_set(_KEY, "", why)


def rung(board: Store) -> str | None:
    """Why there is an alarm, None if there is none."""
    return board.get(_KEY).decode() if board.check([_KEY]) else None


def mark_gone(board: Store, rank: int, how: str) -> None:
    """Tell that a rank has ended: nobody need wait for its answer."""
    add_row(board, "gone", (rank, how))


def add_row(board: Store, name: str, row: Sequence[object]) -> None:
    """Add to a list that is read whole: thousands of ranks would else be asked one by one.

    Args:
        board: where the list is.
        name: of the list.
        row: what JSON can hold; begins with the rank whose row it is.
    """
    board.append(name, json.dumps(row) + "\n")  # pyright: ignore[reportAttributeAccessIssue]
    board.add(f"{name}/count", 1)


def num_rows(board: Store, name: str) -> int:
    """How many rows a list has."""
    return board.add(f"{name}/count", 0)


def rows(board: Store, name: str) -> dict[int, list[Any]]:
    """What follows the rank in each row of a list, by rank; a rank's last row counts."""
    text = board.get(name).decode() if board.check([name]) else ""
    found = (json.loads(line) for line in text.splitlines())
    return {rank: rest for rank, *rest in found}


class Lifeline:
    """A connection that says whether the store's process is still there.

    A store's own client would log pages of C++ frames when it finds the other end gone.

    Raises:
        OSError: nobody listens there.
    """

    def __init__(self, address: str, port: int, *, limit_s: float = 10.0) -> None:
        self._socket = socket.create_connection((address, port), timeout=limit_s)

    def broken(self) -> bool:
        """Whether the other end has gone."""
        readable, _, _ = select.select([self._socket], [], [], 0)
        try:
            return bool(readable) and not self._socket.recv(1)
        except OSError:
            return True

    def close(self) -> None:
        self._socket.close()


def attempt_number() -> int:
    """How often torchrun has started this rank again: 0 the first time, and without torchrun."""
    text = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(text) if text.isdigit() else 0
