"""Nodes by name: this one's, many as one short text, and the file that bad ones are written to."""

from __future__ import annotations

import fcntl
import os
import platform
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..slurm.hostlist import is_host_name

BAD_NODES = "COUNTERFLOW_BAD_NODES"  # the variable that names the file
_NUMBERED = re.compile(r"(.*?)([0-9]+)([^0-9]*)")
_LOCK_S = 5.0


def node_name(environ: Mapping[str, str]) -> str:
    """This node's name, by which the scheduler knows it where there is one."""
    return environ.get("SLURMD_NODENAME") or platform.node()


def require_node_name(name: str) -> str:
    """`name`, if it can be that of a node: it will stand in an option of sbatch.

    Raises:
        ValueError: it cannot.
    """
    if not is_host_name(name):
        raise ValueError(
            f"{name!r} is no name of a node; letters, digits, '-', '_' and '.' make one"
        )
    return name


def hostlist(names: Iterable[str]) -> str:
    """Names as Slurm lists them: n01, n02, n03, n07 and x are "n[01-03,07],x"."""
    numbers: dict[tuple[str, int, str], set[int]] = {}
    plain: dict[str, None] = {}
    for name in names:
        found = _NUMBERED.fullmatch(name)
        if found is None:
            plain[name] = None
        else:
            stem, digits, tail = found.groups()
            numbers.setdefault((stem, len(digits), tail), set()).add(int(digits))
    texts: list[str] = []
    for (stem, width, tail), found in sorted(numbers.items()):
        runs = [
            f"{first:0{width}d}" + (f"-{last:0{width}d}" if last > first else "")
            for first, last in _runs(sorted(found))
        ]
        one = len(runs) == 1 and "-" not in runs[0]
        texts.append(f"{stem}{runs[0] if one else '[' + ','.join(runs) + ']'}{tail}")
    return ",".join([*texts, *plain])


def note_bad_nodes(names: Iterable[str], environ: Mapping[str, str]) -> list[str]:
    """Add names to the file that COUNTERFLOW_BAD_NODES names, a line each, each once.

    Nodes may write at the same time: each line is one write at the file's end, under a lock.

    Args:
        names: of nodes.
        environ: where it has no such variable, or an empty one, nothing is written.

    Returns:
        The names that were written now.

    Raises:
        ValueError: a name that is none; nothing is written then.
        OSError: the file cannot be written.
    """
    wanted = [require_node_name(name) for name in dict.fromkeys(names)]
    path = environ.get(BAD_NODES)
    if not path or not wanted:
        return []
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _lock(file)
        known = set(Path(path).read_text(encoding="utf-8", errors="replace").split())
        new = [name for name in wanted if name not in known]
        for name in new:
            os.write(file, f"{name}\n".encode())
        if new:
            os.fsync(file)
    finally:
        os.close(file)  # and the lock with it
    return new


def _lock(file: int) -> None:
    """Wait for the lock, a few seconds; a file system without locks does without."""
    end = time.monotonic() + _LOCK_S
    while time.monotonic() < end:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            return
        else:
            return


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Stretches of consecutive numbers, as first and last."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
