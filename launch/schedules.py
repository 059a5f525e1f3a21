"""Which pipeline schedule a command means: one by name, or one from a file. No torch."""

from __future__ import annotations

from pathlib import Path

from ..parallel.schedule import Schedule, ScheduleError, load, names, verify
from ..parallel.schedule.named.catalogue import options
from ..parallel.simulate import Costs
from ..parallel.simulate.compare import tailored


def find_schedule(
    name: str,
    *,
    ranks: int | None,
    microbatches: int | None,
    stages_per_rank: int | None = None,
    costs: Costs | None = None,
) -> Schedule:
    """The verified schedule that a name or a file gives for these sizes.

    Args:
        name: one of `parallel.schedule.names()`, or the path of a schedule file.
        ranks: pipeline ranks; None with a file takes the file's.
        microbatches: micro-batches a step; None with a file takes the file's.
        stages_per_rank: for the schedules that have this option; None: their default.
        costs: of a stage, for the schedules that are made to measure; None: F, I and W are equal.

    Raises:
        ValueError: no such schedule, not for these sizes, or the file holds none that can run.
    """
    if name in names() or not Path(name).exists():
        if name not in names() and ("/" in name or Path(name).suffix):
            raise ValueError(f"{name}: no such schedule file")
        known = options(name)  # of an unknown name, an error with the nearest one
        if stages_per_rank is not None and "stages_per_rank" not in known:
            takers = ", ".join(n for n in names() if "stages_per_rank" in options(n))
            raise ValueError(
                f"{name}: how many stages a rank has is fixed; leave stages_per_rank out, or take "
                f"{takers}"
            )
        sizes = require_sizes(f"schedule {name!r}", ranks, microbatches)
        return tailored(name, *sizes, costs or Costs(), stages_per_rank)
    schedule = _from_file(name)
    for what, wanted, has in (
        ("ranks", ranks, schedule.num_ranks),
        ("micro-batches", microbatches, schedule.num_microbatches),
        ("stages a rank", stages_per_rank, schedule.num_stages // schedule.num_ranks),
    ):
        if wanted is not None and wanted != has:
            raise ValueError(f"{name}: the schedule in this file has {has} {what}, not {wanted}")
    return schedule


def require_sizes(who: str, ranks: int | None, microbatches: int | None) -> tuple[int, int]:
    """Both sizes.

    Raises:
        ValueError: `who` needs what is missing.
    """
    if ranks is None or microbatches is None:
        given = {"--ranks": ranks, "--microbatches": microbatches}
        missing = " and ".join(flag for flag, size in given.items() if size is None)
        raise ValueError(f"{who} needs {missing}")
    return ranks, microbatches


def _from_file(name: str) -> Schedule:
    try:
        schedule = load(name)
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {error.strerror}") from None
    try:
        verify(schedule)
    except ScheduleError as error:
        raise ValueError(f"{name}: {error}") from None
    return schedule
