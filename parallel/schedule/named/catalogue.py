"""Schedules by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches

from ..schedule import Schedule
from .dualpipe import dualpipe
from .dualpipev import dualpipev
from .one_f_one_b import one_f_one_b

# A builder's keyword-only parameters are the options that `build` hands on to it.
_BUILDERS: dict[str, Callable[..., Schedule]] = {
    "1f1b": one_f_one_b,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}


def names() -> tuple[str, ...]:
    """Names that `build` knows."""
    return tuple(_BUILDERS)


def options(name: str) -> tuple[str, ...]:
    """Names of the options that `build` takes for the schedule called `name`."""
    parameters = inspect.signature(_builder(name)).parameters.values()
    return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


def build(name: str, *, ranks: int, microbatches: int, **given: object) -> Schedule:
    """The schedule called `name`; it always verifies.

    Args:
        name: one of `names()`.
        ranks: pipeline ranks.
        microbatches: micro-batches a step, of all ranks together.
        given: options of this schedule, `options(name)`, such as interleaved's `stages_per_rank`.

    Raises:
        ValueError: the name is unknown (the message has the nearest one), the schedule has no such
            option, or it does not exist for these sizes.
    """
    builder = _builder(name)
    known = options(name)
    for option in given:
        if option not in known:
            takes = f"its options: {', '.join(known)}" if known else "it has no options"
            raise ValueError(f"{name}: unknown option {option!r}; {takes}")
    return builder(ranks, microbatches, **given)


def _builder(name: str) -> Callable[..., Schedule]:
    if name not in _BUILDERS:
        near = get_close_matches(name.lower(), _BUILDERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"unknown schedule {name!r}{hint} Known: {', '.join(_BUILDERS)}")
    return _BUILDERS[name]
