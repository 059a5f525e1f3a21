"""A file of lines for which a full disk is no end: what cannot be written waits in memory."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_log = logging.getLogger(__name__)
# Lines of metrics are about 1 KiB each.
MAX_WAITING = 10_000

Keep = Callable[[bytes], bool]


class LineFile:
    """Appends lines, each of which is wholly in the file or not at all.

    No method raises OSError. Where the disk is full or broken, the first error is warned of, and
    lines wait in memory, in order, for a later call that can write them. Only a process that is
    killed within a call can leave half a line, at the end, which the next LineFile drops.

    Args:
        path: of the file; made if it is not there.
        keep: whether a line that is there stays; None: none does.
    """

    def __init__(self, path: Path, keep: Keep | None) -> None:
        self._path = path
        self._fd: int | None = None
        self._end = 0  # of the last whole line, in bytes
        self._torn = False  # there may be half a line after it
        self._keep: list[Keep] = [keep or (lambda _: False)]  # what the file is still to be cut by
        self._waiting: deque[bytes] = deque()
        self._num_lost = 0
        self._warned = self._failing = False
        self._attempt(self._flush)

    def write(self, line: bytes) -> None:
        """Append a line, which ends with its newline, or have it wait."""
        assert line.endswith(b"\n")
        self._waiting.append(line)
        self._attempt(self._flush)
        while len(self._waiting) > MAX_WAITING:
            self._waiting.popleft()
            self._num_lost += 1

    def cut(self, keep: Keep) -> None:
        """Drop lines that `keep` is False of, from the file and from what waits."""
        self._waiting = deque(line for line in self._waiting if keep(line))
        self._keep.append(keep)
        self._attempt(self._flush)

    def sync(self) -> None:
        """Have all lines on the disk itself, where they outlive the machine."""
        self._attempt(self._sync)

    def close(self) -> None:
        """Write what can be written, and say what could not."""
        self._attempt(self._flush)
        if num_lost := self._num_lost + len(self._waiting):
            _log.warning("%s: %d lines could not be written and are lost", self._path, num_lost)
        if self._fd is not None:
            descriptor, self._fd = self._fd, None
            self._attempt(lambda: os.close(descriptor))

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self._failing = True
            with suppress(OSError):  # else before the next line
                self._mend()
            if not self._warned:
                self._warned = True
                _log.warning(
                    "%s cannot be written: %s; training goes on, and up to %d lines wait in memory "
                    "until it can: free space on that disk, or have its quota raised",
                    self._path,
                    error.strerror,
                    MAX_WAITING,
                )
        else:
            if self._failing:
                self._failing = False
                _log.info("%s can be written again", self._path)

    def _flush(self) -> None:
        if self._fd is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._fd = os.open(self._path, flags, 0o666)
        if self._keep:
            self._cut(self._fd)
        self._mend()
        while self._waiting:
            self._torn = True
            left = memoryview(self._waiting[0])
            while left:  # a disk that gets full takes a part first
                left = left[os.write(self._fd, left) :]
            self._torn = False
            self._end += len(self._waiting.popleft())

    def _sync(self) -> None:
        self._flush()
        assert self._fd is not None
        os.fsync(self._fd)

    def _mend(self) -> None:
        """Cut off half a line."""
        if self._torn and self._fd is not None:
            os.ftruncate(self._fd, self._end)
            self._torn = False

    def _cut(self, descriptor: int) -> None:
        """Drop lines in place, which a full disk allows, too.

        What is dropped is the file's end, but for a line or two, which are written again after it.
        """
        end, after = 0, list[bytes]()
        whole = True  # so far, no line has been dropped
        with self._path.open("rb") as file:
            for line in file:
                keeps = line.endswith(b"\n") and all(keep(line) for keep in self._keep)
                whole = whole and keeps
                if whole:
                    end += len(line)
                elif keeps:
                    after.append(line)
        os.ftruncate(descriptor, end)
        self._end, self._torn = end, False
        self._waiting.extendleft(reversed(after))
        self._keep.clear()
