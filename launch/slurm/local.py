"""`counterflow launch local`: a run on this machine, started again where that helps."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from .section import LocalConfig


def launch_local(local: LocalConfig, train: Sequence[str], *, dry_run: bool) -> int:
    """Check a run, then start its ranks here; the exit status.

    Raises:
        ValueError: nothing was started.
    """
    from ..check import check
    from ..cli import split_arguments
    from ..config import load
    from ..life.status import FAILED
    from ..resume import require_resumable
    from ..start import start_here
    from .resolved import for_launch

    given = load(*split_arguments(train))
    config = for_launch(given, max_restarts=local.max_restarts)
    check(config)
    require_resumable(config)
    if dry_run:
        counts = ("--max-restarts", local.max_restarts, "--max-requeues", local.max_requeues)
        own = [sys.executable, "-m", "counterflow", "launch", "local", *map(str, counts)]
        print(shlex.join([*own, "--", "train", *train]))
        return 0
    for again in range(local.max_requeues + 1):
        before = saved(config.run.path)
        status = start_here(config, preflight=True)
        new = saved(config.run.path) - before
        if status != FAILED or not new or again == local.max_requeues:
            return status
        print(
            "counterflow: the run failed after progress: starting it again from its last "
            f"checkpoint ({again + 1} of at most {local.max_requeues})",
            flush=True,
        )
        config = replace(config, checkpoint=replace(config.checkpoint, resume="latest"))
    raise AssertionError("the last round returns")


def saved(run: Path) -> frozenset[tuple[str, int, int]]:
    """A run's finished checkpoints as they are now; one written anew differs by its time."""
    found: set[tuple[str, int, int]] = set()
    for path in run.glob("checkpoints/step-*"):
        with suppress(OSError):  # just taken away
            told = path.stat()
            found.add((path.name, told.st_ino, told.st_mtime_ns))
    return frozenset(found)
