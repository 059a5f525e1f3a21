"""`counterflow launch local`: a run on this machine, started again where that helps."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
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
        flags = ["--run.max_restarts", str(local.max_restarts), "--run.logs", "true"]
        command = [sys.executable, "-m", "counterflow", "train", *train, *flags]
        print(shlex.join(command))
        return 0
    for again in range(local.max_requeues + 1):
        before = newest_step(config.run.path)
        status = start_here(config, preflight=True)
        after = newest_step(config.run.path)
        if status != FAILED or after <= before or again == local.max_requeues:
            return status
        print(
            f"counterflow: the run failed after progress: starting it again from step {after} "
            f"({again + 1} of at most {local.max_requeues})",
            flush=True,
        )
        config = replace(config, checkpoint=replace(config.checkpoint, resume="latest"))
    raise AssertionError("the last round returns")


def newest_step(run: Path) -> int:
    """The step of a run's newest finished checkpoint, -1 where there is none."""
    names = (path.name.removeprefix("step-") for path in run.glob("checkpoints/step-*"))
    return max((int(name) for name in names if name.isdecimal()), default=-1)
