"""Which phase and layer each activity belongs to, by the ranges that the program marked.

A phase is a marked range such as "dispatch(F)" or "attn(B) layer 3". A kernel belongs to the
innermost phase that its launching thread was in when it launched it. A thread without phases of
its own, such as autograd's, works for the thread that waits for it: the phase open there counts.
What is left belongs to the innermost phase that the profiler drew on its stream. An operator of a
CPU run belongs to the innermost phase of its own thread alone.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from .trace import Activity, Annotation, Interval, Thread, Trace

# F, B, I and W are the halves of a step: forward, backward, and backward in two.
PHASE_PATTERN = r"[\w.-]+\([FBIW]\)"

# Time inside a phase of these names is communication on a CPU's thread, whatever runs there: a
# thread that sleeps in a socket's wait shows no operator.
_EXCHANGE = re.compile(r"(dispatch|combine|all_?to_?all|send|recv|receive)\b", re.ASCII)

_Key = TypeVar("_Key", Thread, str)


class Run(NamedTuple):
    """One time that a phase ran.

    Attributes:
        name: of the phase, such as "dispatch(F)".
        layer: as marked, or else how many runs of this phase came before it within the range
            around it; None if neither can be told, as without a range around it.
        start, end: of the marked range, ns.
        thread: that marked it; None if the profiler drew it on the device.
        within: number of the innermost range around it, on its thread, that is no phase and no
            wait; -1 for none.
    """

    name: str
    layer: int | None
    start: int
    end: int
    thread: Thread | None
    within: int = -1


@dataclass(frozen=True)
class Innermost:
    """Which of some nested ranges is the innermost at a time.

    Attributes:
        times: where that changes, ascending.
        ranges: index of the range that is innermost from then on; -1 for none.
    """

    times: list[int] = field(default_factory=list[int])
    ranges: list[int] = field(default_factory=list[int])

    def at(self, time: int) -> int:
        """Index of the range that is innermost at a time; -1 for none."""
        place = bisect_right(self.times, time)
        return self.ranges[place - 1] if place else -1

    def stretches(self) -> list[tuple[Interval, int]]:
        """Each stretch with a range, and which it is."""
        ends = self.times[1:]
        return [
            ((start, end), index)
            for start, end, index in zip(self.times, ends, self.ranges, strict=False)
            if index >= 0 and start < end
        ]


@dataclass(frozen=True)
class Phases:
    """The runs of phases in a trace, and which one each activity belongs to.

    Attributes:
        runs: in the order of their start.
        of: index in `runs` for each of the trace's activities; -1 for none.
        by_thread: the innermost run of each thread that marks phases.
        inferred: the runs were told from the order of kernels, not from marked ranges.
        missing: what could not be told, in sentences.
    """

    runs: tuple[Run, ...]
    of: tuple[int, ...]
    by_thread: dict[Thread, Innermost] = field(default_factory=dict[Thread, Innermost])
    inferred: bool = False
    missing: tuple[str, ...] = ()


def marked_phases(trace: Trace, pattern: str = PHASE_PATTERN) -> Phases:
    """The phases that the trace's annotations mark.

    Args:
        trace: one rank's.
        pattern: regular expression that a phase's whole name fits, without " layer N" at its end.

    Raises:
        ValueError: the pattern is no regular expression.
    """
    phases, others = _split(trace.annotations, pattern)
    runs = _runs(phases, others)
    by_thread = innermost_by(
        (run.thread, (run.start, run.end), index)
        for index, run in enumerate(runs)
        if run.thread is not None
    )
    by_lane = innermost_by(
        (annotation.lane, (annotation.start, annotation.end), index)
        for index, (annotation, _, _) in enumerate(phases)
        if annotation.thread is None
    )
    finder = _Finder(by_thread, by_lane)
    find = finder.of_kernel if trace.on_gpu else finder.of_operator
    named = any(layer is not None for _, _, layer in phases)
    numbered = not named and any(run.layer is not None for run in runs)
    missing = (_NUMBERED,) if numbered else ()
    return Phases(runs, tuple(map(find, trace.activities)), by_thread, missing=missing)


def is_exchange(name: str) -> bool:
    """Whether a phase of this name is communication: dispatch, combine, send and the like."""
    return _EXCHANGE.match(name) is not None


def started_moves(phases: Phases) -> frozenset[int]:
    """Of a CPU run, marks of exchanges whose thread only prepares and starts them, by index.

    They lie on a thread that marks phases that compute, too, and a thread that does not marks the
    same phase: that one moves the data. Without such a thread, as in a run that waits for each
    exchange at once, the mark is the exchange itself.
    """
    computing = {run.thread for run in phases.runs if not is_exchange(run.name)}
    moved = {run.name for run in phases.runs if run.thread not in computing}
    return frozenset(
        index
        for index, run in enumerate(phases.runs)
        if is_exchange(run.name) and run.thread in computing and run.name in moved
    )


def is_wait(name: str) -> bool:
    """Whether a range of this name marks that its thread waits: "wait dispatch(F)"."""
    return name.startswith("wait ")


def innermost_by(ranges: Iterable[tuple[_Key, Interval, int]]) -> dict[_Key, Innermost]:
    """For each key (a thread, a lane), which of its ranges is the innermost at a time."""
    grouped: dict[_Key, list[tuple[int, int, int]]] = {}
    for key, (start, end), index in ranges:
        grouped.setdefault(key, []).append((start, -end, index))
    return {key: _sweep(sorted(group)) for key, group in grouped.items()}


def _sweep(ordered: Sequence[tuple[int, int, int]]) -> Innermost:
    """Ranges (start, -end, index), outer before inner, as what is innermost when."""
    result = Innermost()
    open_ranges: list[tuple[int, int]] = []

    def change(time: int) -> None:
        result.times.append(time)
        result.ranges.append(open_ranges[-1][1] if open_ranges else -1)

    def close(until: float) -> None:
        while open_ranges and open_ranges[-1][0] <= until:
            end = open_ranges[-1][0]
            while open_ranges and open_ranges[-1][0] <= end:
                open_ranges.pop()
            change(end)

    for start, minus_end, index in ordered:
        close(start)
        open_ranges.append((-minus_end, index))
        change(start)
    close(float("inf"))
    return result


_Marked = tuple[Annotation, str, int | None]


def _split(
    annotations: Sequence[Annotation], pattern: str
) -> tuple[list[_Marked], list[Annotation]]:
    """Annotations that mark phases, with the phase's name and layer; and the others."""
    try:
        phase = re.compile(rf"(?P<phase_name>{pattern})(?: layer (?P<phase_layer>\d+))?")
    except re.error as error:
        raise ValueError(
            f"phase pattern {pattern!r} is no regular expression for a phase's name: {error}"
        ) from None
    fits = {annotation.name: phase.fullmatch(annotation.name) for annotation in annotations}
    marked: list[_Marked] = []
    others: list[Annotation] = []
    for annotation in annotations:
        fit = fits[annotation.name]
        if fit is None:
            others.append(annotation)
        else:
            layer = fit["phase_layer"]
            marked.append((annotation, fit["phase_name"], int(layer) if layer else None))
    return marked, others


