"""Schedules by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches

from ..schedule import Schedule
from .dualpipe import dualpipe
from .dualpipev import dualpipev
from .gpipe import gpipe
from .interleaved import interleaved
from .one_f_one_b import one_f_one_b
from .v_half import v_half
from .v_min import v_min
from .zb_h1 import zb_h1
from .zb_h2 import zb_h2
from .zb_p import zb_1p, zb_2p
from .zbv import zbv

# A builder's keyword-only parameters are the options that `build` hands on to it.
_BUILDERS: dict[str, Callable[..., Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
    "zb-1p": zb_1p,
    "zb-2p": zb_2p,
    "zbv": zbv,
    "v-half": v_half,
    "v-min": v_min,
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
        raise ValueError(f"unknown schedule {name!r}{hint} known: {', '.join(_BUILDERS)}")
    return _BUILDERS[name]
