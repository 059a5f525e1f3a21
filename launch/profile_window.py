"""Which part of a trace is looked at: an annotation, or milliseconds from the trace's begin."""

from __future__ import annotations

from collections import Counter

from ..comm.profile.trace import Interval, Trace

_NS = 1_000_000  # in a millisecond
_SHOWN = 20  # names in a message


def begin_of(trace: Trace) -> int:
    """When the trace begins, ns: its first activity, from which the command counts."""
    return trace.activities[0].start if trace.activities else 0


def window_of(trace: Trace, asked: str | tuple[float, float] | None) -> Interval | str | None:
    """The part of a trace that is asked for, as `analyse` takes it.

    Args:
        trace: of one rank.
        asked: name of an annotation, start and end in ms from the trace's begin, or None for all.

    Raises:
        ValueError: there is none such; with those that there are.
    """
    if asked is None:
        return None
    if isinstance(asked, str):
        _check_name(trace, asked)
        return asked
    begin = begin_of(trace)
    start, end = (begin + round(bound * _NS) for bound in asked)
    last = max((activity.end for activity in trace.activities), default=begin)
    if start >= last or end <= begin:
        raise ValueError(
            f"--window {asked[0]:g}:{asked[1]:g}: nothing runs then; {trace.source} lasts from 0 "
            f"to {(last - begin) / _NS:.3f} ms"
        )
    return start, end


def _check_name(trace: Trace, name: str) -> None:
    counts = Counter(annotation.name for annotation in trace.annotations)
    if name in counts:
        return
    if not counts:
        raise ValueError(
            f"--window {name}: {trace.source} has no annotations; give START:END in ms"
        )
    from ..parallel.simulate.amounts import unknown_name  # takes a while, and is rarely needed

    # The rarer first, as one that occurs once can be asked for; alike ones in the trace's order.
    names = sorted(counts, key=lambda known: counts[known])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise ValueError(
        f"--window: annotations of {trace.source}: {unknown_name(name, names[:_SHOWN])}{more}"
    )
