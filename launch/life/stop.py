"""Requests to stop: a signal becomes a wish that training grants at its next step boundary.

Python runs signal handlers between bytecodes of the main thread, so a rank that is blocked in a
wait of the communication library would not hear of a signal. The interpreter also writes each
signal's number to a file descriptor at once (signal.set_wakeup_fd); a thread here reads it.

Signals come by several ways: Slurm sends them to every process of a step or to the launcher alone,
torchrun hands its own on to its ranks. Those within a moment of each other are one request.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType

_STDERR = 2
_REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_HELD = (signal.SIGUSR1, signal.SIGUSR2)
ONE_REQUEST_S = 2.0  # SIGTERMs closer together than this are one


def hold() -> None:
    """Keep SIGUSR1 and SIGUSR2 waiting, in this thread and in processes that it starts.

    Without a handler they would end a process that has not come to its `StopRequests` yet, which
    lets them in.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)


def let_in() -> set[signal.Signals]:
    """End what `hold` began, for a process that listens now; the mask of before."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)
    return {signal.Signals(number) for number in before}


class StopRequests:
    """While open, SIGTERM, SIGUSR1 and SIGUSR2 ask this rank to stop; SIGINT ends it at once.

    A request that is not granted within `grace_s`, and a second SIGTERM, end the process where it
    stands with one line from `where()` on stderr and exit status 128 + the signal's number.

    Args:
        where: what the main thread is doing; called from another thread.
        graceful: False ends the process at once on any of the signals: there is nothing to save.
        grace_s: limit from the request to the end of the process, seconds.
        tell_after_s: from the request until one line says where this rank stands, unless `granted`
            was called; torchrun kills 30 s after its SIGTERM.

    Attributes:
        signal: what asked first, None if nothing has.

    Raises:
        ValueError: opened by another thread than the main one.
    """

    def __init__(
        self,
        where: Callable[[], str],
        *,
        graceful: bool = True,
        grace_s: float = 300.0,
        tell_after_s: float = 20.0,
    ) -> None:
        self.signal: signal.Signals | None = None
        self._where = where
        self._graceful = graceful
        self._grace_s, self._tell_after_s = grace_s, tell_after_s
        self._asked_at = 0.0
        self._first_sigterm: float | None = None
        self._told = False
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="stop-requests", daemon=True)
        self._handlers: list[tuple[signal.Signals, object]] = []
        self._wakeup_fd = -1

    @property
    def asked(self) -> int:
        """1 if this rank was asked to stop, else 0: to be summed over the ranks."""
        return int(self.signal is not None)

    def granted(self) -> None:
        """The ranks have agreed to stop and save: no line need say where this one stands."""
        self._told = True

    def __enter__(self) -> StopRequests:
        self._wakeup_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (*_REQUESTS, signal.SIGINT):
            # A handler must be there for the interpreter to write to the descriptor at all.
            self._handlers.append((number, signal.signal(number, lambda *_: None)))
        self._thread.start()
        self._mask = let_in()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        # Handlers first: while ours, which do nothing, are there, the thread must hear of signals.
        for number, handler in self._handlers:
            # None stands for a handler that Python did not set and cannot set again.
            before = signal.SIG_DFL if handler is None else handler
            signal.signal(number, before)  # pyright: ignore[reportArgumentType]
        signal.set_wakeup_fd(self._wakeup_fd)
        self._writer.close()  # ends the thread
        self._thread.join(1)
        self._reader.close()

    def _watch(self) -> None:
        while True:
            ready, _, _ = select.select([self._reader], [], [], self._until_next())
            if not ready:
                self._overdue()
                continue
            data = self._reader.recv(1)
            if not data:
                return
            if data[0] == signal.SIGINT:
                self._end(signal.SIGINT)
            elif data[0] in _REQUESTS:
                self._hear(signal.Signals(data[0]))

    def _hear(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if not self._graceful:
            self._end(number)
        if number == signal.SIGTERM:
            if self._first_sigterm is None:
                self._first_sigterm = now
            elif now > self._first_sigterm + ONE_REQUEST_S:
                self._end(number)
        if self.signal is None:
            self._asked_at = now
            self.signal = number

    def _until_next(self) -> float | None:
        """Seconds until something is due, None if nothing is."""
        if self.signal is None:
            return None
        due = self._grace_s if self._told else min(self._tell_after_s, self._grace_s)
        return max(0.0, self._asked_at + due - time.monotonic())

    def _overdue(self) -> None:
        if self.signal is None:
            return
        waited = time.monotonic() - self._asked_at
        if waited >= self._grace_s:
            self._end(self.signal, f" {waited:.0f} s after it asked to stop")
        elif not self._told and waited >= self._tell_after_s:
            self._told = True
            self._say(f"asked to stop by {self.signal.name} {waited:.0f} s ago, still here")

    def _end(self, number: signal.Signals, late: str = "") -> None:
        try:
            self._say(f"ended by {number.name}{late}")
        finally:
            os._exit(128 + number)

    def _say(self, what: str) -> None:
        try:
            where = self._where()
        except Exception as error:
            where = f"position unknown ({type(error).__name__})"
        # Not sys.stderr: the main thread may hold its lock.
        line = f"counterflow: error: {where}: {what}\n"
        os.write(_STDERR, line.encode(errors="replace"))
