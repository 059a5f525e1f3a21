"""A row of actions and what ran during it, and how its time is cut into parts.

The measured row and the simulated one are the same kind of value, so that one function cuts both.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from .comparison import AFTER, BEFORE, BETWEEN, COMPUTING, PARTS, STANDING, TRANSFER, WAITING
from .intervals import clip, length, subtract, union
from .simulated import COMPUTE, SimulatedAction, kind_of
from .trace import Interval

A = TypeVar("A")
B = TypeVar("B")


class RowRun(NamedTuple):
    """Something that ran.

    Attributes:
        start, end: ns.
        part: COMPUTING, TRANSFER, WAITING or COPYING.
        phase: such as "dispatch(F)"; "" if it belongs to none.
        layer: of the phase; None if it is not told.
        instance: tells apart the times that a phase was run; negative if this is none of them, but
            a wait for one.
        launched: when the host launched it, ns; None if it is not told, or nothing was launched.
        within: number of the marked range around its phase's mark; -1 for none.
    """

    start: int
    end: int
    part: str
    phase: str = ""
    layer: int | None = None
    instance: int = 0
    launched: int | None = None
    within: int = -1


class Action(NamedTuple):
    """An action of a row, and when it ran, ns."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Row:
    """A rank's actions in one training step.

    Attributes:
        step: the training step.
        start, end: what is looked at, ns: the first action's start and the last one's end, or more.
        actions: in order of their start; none in a trace that marks none.
        runs: what ran on the rank, in any order; what lies outside of start and end is not counted.
    """

    step: str
    start: int
    end: int
    actions: tuple[Action, ...]
    runs: tuple[RowRun, ...]

    @property
    def length(self) -> int:
        """From start to end, ns."""
        return self.end - self.start


class Stretch(NamedTuple):
    """A piece of a row: kind of its action, and part and phase of what it is put down to."""

    start: int
    end: int
    kind: str
    part: str
    phase: str


@dataclass(frozen=True)
class PhaseRun:
    """One time that a phase was run.

    Attributes:
        kind: of the action that it began in; BETWEEN, BEFORE or AFTER if in none; "" in a row
            without actions.
        phase: its name.
        layer: that it was of; None if it is not told.
        start, end: of the first and the last that ran of it.
        computing, transfer, waiting: lengths of unions, ns; the third where neither of the others.
        exposed: of its communication, where nothing of any phase computed.
        within: number of the marked range around it that is no phase; -1 for none.
    """

    kind: str
    phase: str
    layer: int | None
    start: int
    end: int
    computing: int
    transfer: int
    waiting: int
    exposed: int
    within: int = -1


def simulated_row(actions: Sequence[SimulatedAction], ns_per_unit: float) -> Row:
    """The row of a rank of the simulation; its times are rounded to whole ns.

    All of an action without phases counts as computing.
    """
    shown: list[Action] = []
    runs: list[RowRun] = []
    for number, (name, start, end, phases) in enumerate(actions):
        action = Action(name, round(start * ns_per_unit), round(end * ns_per_unit))
        shown.append(action)
        if not phases:
            runs.append(RowRun(action.start, action.end, COMPUTING))
        for phase in phases:
            runs.append(
                RowRun(
                    round(phase.start * ns_per_unit),
                    round(phase.end * ns_per_unit),
                    COMPUTING if phase.lane == COMPUTE else TRANSFER,
                    phase.name,
                    phase.layer,
                    number,
                )
            )
    return row_of("", shown, runs)


def row_of(step: str, actions: Sequence[Action], runs: Sequence[RowRun]) -> Row:
    """A row from the start of its first action to the end of its last; there is one at least."""
    start = min(action.start for action in actions)
    return Row(step, start, max(action.end for action in actions), tuple(actions), tuple(runs))


def stretches(row: Row) -> list[Stretch]:
    """The row, cut: in order and without a gap from its start to its end.

    Of runs at one time the part is the one that comes first in PARTS, and the phase is that of the
    run of that part which started first. Of actions that overlap, too, the first one counts.
    """
    free: list[Interval] = [(row.start, row.end)]
    cut: list[tuple[int, int, tuple[str, str]]] = []
    for part in PARTS:
        if part == STANDING:
            cut += [(start, end, (STANDING, "")) for start, end in free]
            break
        pieces = _disjoint([(r.start, r.end, (part, r.phase)) for r in row.runs if r.part == part])
        cut += [piece[:3] for piece in _overlay(pieces, [(*gap, "") for gap in free])]
        free = subtract(free, union((start, end) for start, end, _ in pieces))
    cut.sort()
    return [Stretch(start, end, kind, *of) for start, end, of, kind in _overlay(cut, _kinds(row))]


