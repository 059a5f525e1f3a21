"""The folder of a run's checkpoints: names, what appears at once, what is removed.

step-00000100            a checkpoint; whole, as it got this name when all of it was on disk
.step-00000100.part      one that is being written
.step-00000100.replaced  one whose place a newer one of the same step is taking
.step-00000100.old       one that is being removed
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from .errors import told

_log = logging.getLogger(__name__)
MANIFEST = "checkpoint.json"
_WHOLE = re.compile(r"step-(\d{8,18})", re.ASCII)
_LEFT = re.compile(r"\.(step-\d{8,18})\.(part|replaced|old)", re.ASCII)


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:08}"


def part_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written."""
    return folder / f".step-{step:08}.part"


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first; whether they are undamaged is not looked at.

    Raises:
        OSError: the folder is there and cannot be looked into.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    steps = [int(found[1]) for name in names if (found := _WHOLE.fullmatch(name))]
    paths = [step_folder(folder, step) for step in sorted(steps, reverse=True)]
    return [path for path in paths if path.name in names and path.is_dir()]


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    step = named_step(path)
    assert step is not None
    return step


def named_step(path: Path) -> int | None:
    """The step in a folder's name; None where it is not named as checkpoints are."""
    found = _WHOLE.fullmatch(path.name)
    return None if found is None else int(found[1])


def clear_leftovers(folder: Path) -> None:
    """Remove what an earlier process left half written or half removed.

    A checkpoint that was to be replaced comes back where the newer one has not taken its place.
    What cannot be moved is logged: it is in nobody's way.

    Raises:
        OSError: the folder cannot be looked into.
    """
    for name in os.listdir(folder):
        found = _LEFT.fullmatch(name)
        if found is None:
            continue
        try:
            if found[2] == "replaced" and not (folder / found[1]).exists():
                (folder / name).rename(folder / found[1])
            else:
                shutil.rmtree(folder / name)
        except OSError as error:
            _log.warning("%s", told(error, folder / name, "cannot be cleared away"))
    sync_folder(folder)


def put_in_place(folder: Path, step: int) -> Path:
    """Give the finished part its name.

    An earlier checkpoint of that step makes room at that moment; `discard` removes what is left.

    Raises:
        OSError: that cannot be; the earlier one is where it was.
    """
    part, target = part_folder(folder, step), step_folder(folder, step)
    replaced = _aside(target, "replaced")
    if target.exists():
        _remove_tree(replaced)
        target.rename(replaced)
    try:
        part.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    sync_folder(folder)
    return target


def discard_replaced(folder: Path, step: int) -> None:
    """Remove the earlier checkpoint of a step whose place has been taken, if there is one."""
    _remove_tree(_aside(step_folder(folder, step), "replaced"))


def remove(path: Path) -> None:
    """Remove a checkpoint: its name first, so that no half of one is ever taken for a whole."""
    doomed = _aside(path, "old")
    _remove_tree(doomed)
    path.rename(doomed)
    sync_folder(path.parent)
    _remove_tree(doomed)


def _aside(path: Path, why: str) -> Path:
    return path.with_name(f".{path.name}.{why}")


def _remove_tree(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
