"""Which part of a trace is looked at: an annotation, or milliseconds from the trace's begin."""

from __future__ import annotations

from collections import Counter

from ..comm.profile.trace import Interval, Trace

_NS = 1_000_000  # in a millisecond
_ROUNDING = 1_000  # ns: of times that were read off a report
_SHOWN = 20  # names in a message


def begin_of(trace: Trace) -> int:
    """When the trace begins, ns, from which the command counts."""
    return trace.begin


def window_of(trace: Trace, asked: str | tuple[float, float] | None) -> Interval | str | None:
    """The part of a trace that is asked for, as `analyse` takes it.

    Args:
        trace: of one rank.
        asked: name of an annotation, start and end in ms from the trace's begin, cut to what was
            recorded (`beyond` tells), or None for all.

    Raises:
        ValueError: there is none such; with those that there are.
    """
    if asked is None:
        return None
    if isinstance(asked, str):
        _check_name(trace, asked)
        return asked
    start, end = _bounds(trace, asked)
    first, last = _recorded(trace)
    if start >= last or end <= first:
        begin = begin_of(trace)
        raise ValueError(
            f"--window {asked[0]:g}:{asked[1]:g}: nothing runs then; {trace.source} lasts from "
            f"{(first - begin) / _NS:g} to {(last - begin) / _NS:.3f} ms"
        )
    return max(start, first), min(end, last)


def beyond(trace: Trace, asked: str | tuple[float, float] | None) -> str | None:
    """What to say of a window that reaches beyond the trace; None where it does not."""
    if asked is None or isinstance(asked, str):
        return None
    start, end = _bounds(trace, asked)
    first, last = _recorded(trace)
    if start >= first - _ROUNDING and end <= last + _ROUNDING:
        return None
    begin = begin_of(trace)
    return (
        f"--window {asked[0]:g}:{asked[1]:g} reaches beyond what was recorded and is cut to "
        f"{(max(start, first) - begin) / _NS:.3f}:{(min(end, last) - begin) / _NS:.3f}"
    )


def _bounds(trace: Trace, asked: tuple[float, float]) -> Interval:
    begin = begin_of(trace)
    return begin + round(asked[0] * _NS), begin + round(asked[1] * _NS)


def _recorded(trace: Trace) -> Interval:
    """From the first start to the last end of what ran; on a CPU marks are of the same clock."""
    marks = () if trace.on_gpu else trace.annotations
    recorded = [*trace.activities, *marks]
    start = min((one.start for one in recorded), default=0)
    return start, max((one.end for one in recorded), default=start)


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
