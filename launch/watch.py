"""Says where a rank stood when a signal ends it, even in a wait of the communication library.

Python runs signal handlers between bytecodes of the main thread, so a rank that is blocked in a
wait would be killed without a word. The interpreter also writes each signal's number to a file
descriptor at once (signal.set_wakeup_fd); a thread here reads it, prints one line and ends the
process.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from types import TracebackType

_STDERR = 2


class SignalWatch:
    """While open, SIGTERM and SIGINT end this process with one line from `where()` on stderr.

    Exit status: 128 + the signal's number.

    Args:
        where: what the main thread is doing; called from another thread.

    Raises:
        ValueError: opened by another thread than the main one.
    """

    def __init__(self, where: Callable[[], str]) -> None:
        self._where = where
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="signal-watch", daemon=True)
        self._handlers: list[tuple[signal.Signals, object]] = []
        self._wakeup_fd = -1

    def __enter__(self) -> SignalWatch:
        self._wakeup_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            # A handler must be there for the interpreter to write to the descriptor at all.
            self._handlers.append((number, signal.signal(number, lambda *_: None)))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        while data := self._reader.recv(1):
            if data[0] in (signal.SIGTERM, signal.SIGINT):
                self._end(signal.Signals(data[0]))

    def _end(self, number: signal.Signals) -> None:
        try:
            try:
                where = self._where()
            except Exception as error:
                where = f"position unknown ({type(error).__name__})"
            line = f"counterflow: error: {where}: ended by {number.name}\n"
            # Not sys.stderr: the main thread may hold its lock.
            os.write(_STDERR, line.encode(errors="replace"))
        finally:
            os._exit(128 + number)
