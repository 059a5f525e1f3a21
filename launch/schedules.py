"""Which pipeline schedule a command means: one by name, or one from a file. No torch."""

from __future__ import annotations

from pathlib import Path

from ..parallel.schedule import Schedule, build, load, names, verify


def find_schedule(name: str, *, ranks: int | None, microbatches: int | None) -> Schedule:
    """The verified schedule that a name or a file gives for these sizes.

    Args:
        name: one of `parallel.schedule.names()`, or the path of a schedule file.
        ranks: pipeline ranks; None with a file takes the file's.
        microbatches: micro-batches a step; None with a file takes the file's.

    Raises:
        ValueError: no such schedule, not for these sizes, or the file holds none that can run.
    """
    if name in names() or not Path(name).exists():
        if name not in names() and ("/" in name or Path(name).suffix):
            raise ValueError(f"{name}: no such schedule file")
        if ranks is None or microbatches is None:
            raise ValueError(f"schedule {name!r} needs --ranks and --microbatches")
        return build(name, ranks=ranks, microbatches=microbatches)
    try:
        schedule = load(name)
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {error.strerror}") from None
    verify(schedule)
    for what, wanted, has in (
        ("ranks", ranks, schedule.num_ranks),
        ("micro-batches", microbatches, schedule.num_microbatches),
    ):
        if wanted is not None and wanted != has:
            raise ValueError(f"{name}: the schedule in this file has {has} {what}, not {wanted}")
    return schedule
