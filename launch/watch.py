"""Says where a rank stood when a signal ends it, even while it waits inside the communication
library.

Python runs signal handlers between bytecodes of the main thread, so a rank that is blocked in a
wait would be killed without a word. The interpreter also writes each signal's number to a file
descriptor at once (signal.set_wakeup_fd); a thread here reads it, prints one line and ends the
process.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import TracebackType


class SignalWatch:
    """While open, SIGTERM and SIGINT end this process with one line from `where()` on stderr.

    Must be opened by the main thread. Exit status: 128 + the signal's number.
    """

    def __init__(self, where: Callable[[], str]) -> None:
        self._where = where
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="signal-watch", daemon=True)
        self._before: list[tuple[signal.Signals, object]] = []

    def __enter__(self) -> SignalWatch:
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            # A handler must be there for the interpreter to write to the descriptor at all.
            self._before.append((number, signal.signal(number, lambda *_: None)))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before:
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._writer.close()  # ends the thread
        self._thread.join(1)
        self._reader.close()

    def _watch(self) -> None:
        while data := self._reader.recv(1):
            number = data[0]
            if number in (signal.SIGTERM, signal.SIGINT):
                name = signal.Signals(number).name
                sys.stderr.write(f"counterflow: error: {self._where()}: ended by {name}\n")
                sys.stderr.flush()
                os._exit(128 + number)
