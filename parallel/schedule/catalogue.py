"""Schedules by name."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from .dualpipe import dualpipe
from .dualpipev import dualpipev
from .one_f_one_b import one_f_one_b
from .schedule import Schedule

_BUILDERS: dict[str, Callable[[int, int], Schedule]] = {
    "1f1b": one_f_one_b,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}


def names() -> tuple[str, ...]:
    """Names that `build` knows."""
    return tuple(_BUILDERS)


def build(name: str, *, ranks: int, microbatches: int) -> Schedule:
    """The schedule called `name`; it always verifies.

    Args:
        name: one of `names()`.
        ranks: pipeline ranks.
        microbatches: micro-batches a step, of all ranks together.

    Raises:
        ValueError: the name is unknown (the message has the nearest one), or this schedule does not
            exist for these sizes.
    """
    if name not in _BUILDERS:
        near = get_close_matches(name.lower(), _BUILDERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"unknown schedule {name!r}{hint} Known: {', '.join(_BUILDERS)}")
    return _BUILDERS[name](ranks, microbatches)
