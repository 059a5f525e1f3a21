"""How much memory this process may take: the machine's, or less where a control group limits it."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

# Linux tells "no limit" of version 1 as a number near 2^63.
_NO_LIMIT = 1 << 60


def memory_of_machine(root: Path = Path("/")) -> int:
    """Bytes; 0 where the system does not tell.

    Args:
        root: under which /proc and /sys are.
    """
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        found = 0
    limits = [limit for limit in _limits(root) if limit < _NO_LIMIT]
    return min([found, *limits] if found else limits, default=0)


def _limits(root: Path) -> list[int]:
    """Of this process's control group and all above it: each of them holds."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found: list[int] = []
    for line in lines:  # "0::/job/step" of version 2, "9:memory:/job/step" of version 1
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            top, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        own = PurePosixPath(path.lstrip("/"))
        # In a container the path may be the host's, of which only the top is mounted.
        for folder in (own, *own.parents):
            limit = _number(top / folder / name)
            if limit is not None:
                found.append(limit)
    return found


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isdecimal() else None  # else "max"
