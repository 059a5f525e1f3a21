"""Checks of the sizes that schedules are built from, shared by their builders."""

from __future__ import annotations


def require_count(schedule: str, name: str, value: object) -> None:
    """Raise ValueError unless `value` is a whole number from 1 up; bool does not count as one."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{schedule}: {name} must be a whole number from 1 up, got {value!r}")


def require_filled(schedule: str, ranks: int, microbatches: int, even: bool) -> None:
    """Raise ValueError unless there are at least 2 * ranks micro-batches.

    Args:
        schedule: name, for the message.
        ranks: pipeline ranks.
        microbatches: micro-batches a step.
        even: whether the advice must name an even number of ranks.
    """
    if microbatches < 2 * ranks:
        fits = microbatches // 4 * 2 if even else microbatches // 2
        fewer = f", or at most {fits} ranks" if fits else ""
        raise ValueError(
            f"{schedule}: microbatches={microbatches} is too few for ranks={ranks}, as 2 * ranks "
            f"of them fill the pipeline; use at least {2 * ranks} micro-batches{fewer}"
        )
