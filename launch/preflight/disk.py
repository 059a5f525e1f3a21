"""Whether a run's folder can hold its checkpoints."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from ..config import Config
from ..folder import RESULT
from ..resume import CHECKPOINTS, has_begun, launch_name, started_again
from .finding import Finding

CHECK = "disk"
PREVIOUS = "checkpoints.previous"  # where `resume.set_aside` puts the checkpoints of the run before


def disk_findings(
    config: Config, checkpoint_bytes: int, *, node: str = "", launched: bool = False
) -> list[Finding]:
    """Refuses a folder that cannot be written or has too little room.

    The folder is all nodes' in common, so that too little room is the job's mistake; one that a
    node lacks or cannot write to may be that node's.

    Args:
        config: of the run.
        checkpoint_bytes: of one checkpoint.
        node: this one's name.
        launched: the launcher has made the run's folder. If it is not here, its file system is not:
            what lies above it is another.
    """
    if not config.checkpoint.enabled:
        return []
    folder = config.run.path
    if launched and not folder.is_dir():
        message = f"{folder} is not here, though the launcher has made it; see to its file system"
        return [Finding(CHECK, "bad", message, node, kind="folder", configured=True)]
    there = folder if launched else _nearest(folder)
    problem = _why_not_writable(there)
    if problem:
        message = f"{there} cannot be written: {problem}; set run.folder to one that can"
        return [Finding(CHECK, "bad", message, node, kind="folder", configured=True)]
    copies = config.checkpoint.keep + 1
    # Before what is there can go, one new checkpoint must be whole.
    needed = max(copies * checkpoint_bytes - _freed(config), checkpoint_bytes)
    free = shutil.disk_usage(there).free
    if needed <= free:
        return []
    message = (
        f"{copies} checkpoints (checkpoint.keep={config.checkpoint.keep} and the one being "
        f"written) of {_text(checkpoint_bytes)} need {needed} bytes more, {there} has {free} "
        f"bytes free ({_text(needed)}, {_text(free)}); make room, lower checkpoint.keep, or "
        "set run.folder elsewhere"
    )
    return [Finding(CHECK, "bad", message, kind="room")]


def _freed(config: Config) -> int:
    """Bytes that a run will free: of what it goes on from, or of what lies two runs back.

    A run that goes on removes its older checkpoints as new ones come. One that begins sets them
    aside, and removes what was set aside before.
    """
    folder = config.run.path
    own, aside = folder / CHECKPOINTS, folder / PREVIOUS
    if not any(own.glob("step-*")):
        return _bytes_in(own)  # what was left half written
    return _bytes_in(own if _goes_on(config) else aside)


def _goes_on(config: Config) -> bool:
    """Whether the run goes on from its checkpoints, as `resume.decide` will say."""
    resume = config.checkpoint.resume
    if started_again() and has_begun(config.run.path, launch_name()):
        return True
    if resume == "auto":
        return not (config.run.path / RESULT).exists()
    return resume == "latest"


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
