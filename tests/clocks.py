"""Times that a busy machine stretches, measured so that it does not matter."""

from __future__ import annotations

from collections.abc import Callable


def least_seconds(measure: Callable[[], float], *, enough_s: float, tries: int) -> float:
    """The least of what `measure` returns in up to `tries` calls; below `enough_s`, once will do.

    A busy machine stretches even seconds of the processor at times, and never shortens them.
    """
    least = measure()
    for _ in range(tries - 1):
        if least < enough_s:
            break
        least = min(least, measure())
    return least
