"""What ran as pieces of time: each computes, communicates or copies, for one run of a phase.

On a GPU a piece is a kernel, copy or fill. On a CPU a thread does one thing at a time although its
operators nest: what communicates inside an operator is communication, and what is marked as a wait
is nothing at all. All the rest of a phase that computes is computation, between its operators too,
where the thread runs Python; and so is an exchange's mark on such a thread if another one moves the
data, as then it only prepares and starts the move.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from .classify import Class
from .intervals import intersection, subtract, union
from .kernel_table import COMMUNICATION, COMPUTE, COPY, UNKNOWN, WAIT
from .phases import Innermost, Phases, is_exchange, is_wait, started_moves
from .trace import Activity, Interval, Thread, Trace


class Piece(NamedTuple):
    """A stretch of one lane in which one thing ran.

    Attributes:
        start, end: ns.
        group: "compute" (which what no rule knows counts as), "communication" or "copy".
        waits: it communicates, and only waits for others.
        run: index of the run of a phase that it belongs to; -1 for none.
        lane: stream or thread.
    """

    start: int
    end: int
    group: str
    waits: bool
    run: int
    lane: str


def pieces_of(
    trace: Trace,
    activities: Sequence[Activity],
    runs: Sequence[int],
    classes: Mapping[str, Class],
    phases: Phases,
    window: Interval,
) -> list[Piece]:
    """What ran within a window, in the order of its start.

    Args:
        trace: that the activities are of.
        activities: of the trace, clipped to the window.
        runs: index of the run that each belongs to; -1 for none.
        classes: of each name.
        phases: the runs.
        window: outside of which nothing counts.
    """
    if trace.on_gpu:
        return _of_kernels(activities, runs, classes)
    return _of_threads(trace, activities, classes, phases, window)


def _of_kernels(
    activities: Sequence[Activity], runs: Sequence[int], classes: Mapping[str, Class]
) -> list[Piece]:
    groups = {
        name: (COMPUTE if known.group == UNKNOWN else known.group, is_waiting(known))
        for name, known in classes.items()
    }
    return [
        Piece(activity.start, activity.end, *groups[activity.name], run, activity.lane)
        for activity, run in zip(activities, runs, strict=True)
    ]


def is_waiting(known: Class) -> bool:
    """Whether activities of a class only wait for other ranks."""
    return known.group == COMMUNICATION and known.role == WAIT


class _Doing(NamedTuple):
    """What ran on a thread, as intervals that may overlap."""

    compute: list[Interval]
    copy: list[Interval]
    transfer: list[Interval]
    waiting: list[Interval]
    pauses: list[Interval]


def _of_threads(
    trace: Trace,
    activities: Sequence[Activity],
    classes: Mapping[str, Class],
    phases: Phases,
    window: Interval,
) -> list[Piece]:
    """Operators of each thread, cut where its innermost phase changes."""
    doing: dict[str, _Doing] = {}
    lanes: dict[Thread, str] = {}
    for activity in trace.activities:
        if activity.launcher is not None:
            lanes.setdefault(activity.launcher, activity.lane)
    for activity in activities:
        mine = doing.setdefault(activity.lane, _Doing([], [], [], [], []))
        known = classes[activity.name]
        interval = (activity.start, activity.end)
        if known.group == COMMUNICATION:
            (mine.waiting if known.role == WAIT else mine.transfer).append(interval)
        else:
            (mine.copy if known.group == COPY else mine.compute).append(interval)
    by_lane: dict[str, Innermost] = {}
    for thread, innermost in phases.by_thread.items():
        lane = lanes.setdefault(thread, f"thread {thread[1]}")
        by_lane[lane] = innermost
        doing.setdefault(lane, _Doing([], [], [], [], []))
    for annotation in trace.annotations:
        if annotation.thread is not None and is_wait(annotation.name):
            lane = lanes.get(annotation.thread, "")
            if lane in doing:
                doing[lane].pauses.append((annotation.start, annotation.end))
    moves = {index for index, run in enumerate(phases.runs) if is_exchange(run.name)}
    moves -= started_moves(phases)
    pieces: list[Piece] = []
    for lane, mine in doing.items():
        pieces += _of_thread(lane, mine, by_lane.get(lane, Innermost()), moves, window)
    return sorted(pieces)


def _of_thread(
    lane: str, mine: _Doing, innermost: Innermost, moves: Collection[int], window: Interval
) -> list[Piece]:
    """One thread's pieces: communication before what it is nested in, waits taken out.

    Args:
        lane: the thread.
        mine: what ran on it.
        innermost: which run of a phase it is in, and when.
        moves: the runs that communicate.
        window: outside of which nothing counts.
    """
    stretches = innermost.stretches()
    marked = union(interval for interval, run in stretches if run in moves)
    computing = union(interval for interval, run in stretches if run not in moves)
    pauses = union(mine.pauses)
    operators = union(mine.transfer)
    waiting = subtract(union(mine.waiting), operators)
    marked = subtract(subtract(marked, pauses), waiting)
    transfer = intersection(union([*operators, *marked]), [window])
    busy = union([*transfer, *waiting, *pauses])
    computing = intersection(computing, [window])
    compute = subtract(union([*mine.compute, *computing]), busy)
    copy = subtract(subtract(union(mine.copy), busy), compute)
    parts = ((compute, COMPUTE, False), (copy, COPY, False))
    exchanges = ((transfer, COMMUNICATION, False), (waiting, COMMUNICATION, True))
    pieces: list[Piece] = []
    for intervals, group, waits in (*parts, *exchanges):
        for (start, end), run in _cut(intervals, stretches):
            pieces.append(Piece(start, end, group, waits, run, lane))
    return pieces


def _cut(
    intervals: Sequence[Interval], stretches: Sequence[tuple[Interval, int]]
) -> list[tuple[Interval, int]]:
    """A set cut where stretches begin and end, each part with its stretch's run or -1."""
    inside = [interval for interval, _ in stretches]
    parts = [(interval, -1) for interval in subtract(intervals, inside)]
    place = 0
    for part in intersection(intervals, inside):
        while stretches[place][0][1] <= part[0]:
            place += 1
        parts.append((part, stretches[place][1]))
    return parts
