"""Phases of a trace without annotations, told from the order of its communication kernels.

A dispatch whose counts are exchanged just before (`notify_dispatch`) is a forward one. A dispatch
with a layout kept from before (`cached_notify`) carries gradients back the way of a combine: it is
combine(B). A combine answers the oldest dispatch that none has answered: after a forward dispatch
it is combine(F), after a combine(B) it is dispatch(B). Where libraries show no such difference, the
thread tells: autograd runs backward on a thread of its own. A forward that is recomputed runs there
too: twice as many moves as of the first thread are forward and backward by turns.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .classify import Class, bare_name
from .kernel_table import COMMUNICATION, GEMM
from .numbering import numbered
from .phases import PHASE_PATTERN, Phases, Run, marked_phases
from .trace import Activity, Thread, Trace

# What a move of each direction is, by what its kernel does.
_DIRECTED = {
    ("dispatch", "F"): "dispatch(F)",
    ("combine", "F"): "combine(F)",
    ("dispatch", "B"): "combine(B)",
    ("combine", "B"): "dispatch(B)",
}

# What computes from the launch of one move to that of the next, where nothing is interleaved.
_BETWEEN = {
    ("dispatch(F)", "combine(F)"): "mlp(F)",
    ("combine(F)", "dispatch(F)"): "attn(F)",
    ("combine(B)", "dispatch(B)"): "mlp(B)",
    ("dispatch(B)", "combine(B)"): "attn(B)",
}


@dataclass
class _Move:
    """One exchange of tokens.

    Attributes:
        role: what its kernel does: "dispatch" or "combine".
        direction: "F" or "B"; "" while it is not told.
        members: index of each activity that takes part, notifications before it included.
        thread: that launched it; None if not told.
        time: of its launch, or else its start.
        layer: its number by order; None while it is not told.
    """

    role: str
    direction: str
    members: list[int]
    thread: Thread | None
    time: int
    layer: int | None = None

    @property
    def phase(self) -> str:
        return _DIRECTED.get((self.role, self.direction), self.role)


def phases_of(
    trace: Trace, classes: Mapping[str, Class], phase_pattern: str = PHASE_PATTERN
) -> Phases:
    """The phases that the trace marks, or, on a GPU, those inferred if it marks none.

    Args:
        trace: of one rank.
        classes: what activities of each name do.
        phase_pattern: regular expression that the whole name of a phase fits.

    Raises:
        ValueError: the pattern is none.
    """
    phases = marked_phases(trace, phase_pattern)
    return phases if phases.runs or not trace.on_gpu else infer_phases(trace, classes)


def infer_phases(trace: Trace, classes: Mapping[str, Class]) -> Phases:
    """The phases of dispatches and combines, and of what computes between them.

    Layers are numbered by their order, where that is regular. What computes cannot be told where
    forward and backward are interleaved by one thread. The sentences in `missing` say which rule
    was used and what is left open.

    Args:
        trace: of a GPU run.
        classes: what activities of each name do.
    """
    moves = _moves(trace.activities, classes)
    if not moves:
        return Phases((), (-1,) * len(trace.activities), missing=(_NOTHING,))
    rule = _direct(moves)
    runs: list[Run] = []
    of = [-1] * len(trace.activities)
    numbers = _number(moves)
    computing = _computing(trace.activities, classes, moves)
    named = [(move.phase, move.layer, move.members) for move in moves] + computing
    for name, layer, members in named:
        for index in members:
            of[index] = len(runs)
        start = min(trace.activities[index].start for index in members)
        end = max(trace.activities[index].end for index in members)
        runs.append(Run(name, layer, start, end, None))
    missing = [f"The trace marks no phases: they were inferred. {rule}", numbers]
    if not computing:
        missing.append(_NO_COMPUTING)
    return Phases(tuple(runs), tuple(of), inferred=True, missing=tuple(missing))


def _moves(activities: Sequence[Activity], classes: Mapping[str, Class]) -> list[_Move]:
    """The dispatches and combines, in the order in which they ran."""
    products = _product_times(activities, classes)
    waiting: dict[str, list[int]] = {}
    last_of_lane: dict[str, _Move] = {}
    exchanges: dict[Thread | None, list[_Move]] = {}
    moves: list[_Move] = []
    for index, activity in enumerate(activities):
        known = classes[activity.name]
        role, lane = known.role, activity.lane
        if role == "layout" or (known.group == COMMUNICATION and role == "wait"):
            waiting.setdefault(lane, []).append(index)
        elif known.group != COMMUNICATION:
            continue
        elif role in ("dispatch", "combine"):
            if "epilogue" in bare_name(activity.name) and lane in last_of_lane:
                last_of_lane[lane].members.append(index)
                continue
            members = [*waiting.pop(lane, []), index]
            direction = _by_notification(activities, members) if role == "dispatch" else ""
            move = _Move(role, direction, members, activity.launcher, _time(activity))
            last_of_lane[lane] = move
            moves.append(move)
        elif _is_all_to_all(activity, role):
            of_thread = exchanges.setdefault(activity.launcher, [])
            time = _time(activity)
            if of_thread and not _any_between(products, activity.launcher, of_thread[-1], time):
                of_thread[-1].members.append(index)  # scales or probabilities of the same tokens
                continue
            role = "combine" if len(of_thread) % 2 else "dispatch"
            of_thread.append(_Move(role, "", [index], activity.launcher, time))
            moves.append(of_thread[-1])
    return moves


def _time(activity: Activity) -> int:
    return activity.start if activity.launched is None else activity.launched


def _by_notification(activities: Sequence[Activity], members: Iterable[int]) -> str:
    """The direction of a dispatch, by how its ranks learnt what they receive; "" if not told."""
    names = [bare_name(activities[index].name) for index in members]
    if any("cached_notify" in name for name in names):
        return "B"
    return "F" if any(name.endswith("notify_dispatch") for name in names) else ""


def _is_all_to_all(activity: Activity, role: str) -> bool:
    told = activity.exchange.collective if activity.exchange is not None else ""
    return "alltoall" in (told or role).replace("_", "").lower()


def _product_times(
    activities: Iterable[Activity], classes: Mapping[str, Class]
) -> dict[Thread | None, list[int]]:
    """When each thread launched matrix products, ascending."""
    times: dict[Thread | None, list[int]] = {}
    for activity in activities:
        if classes[activity.name].role == GEMM:
            times.setdefault(activity.launcher, []).append(_time(activity))
    return {thread: sorted(found) for thread, found in times.items()}


def _any_between(
    times: Mapping[Thread | None, list[int]], thread: Thread | None, last: _Move, time: int
) -> bool:
    """Whether the thread launched a product between its last move and a time."""
    found = times.get(thread, [])
    place = bisect_right(found, last.time)
    return place < len(found) and found[place] < time


def _direct(moves: Sequence[_Move]) -> str:
    """Give each move its direction where that can be told; returns the rule, as a sentence."""
    if any(move.direction for move in moves):
        directions: dict[Thread | None, set[str]] = {}
        for move in moves:
            directions.setdefault(move.thread, set()).add(move.direction)
        unanswered: list[str] = []
        for move in moves:
            if move.role == "dispatch":
                unanswered.append(move.direction)
                continue
            answered = unanswered.pop(0) if unanswered else ""
            own = directions[move.thread] - {""}
            move.direction = own.pop() if len(own) == 1 else answered
        return _BY_NOTIFICATION
    threads = list(dict.fromkeys(move.thread for move in moves))
    if len(threads) != 2 or None in threads:
        return _UNDIRECTED
    first, second = ([move for move in moves if move.thread == thread] for thread in threads)
    for move in first:
        move.direction = "F"
    if len(second) <= len(first):
        for move in second:
            move.direction = "B"
        return _BY_THREAD
    if len(second) != 2 * len(first):
        return _UNEVEN
    for place, move in enumerate(second):
        move.direction = "FB"[place // 2 % 2]
    return _RECOMPUTED


def _number(moves: Sequence[_Move]) -> str:
    """Give each move its layer where order tells it; returns what there is to say of it."""
    ordered = sorted(moves, key=lambda move: move.time)
    layers = numbered([move.phase for move in ordered])
    if layers is None:
        return _NO_LAYERS
    for move, layer in zip(ordered, layers, strict=True):
        move.layer = layer
    return _NUMBERED


def _computing(
    activities: Sequence[Activity], classes: Mapping[str, Class], moves: Sequence[_Move]
) -> list[tuple[str, int | None, list[int]]]:
    """What computes between moves of one thread, by phase and layer; see `_BETWEEN`."""
    by_thread: dict[Thread, list[_Move]] = {}
    for move in moves:
        if move.thread is not None:
            by_thread.setdefault(move.thread, []).append(move)
    for of_thread in by_thread.values():
        of_thread.sort(key=lambda move: move.time)
    times = {thread: [move.time for move in some] for thread, some in by_thread.items()}
    taken = {index for move in moves for index in move.members}
    found: dict[tuple[Thread, int], list[int]] = {}
    for index, activity in enumerate(activities):
        thread, launched = activity.launcher, activity.launched
        communicates = classes[activity.name].group == COMMUNICATION
        if thread not in times or launched is None or communicates or index in taken:
            continue
        found.setdefault((thread, bisect_left(times[thread], launched)), []).append(index)
    phases: list[tuple[str, int | None, list[int]]] = []
    for thread, of_thread in by_thread.items():
        for place, (before, after) in enumerate(pairwise(of_thread), 1):
            name = _BETWEEN.get((before.phase, after.phase))
            if name is not None and (thread, place) in found:
                # A forward's attention comes before its layer's dispatch, all else after a move.
                layer = after.layer if name == "attn(F)" else before.layer
                phases.append((name, layer, found[thread, place]))
    return phases


_BY_NOTIFICATION = (
    "A dispatch is a forward one if a notification of counts comes before it, and a combine's "
    "backward if its layout was kept; a combine goes in the direction of its thread if that has "
    "one only, and otherwise answers the oldest dispatch without an answer. An order in which a "
    "later dispatch is answered first would be told wrong."
)
_BY_THREAD = (
    "The thread that communicates first is taken for forward, the other for autograd's, and "
    "all-to-alls by turns for dispatch and combine, where a matrix product lies between. "
    "All-to-alls of another purpose would be told wrong."
)
_RECOMPUTED = (
    "The thread that communicates first is taken for forward. The other, autograd's, has twice its "
    "moves, which are taken for a layer's recomputed forward and its backward by turns; with "
    "several layers recomputed at once they would be told wrong. All-to-alls are by turns dispatch "
    "and combine, where a matrix product lies between."
)
_UNEVEN = (
    "The thread that communicates first is taken for forward. The other, autograd's, has more "
    "moves, and not twice as many: forward may be recomputed there, and which of its moves are of "
    "a forward and which of a backward cannot be told. All-to-alls are by turns dispatch and "
    "combine, where a matrix product lies between."
)
_UNDIRECTED = (
    "Whether a dispatch or combine is of a forward or a backward cannot be told: their kernels "
    "show no difference, and one thread launched all. All-to-alls count as dispatch and combine "
    "by turns, where a matrix product lies between."
)
_NUMBERED = (
    "The trace names no layers: they are numbered from 0 in the order in which each phase runs, "
    "from 0 again where forward and backward take turns. So layer 0 of a backward phase is the "
    "layer it begins with, and where forward and backward are interleaved, the layers of a further "
    "micro-batch go on counting."
)
_NO_LAYERS = "Layers cannot be told: mark ranges such as 'dispatch(F) layer 3' to see them."
_NO_COMPUTING = (
    "Phases that compute cannot be told: the launches of forward and backward are interleaved, or "
    "are not in the trace. Mark ranges such as 'mlp(F)' to see them."
)
_NOTHING = (
    "The trace marks no phases, and none can be inferred: it has no kernels of dispatch, combine "
    "or all-to-all. Its communication is listed by collective and process group."
)
