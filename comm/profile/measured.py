"""The rows that a trace shows: its actions, by training step, and what ran during them."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat

from .classify import Rule, classify_all
from .comparison import COMPUTING, COPYING, TRANSFER, WAITING
from .infer import phases_of
from .kernel_table import COMMUNICATION, COMPUTE, COPY
from .phases import is_wait
from .pieces import pieces_of
from .rows import Action, Row, RowRun, row_of
from .simulated import kind_of
from .trace import Annotation, Interval, Trace
from .window import activities_within

# By a piece's group, and whether it only waits.
_PARTS = {
    (COMPUTE, False): COMPUTING,
    (COMMUNICATION, False): TRANSFER,
    (COMMUNICATION, True): WAITING,
    (COPY, False): COPYING,
}
_TRAINING_STEP = re.compile(r"ProfilerStep#\d+")


def measured_runs(
    trace: Trace, rules: Sequence[Rule], phase_pattern: str, window: Interval
) -> list[RowRun]:
    """What ran on a rank within a window, by part and phase, as `analyse` sees it.

    Args:
        trace: of the rank.
        rules: what kernels do, by name.
        phase_pattern: regular expression that the whole name of a phase fits.
        window: outside of which nothing counts.

    Raises:
        ValueError: the pattern is none.
    """
    classes = classify_all((activity.name for activity in trace.activities), rules)
    phases = phases_of(trace, classes, phase_pattern)
    activities, indices = activities_within(trace.activities, phases.of, window)
    pieces = pieces_of(trace, activities, indices, classes, phases, window)
    # On a GPU there is a piece for each activity, in the same order.
    launched = [activity.launched for activity in activities] if trace.on_gpu else repeat(None)
    runs: list[RowRun] = []
    for piece, at in zip(pieces, launched, strict=False):
        part = _PARTS[piece.group, piece.waits]
        if piece.run < 0:
            runs.append(RowRun(piece.start, piece.end, part, launched=at))
        else:
            of = phases.runs[piece.run]
            # Inferred phases leave out what computes at either end: no pairs can be made of them.
            layer = None if phases.inferred else of.layer
            place = (of.name, layer, piece.run, at, of.within)
            runs.append(RowRun(piece.start, piece.end, part, *place))
    if not trace.on_gpu:
        # Not cut to the window: it begins with the first operator, and an action may before.
        runs += _marked_waits(trace, phase_pattern)
    return runs


def _marked_waits(trace: Trace, phase_pattern: str) -> Iterator[RowRun]:
    """Ranges such as "wait dispatch(F) layer 3", or "wait F of stage 2" for a message."""
    wait = re.compile(rf"wait ({phase_pattern})(?: layer \d+)?")
    for mark in trace.annotations:
        if mark.thread is not None and is_wait(mark.name):
            of = wait.fullmatch(mark.name)
            yield RowRun(mark.start, mark.end, WAITING, of[1] if of else "", None, -1)


def measured_rows(trace: Trace, runs: Sequence[RowRun], window: Interval) -> list[Row]:
    """The rank's rows, one a training step, in order; none where no action is marked.

    A training step is what torch's profiler marks as such ("ProfilerStep#3"); without such marks a
    new one begins where an action comes again. On a GPU an action lasts from the first to the last
    of what was launched while it was marked, on a CPU as long as its mark. Communication without a
    phase at either end (messages between stages) is not part of it, on a CPU waits at its start.

    Args:
        trace: of the rank.
        runs: what ran in it.
        window: actions whose middle lies outside are left out.
    """
    by_launch = sorted((run for run in runs if run.launched is not None), key=_launched)
    if not trace.on_gpu:
        timed = _on_host(trace, runs)
    elif by_launch:
        timed = _launched_within(_host_marks(trace), by_launch)
    else:
        timed = _on_device(trace)
    first, last = window
    timed = [(at, action) for at, action in timed if first <= _middle(action) < last]
    return [row_of(step, actions, runs) for step, actions in _by_step(trace, timed)]


def _launched(run: RowRun) -> int:
    assert run.launched is not None
    return run.launched


def _middle(action: Action) -> int:
    return (action.start + action.end) // 2


def _host_marks(trace: Trace) -> list[Annotation]:
    return [mark for mark in trace.annotations if mark.thread is not None and kind_of(mark.name)]


def _launched_within(
    marks: Iterable[Annotation], by_launch: Sequence[RowRun]
) -> list[tuple[int, Action]]:
    """Each mark's start and its action, of those that launched anything."""
    times = [_launched(run) for run in by_launch]
    timed: list[tuple[int, Action]] = []
    for mark in marks:
        inside = by_launch[bisect_left(times, mark.start) : bisect_left(times, mark.end)]
        own = [run for run in inside if _is_own(run)] or inside
        if own:
            start, end = min(run.start for run in own), max(run.end for run in own)
            timed.append((mark.start, Action(mark.name, start, end)))
    return timed


def _is_own(run: RowRun) -> bool:
    """Whether it belongs to an action, and not to the messages before or after it."""
    return run.part in (COMPUTING, COPYING) or run.phase != ""


def _on_host(trace: Trace, runs: Sequence[RowRun]) -> list[tuple[int, Action]]:
    """Each mark's start and its action, without the waits for messages that it begins with."""
    # Not by phases: the thread that communicates may start a move of the action before meanwhile.
    own = sorted(run.start for run in runs if run.part in (COMPUTING, COPYING))
    waits = sorted((run for run in runs if run.part == WAITING and not run.phase), key=_start)
    starts = [wait.start for wait in waits]
    timed: list[tuple[int, Action]] = []
    for mark in _host_marks(trace):
        place = bisect_left(own, mark.start)
        works = own[place] if place < len(own) and own[place] < mark.end else mark.end
        inside = waits[bisect_left(starts, mark.start) : bisect_right(starts, works)]
        start = max((wait.end for wait in inside if wait.end <= works), default=mark.start)
        timed.append((mark.start, Action(mark.name, start, mark.end)))
    return timed


def _start(run: RowRun) -> int:
    return run.start


def _on_device(trace: Trace) -> list[tuple[int, Action]]:
    """The ranges that the profiler drew on the device; those of several streams are one action."""
    timed: list[tuple[int, Action]] = []
    for mark in trace.annotations:
        if mark.thread is not None or not kind_of(mark.name):
            continue
        if timed and timed[-1][1].name == mark.name and mark.start <= timed[-1][1].end:
            at, (name, start, end) = timed[-1]
            timed[-1] = (at, Action(name, start, max(end, mark.end)))
        else:
            timed.append((mark.start, Action(mark.name, mark.start, mark.end)))
    return timed


def _by_step(trace: Trace, timed: Iterable[tuple[int, Action]]) -> list[tuple[str, list[Action]]]:
    """Actions, each with the time of its mark, by training step."""
    marks = [
        mark
        for mark in trace.annotations
        if mark.thread is not None and _TRAINING_STEP.fullmatch(mark.name)
    ]
    starts = [mark.start for mark in marks]
    steps: list[tuple[str, list[Action]]] = []
    for at, action in sorted(timed):
        place = bisect_right(starts, at) - 1
        known = place >= 0 and at < marks[place].end
        if known:
            name = marks[place].name
            new = not steps or steps[-1][0] != name
        else:
            name = str(len(steps))
            new = not steps or any(action.name == other.name for other in steps[-1][1])
            if not new:
                name = steps[-1][0]
        if new:
            steps.append((name, []))
        steps[-1][1].append(action)
    for _, actions in steps:
        actions.sort(key=lambda action: action.start)
    return steps