def _runs(phases: Sequence[_Marked], others: Sequence[Annotation]) -> tuple[Run, ...]:
    """Phases as runs; if none has a layer, each run's number within the range around it is one."""
    named = any(layer is not None for _, _, layer in phases)
    around = innermost_by(
        (other.thread, (other.start, other.end), index)
        for index, other in enumerate(others)
        if other.thread is not None and not is_wait(other.name)
    )
    counted: dict[tuple[int, str], int] = {}
    runs: list[Run] = []
    for annotation, name, layer in phases:
        thread = annotation.thread
        outer = -1
        if thread is not None and thread in around:
            outer = around[thread].at(annotation.start)
        if not named and outer >= 0:
            layer = counted.get((outer, name), 0)
            counted[outer, name] = layer + 1
        runs.append(Run(name, layer, annotation.start, annotation.end, thread, outer))
    return tuple(runs)


@dataclass(frozen=True)
class _Finder:
    """Finds the run that an activity belongs to."""

    by_thread: dict[Thread, Innermost]
    by_lane: dict[str, Innermost]

    def of_kernel(self, activity: Activity) -> int:
        """The run that launched a kernel, copy or fill, or that is drawn around it; -1 for none."""
        found = -1
        if activity.launched is not None and activity.launcher is not None:
            own = self.by_thread.get(activity.launcher)
            if own is not None:
                found = own.at(activity.launched)
            else:
                found = self._open_elsewhere(activity.launched, activity.launcher[0])
        if found < 0 and activity.lane in self.by_lane:
            found = self.by_lane[activity.lane].at(activity.start)
        return found

    def of_operator(self, activity: Activity) -> int:
        """The run of its own thread that an operator starts in; -1 for none."""
        own = self.by_thread.get(activity.launcher) if activity.launcher is not None else None
        return own.at(activity.start) if own is not None else -1

    def _open_elsewhere(self, time: int, process: int) -> int:
        """The run open at a time on the process's other threads, if there is exactly one."""
        runs = {
            innermost.at(time)
            for thread, innermost in self.by_thread.items()
            if thread[0] == process
        } - {-1}
        return runs.pop() if len(runs) == 1 else -1


_NUMBERED = (
    "The trace names no layers: layers are numbered from 0 in the order in which each phase runs "
    "within the range around it, so layer 0 of a backward phase is the layer it begins with."
)
