"""The folder of a run: made, found writable, and kept from other runs of the same name."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from .settings import ConfigError

_log = logging.getLogger(__name__)

LOCK = ".lock"
# What an earlier run of a name leaves, not to be taken for the results of this one.
RESULT = "result.json"
RESULTS = (RESULT, "timeline.json", "load.json", "report.html")
# Says that a run was asked to stop, and where it then stood.
STOPPED_FILE = "stopped.json"
# Says which launch the run that lies here belongs to.
BEGUN_FILE = "begun.json"
_PICTURES = [f"{name}.{form}" for name in ("loss", "timeline", "load") for form in ("svg", "png")]
_FILES = ("config.toml", "metrics.jsonl", STOPPED_FILE, *RESULTS, *_PICTURES)


@contextmanager
def claim(folder: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Make the folder of a run and keep it for this process as long as the context lasts.

    An advisory lock on FOLDER/.lock, which the kernel releases when the process is gone, however it
    ended. A rank whose launcher has the folder shares it.

    Args:
        folder: of the run.
        wait_s: how long to wait for another process that has it, seconds.

    Raises:
        ConfigError: another run has the folder, or results cannot be written to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder}: cannot be written: {error.strerror}; choose another "
            "run.folder or run.name, or make it writable"
        ) from None
    with file:
        limit = time.monotonic() + wait_s
        while not _locked(file, folder, last=time.monotonic() >= limit):
            time.sleep(min(1.0, wait_s))
        _require_writable(folder)
        yield


def _locked(file: TextIO, folder: Path, *, last: bool) -> bool:
    """Lock the file for this process, if no other has it; raises at the last try."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        if holder == _process(os.getppid()):
            return True
        if not last:
            return False
        raise ConfigError(
            f"{folder}: another run is writing its results here ({holder or 'still starting'}); "
            "wait until it has ended, or give this run another run.name"
        ) from None
    except OSError as error:  # some network file systems have no locks
        _log.warning("%s: runs of one name are not kept apart here: %s", folder, error.strerror)
        return True
    file.truncate(0)
    file.write(f"{_process(os.getpid())}\n")
    file.flush()
    return True


def _process(pid: int) -> str:
    return f"process {pid} on {socket.gethostname()}"


def _require_writable(folder: Path) -> None:
    """The files that a run will open may be there already, and be something else."""
    for path in (folder, *(folder / name for name in _FILES)):
        if path != folder and path.is_dir():
            reason = "it is a folder"
        elif path.exists() and not os.access(path, os.W_OK):
            reason = "permission denied"
        else:
            continue
        raise ConfigError(
            f"{path}: cannot be written: {reason}; choose another run.name, or move it away"
        )