def parts_of(row: Row) -> Counter[tuple[str, str, str]]:
    """Length of the row's stretches by kind, part and phase, ns; their sum is the row's length."""
    found: Counter[tuple[str, str, str]] = Counter()
    for start, end, kind, part, phase in stretches(row):
        found[kind, part, phase] += end - start
    return found


def phase_runs(row: Row) -> list[PhaseRun]:
    """Each time that a phase was run, in order of the start.

    What is marked several times within one action, for one layer, is one run: a dispatch in two
    hops, or its notification apart from its transfer.
    """
    kinds = _kinds(row)
    starts = [start for start, _, _ in kinds]
    computing = union((run.start, run.end) for run in row.runs if run.part == COMPUTING)
    marked: defaultdict[tuple[str, int | None, int], list[RowRun]] = defaultdict(list)
    for run in row.runs:
        if run.phase and run.instance >= 0:
            marked[run.phase, run.layer, run.instance].append(run)
    joined: defaultdict[tuple[int, str, int | None, int], list[RowRun]] = defaultdict(list)
    for (phase, layer, instance), runs in marked.items():
        place = bisect_right(starts, min(run.start for run in runs)) - 1
        apart = instance if layer is None or not kinds else -1
        joined[place, phase, layer, apart] += runs
    found = [
        _phase_run(kinds[max(place, 0)][2] if kinds else "", runs, computing)
        for (place, _, _, _), runs in joined.items()
    ]
    return sorted(found, key=lambda run: run.start)


def _phase_run(kind: str, runs: Sequence[RowRun], computing: Sequence[Interval]) -> PhaseRun:
    """A run of a phase from all that ran of it; `computing` is when anything of the rank did."""
    start, end = min(run.start for run in runs), max(run.end for run in runs)
    own, moved, waited = (
        union((run.start, run.end) for run in runs if run.part == part)
        for part in (COMPUTING, TRANSFER, WAITING)
    )
    exposed = subtract(union([*moved, *waited]), clip(computing, (start, end)))
    return PhaseRun(
        kind,
        runs[0].phase,
        runs[0].layer,
        start,
        end,
        length(own),
        length(moved),
        length(subtract(waited, union([*own, *moved]))),
        length(exposed),
        runs[0].within,
    )


def _kinds(row: Row) -> list[tuple[int, int, str]]:
    """The row's time by the kind of the action, or by where it lies if in none.

    Nothing of a row without actions.
    """
    if not row.actions:
        return []
    owned: list[tuple[int, int, str]] = []
    for action in row.actions:
        found = kind_of(action.name)
        assert found is not None, "rows are made of actions only"
        owned.append((action.start, action.end, found[0]))
    owned = _disjoint(owned)
    gaps: list[tuple[int, int, str]] = []
    for start, end in subtract([(row.start, row.end)], [(a, b) for a, b, _ in owned]):
        first = bool(owned) and end <= owned[0][0]
        last = bool(owned) and start >= owned[-1][1]
        gaps.append((start, end, BEFORE if first else AFTER if last else BETWEEN))
    return sorted([*owned, *gaps])


def _disjoint(pieces: Iterable[tuple[int, int, A]]) -> list[tuple[int, int, A]]:
    """The same without overlap: each keeps what those that started before it leave."""
    left: list[tuple[int, int, A]] = []
    reach: int | None = None
    for start, end, label in sorted(pieces, key=lambda piece: piece[:2]):
        begin = start if reach is None else max(start, reach)
        if begin < end:
            left.append((begin, end, label))
            reach = end
    return left


def _overlay(
    one: Sequence[tuple[int, int, A]], other: Sequence[tuple[int, int, B]]
) -> list[tuple[int, int, A, B]]:
    """Where both have something, with what; each is disjoint and in order."""
    shared: list[tuple[int, int, A, B]] = []
    here = there = 0
    while here < len(one) and there < len(other):
        start = max(one[here][0], other[there][0])
        end = min(one[here][1], other[there][1])
        if start < end:
            shared.append((start, end, one[here][2], other[there][2]))
        if one[here][1] < other[there][1]:
            here += 1
        else:
            there += 1
    return shared
