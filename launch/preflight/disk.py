"""Whether a run's folder can hold its checkpoints."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from ..config import Config
from .finding import Finding

CHECK = "disk"


def disk_findings(config: Config, checkpoint_bytes: int) -> list[Finding]:
    """Refuses a folder that cannot be written or has too little room.

    The folder is all nodes' in common, so what is wrong with it is the job's, not a node's. Counted
    are checkpoint.keep of them and the one being written; what the run has already is there twice,
    as used space and as part of what is needed, so that it is taken off.

    Args:
        config: of the run.
        checkpoint_bytes: of one checkpoint.
    """
    if not config.checkpoint.enabled:
        return []
    folder = config.run.path
    there = _nearest(folder)
    problem = _why_not_writable(there)
    if problem:
        message = f"{there} cannot be written: {problem}; set run.folder to one that can"
        return [Finding(CHECK, "bad", message)]
    copies = config.checkpoint.keep + 1
    needed = copies * checkpoint_bytes - _bytes_in(folder / "checkpoints")
    free = shutil.disk_usage(there).free
    if needed <= free:
        return []
    return [
        Finding(
            CHECK,
            "bad",
            f"{copies} checkpoints (checkpoint.keep={config.checkpoint.keep} and the one being "
            f"written) of {_text(checkpoint_bytes)} need {needed} bytes more, {there} has {free} "
            f"bytes free ({_text(needed)}, {_text(free)}); make room, lower checkpoint.keep, or "
            "set run.folder elsewhere",
        )
    ]


def _nearest(folder: Path) -> Path:
    """The folder itself, or the first above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _why_not_writable(folder: Path) -> str:
    """Tries it: permissions alone do not tell of read-only file systems and quotas."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"counterflow")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # removed while we look
            continue
    return total


def _text(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"
