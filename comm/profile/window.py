"""Which time of a trace is looked at, and what ran in it."""

from __future__ import annotations

from collections.abc import Sequence

from .phases import Run, is_exchange
from .trace import Activity, Interval, Trace

# Of the busiest lane's time: DeepEP's and NCCL's streams have more, those of small copies less.
_GOOD_SHARE = 0.05


def window_of(trace: Trace, window: Interval | str | None, runs: Sequence[Run]) -> Interval:
    """The window as start and end, ns; see `analyse`. The runs are those of the trace's phases.

    Raises:
        ValueError: it is empty, no range of the name was marked, or several were.
    """
    if isinstance(window, str):
        return _of_range(trace, window)
    if window is None:
        # On a CPU a marked move communicates before its first operator and after its last one.
        moves = () if trace.on_gpu else [run for run in runs if is_exchange(run.name)]
        start, end = _around([*trace.activities, *moves])
        return start, min(end, first_end(trace)[0]) if trace.broken else end
    if window[0] >= window[1]:
        raise ValueError(f"window {window[0]} to {window[1]} ns: the end must be after the start")
    return window


def first_end(trace: Trace) -> tuple[int, str]:
    """When the first of the busy lanes ends, ns, and which it is.

    A trace that breaks off has lost different ends of different lanes: up to here none of those
    that matter lacks anything. A lane matters if it was busy for a good share of what the busiest
    was.
    """
    busy: dict[str, int] = {}
    ends: dict[str, int] = {}
    for one in trace.activities:
        busy[one.lane] = busy.get(one.lane, 0) + one.end - one.start
        ends[one.lane] = max(ends.get(one.lane, one.end), one.end)
    least = max(busy.values()) * _GOOD_SHARE
    return min((ends[lane], lane) for lane in busy if busy[lane] >= least and busy[lane])


def activities_within(
    activities: Sequence[Activity], runs: Sequence[int], window: Interval
) -> tuple[list[Activity], list[int]]:
    """What ran within a window, cut to it, and the run that each belongs to.

    Activities without length count where they stand, at the window's end as well.
    """
    first, last = window
    inside: list[Activity] = []
    inside_runs: list[int] = []
    for activity, run in zip(activities, runs, strict=True):
        start, end = activity.start, activity.end
        if end < first or start > last or (start < end and (end == first or start == last)):
            continue
        if start < first or end > last:
            activity = activity._replace(start=max(start, first), end=min(end, last))
        inside.append(activity)
        inside_runs.append(run)
    return inside, inside_runs


def _of_range(trace: Trace, name: str) -> Interval:
    """The window of what was launched within the range of a name."""
    named = [annotation for annotation in trace.annotations if annotation.name == name]
    # The profiler repeats a range of the host on each stream that has work of it.
    marked = [annotation for annotation in named if annotation.thread is not None] or named
    hosts = {annotation.thread for annotation in marked}
    if not marked:
        steps = sorted({other.name for other in trace.annotations if "#" in other.name})
        known = f"; steps there are {', '.join(steps[:8])}" if steps else ""
        raise ValueError(f"{trace.source}: no range is called {name!r}{known}")
    if len(marked) > 1 and (None not in hosts or len({one.lane for one in marked}) < len(marked)):
        raise ValueError(
            f"{trace.source}: {len(marked)} ranges are called {name!r}; take one with a name of "
            "its own, such as a ProfilerStep#N, or give start and end"
        )
    start = min(annotation.start for annotation in marked)
    end = max(annotation.end for annotation in marked)
    if not trace.on_gpu or None in hosts:
        return start, end
    process = {thread[0] for thread in hosts if thread is not None}
    launched = [
        activity
        for activity in trace.activities
        if activity.launched is not None
        and start <= activity.launched < end
        and (activity.launcher is None or activity.launcher[0] in process)
    ]
    if not launched:
        raise ValueError(
            f"{trace.source}: nothing that ran on the GPU was launched within {name!r}; take "
            "another range, or give start and end"
        )
    return _around(launched)


def _around(ran: Sequence[Activity | Run]) -> Interval:
    return min(one.start for one in ran), max(one.end for one in ran)
