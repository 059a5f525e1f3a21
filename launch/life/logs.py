"""Each rank's output in a file of its own, whatever writes it and however the rank ends.

A small process between the rank and the console copies what comes through a pipe to the log. It
outlives the rank, so a rank that is killed loses nothing that it had written; and what C++ code
writes to the descriptors is caught like everything else.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..settings import ConfigError

FOLDER = "logs"
_ERROR = b"counterflow: error: "
_STDOUT, _STDERR = 1, 2
_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]")  # of a terminal: colours, moves, erasing
_END_S = 5.0


def log_path(folder: Path, rank: int) -> Path:
    """Where the output of a rank of the run in `folder` lies."""
    return folder / FOLDER / f"rank{rank:05d}.log"


@contextmanager
def rank_logs(folder: Path, rank: int) -> Iterator[None]:
    """Within this context this process's stdout and stderr are also written to the rank's log.

    Rank 0's output reaches the console as before; of the others' only the lines that tell errors
    (`counterflow: error: ...`, and indented lines after one). Forks, so open it before threads are
    started.

    Args:
        folder: of the run; the log is FOLDER/logs/rank00003.log, to which every start appends.
        rank: this process's.

    Raises:
        ConfigError: the log cannot be written.
    """
    path = log_path(folder, rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(log, _header(rank))
    except OSError as error:
        raise ConfigError(
            f"{error.filename or path}: cannot be written: {error.strerror}; make room, make it "
            "writable, or set run.logs to false"
        ) from None
    _flush()
    consoles = {number: os.dup(number) for number in (_STDOUT, _STDERR)}
    pipes = {number: _pipe(number) for number in consoles}
    child = os.fork()
    if child == 0:
        _copy({pipes[n][0]: _Stream(log, consoles[n], rank == 0) for n in pipes})
    for number, (reader, writer) in pipes.items():
        os.close(reader)
        os.dup2(writer, number)
        os.close(writer)
    os.close(log)
    try:
        yield
    finally:
        _flush()
        for number, console in consoles.items():
            os.dup2(console, number)  # closes the pipe, which ends the child
            os.close(console)
        _await(child)


def _header(rank: int) -> bytes:
    """Which start of this rank the lines after it are from."""
    parts = [
        time.strftime("%Y-%m-%d %H:%M:%S%z"),
        f"rank {rank}",
        f"host {socket.gethostname()}",
        f"process {os.getpid()}",
        f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
    ]
    if "SLURM_JOB_ID" in os.environ:
        count = os.environ.get("SLURM_RESTART_COUNT", "0")
        parts.append(f"Slurm job {os.environ['SLURM_JOB_ID']}, requeued {count} times")
    return f"--- {', '.join(parts)}\n".encode()


def _pipe(number: int) -> tuple[int, int]:
    """Two ends; the written one is a terminal where stdout or stderr is, so that bars stay live."""
    if not os.isatty(number):
        return os.pipe()
    import pty
    import termios
    import tty

    reader, writer = pty.openpty()
    tty.setraw(writer)  # the real terminal makes line ends
    termios.tcsetwinsize(writer, termios.tcgetwinsize(number))
    return reader, writer


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


def _await(child: int) -> None:
    end = time.monotonic() + _END_S
    while time.monotonic() < end:
        with suppress(ChildProcessError):
            if os.waitpid(child, os.WNOHANG)[0] == 0:
                time.sleep(0.005)
                continue
        return


class _Stream:
    """One of the rank's two streams, in the process that copies.

    Args:
        log, console: descriptors.
        whole: whether the console gets everything.
    """

    def __init__(self, log: int, console: int, whole: bool) -> None:
        self.console = console
        self.log, self._whole = log, whole
        self._rest = b""  # a line that has not ended
        self._in_error = False

    def feed(self, data: bytes) -> None:
        if self._whole:
            _write(self.console, data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line + b"\n")

    def end(self) -> None:
        if self._rest:
            self._line(self._rest)

    def _line(self, line: bytes) -> None:
        # A live bar goes back to the start of its line and writes it anew.
        text = _ESCAPES.sub(b"", line.rstrip(b"\r\n").rpartition(b"\r")[2])
        _write(self.log, text + b"\n")
        self._in_error = text.startswith(_ERROR) or (self._in_error and text.startswith(b"  "))
        if self._in_error and not self._whole:
            _write(self.console, text + b"\n")


def _copy(streams: dict[int, _Stream]) -> None:
    """Copy until the rank and all who have its descriptors are gone; never returns."""
    try:
        os.setsid()  # whoever kills the rank's group must not kill this
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        _close_others({*streams, *(n for s in streams.values() for n in (s.console, s.log))})
        while streams:
            for reader in select.select(list(streams), [], [])[0]:
                try:
                    data = os.read(reader, 1 << 16)
                except OSError:  # a terminal's way to say that the other end is gone
                    data = b""
                if data:
                    streams[reader].feed(data)
                else:
                    streams.pop(reader).end()
    finally:
        os._exit(0)


def _close_others(keep: set[int]) -> None:
    """Close all descriptors but these: the rank's ends of the pipes, and locks that it holds."""
    below = 0
    for number in sorted(keep):
        os.closerange(below, number)
        below = number + 1
    os.closerange(below, max(4096, below))


def _write(number: int, data: bytes) -> None:
    """All of it; a full disk or a console that is gone must not end the copying."""
    while data:
        try:
            data = data[os.write(number, data) :]
        except OSError:
            return
