"""Turns a hang, or the loss of a rank, into one message that tells where every rank stands.

Each rank has a thread that looks whether its rank still moves, and whether another has rung the
alarm. Then every rank puts where it stands into the store, one of them prints the table, and all
end.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from . import alarm
from .standing import Standing, table
from .status import FAILED

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

    from ..world import Place

_STDERR = 2
_LOOK_S = 1.0
_STORE_S = 10.0  # limit of one question to the store
_AWAIT_S = 0.05  # between looks for what others put into the store
_FEW = 256  # ranks that may all look that often; more of them look more seldom
_ANSWER_OF_RANK_S = 0.001  # more time to answer for each rank


class Watchdog:
    """While open, watches this rank; to be opened after the ranks have joined.

    When this rank has not moved for `limit_s`, or any rank reports a failure, or a machine's agent
    has lost one, one rank prints where all stand, and this process ends with FAILED.

    Args:
        where: what the main thread is doing; called from another thread. Ends with "waiting for
            WHAT from rank N" during a wait. Any change of it is a movement: long work of which only
            a number can be told, such as the bytes of a file read so far, tells that.
        place: this rank's.
        limit_s: how long `where` may stay the same, seconds; above the limit of a wait, whose own
            error says more.
        answer_s: how long the ranks have to answer an alarm, seconds; thousands get a little more.
    """

    def __init__(
        self, where: Callable[[], str], place: Place, *, limit_s: float, answer_s: float = 5.0
    ) -> None:
        self._where, self._place = where, place
        self._limit_s = limit_s
        self._answer_s = answer_s + _ANSWER_OF_RANK_S * place.world_size
        self._await_s = _AWAIT_S * max(1.0, place.world_size / _FEW)
        self._look_s = min(_LOOK_S, limit_s / 10)
        self._board: Store | None = None
        self._lifeline: alarm.Lifeline | None = None
        self._failure: tuple[str, tuple[int, ...]] | None = None
        self._closing = threading.Event()
        self._wake = threading.Event()
        self._finished = threading.Event()
        self._told = False
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._place.world_size > 1:
            self._connect()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._wake.set()
        self._thread.join(_STORE_S)
        board = self._reachable()
        if board is not None and error is None:
            with suppress(RuntimeError):  # whoever holds the store may end first
                alarm.mark_gone(board, self._place.rank, alarm.FINISHED)
        if self._lifeline is not None:
            self._lifeline.close()

    def report(self, failure: str, peers: tuple[int, ...] = ()) -> bool:
        """This rank cannot go on: have all ranks tell where they stand, and end.

        Args:
            failure: one line that begins with this rank's position.
            peers: whom it waited for.

        Returns:
            Whether the table that was printed has `failure`, so that nobody need print it again.
        """
        self._failure = (failure, peers)
        self._wake.set()
        self._finished.wait(self._answer_s + _STORE_S)
        return self._told

    def _connect(self) -> None:
        import torch.distributed as dist

        place = self._place
        try:
            self._lifeline = alarm.Lifeline(place.master_addr, place.master_port)
            store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
                place.master_addr,
                place.master_port,
                is_master=False,
                timeout=timedelta(seconds=_STORE_S),
                wait_for_workers=False,
            )
            self._board = alarm.board(store, alarm.attempt_number())
            alarm.add_row(self._board, "hosts", (place.rank, socket.gethostname()))
        except (OSError, RuntimeError):
            self._board = None  # watches this rank alone

    def _run(self) -> None:
        try:
            self._watch()
        finally:
            self._finished.set()

    def _watch(self) -> None:
        last, since = "", time.monotonic()
        looked = since
        while not self._closing.is_set():
            self._wake.wait(self._look_s)
            now = time.monotonic()
            line = self._line()
            if line != last or now > looked + self._limit_s / 2:  # moved, or was stopped itself
                last, since = line, now
            looked = now
            why = self._rung()
            if why is None and self._failure is not None:
                why = self._failure[0]
            elif why is None and now >= since + self._limit_s:
                why = f"{line}: has not moved for {now - since:.0f} s"
            if why is None:
                continue
            if self._closing.is_set() and self._failure is None:
                return
            self._told = self._tell(why)
            if self._failure is None:
                os._exit(FAILED)
            return

    def _line(self) -> str:
        try:
            return self._where()
        except Exception as error:
            return f"rank {self._place.rank}, position unknown ({type(error).__name__})"

    def _reachable(self) -> Store | None:
        if self._lifeline is None or self._lifeline.broken():
            self._board = None
        return self._board

    def _rung(self) -> str | None:
        board = self._reachable()
        try:
            return None if board is None else alarm.rung(board)
        except RuntimeError:
            self._board = None
            return None

    def _tell(self, why: str) -> bool:
        """Have the table printed; returns whether it was, with this rank in it."""
        board = self._reachable()
        try:
            if board is not None:
                alarm.ring(board, why)
                why = alarm.rung(board) or why
                return self._answer(board, why)
        except RuntimeError:
            pass
        if self._failure is None:  # else whoever reported says it
            own, line = f"rank {self._place.rank}, ", self._line()
            self._say(f"counterflow: error: {why if why.startswith(own) else f'{line}: {why}'}\n")
        return False

    def _answer(self, board: Store, why: str) -> bool:
        rank, began = self._place.rank, time.monotonic()
        line, peers = self._failure or (self._line(), ())
        alarm.add_row(board, "answers", (rank, line, peers))
        first = board.add("printers", 1) == 1
        if first:
            self._await(board, began + self._answer_s, self._all_answered)
            self._print(board, why)
            return True
        more_s = 2 * (_LOOK_S + self._await_s)
        late = began + self._answer_s + more_s
        if self._await(board, late, lambda board: board.check(["printed"])):
            return True
        if board.add("second printers", 1) == 1:  # the first is gone itself
            self._print(board, why)
            return True
        return self._await(board, late + more_s, lambda board: board.check(["printed"]))

    def _await(self, board: Store, end: float, so: Callable[[Store], bool]) -> bool:
        while not so(board):
            if time.monotonic() > end:
                return False
            time.sleep(self._await_s)
        return True

    def _all_answered(self, board: Store) -> bool:
        world = self._place.world_size
        if alarm.num_rows(board, "answers") + alarm.num_rows(board, "gone") < world:
            return False
        # A rank may have answered and gone.
        return len({*alarm.rows(board, "answers"), *alarm.rows(board, "gone")}) == world

    def _print(self, board: Store, why: str) -> None:
        self._say(table(why, _standings(board, self._place.world_size)))
        board.set("printed", "")

    def _say(self, text: str) -> None:
        # Not sys.stderr: the main thread may hold its lock. In one write.
        with suppress(OSError):
            os.write(_STDERR, text.encode(errors="replace"))


def _standings(board: Store, world_size: int) -> list[Standing]:
    hosts, answers = alarm.rows(board, "hosts"), alarm.rows(board, "answers")
    gone = alarm.rows(board, "gone")
    found: list[Standing] = []
    for rank in range(world_size):
        (host,), (how,) = hosts.get(rank, ("",)), gone.get(rank, ("",))
        line, peers = answers.get(rank, ("", ()))
        found.append(Standing(rank, host, line, tuple(peers), how))
    return found
