"""How long each phase communicated and computed, and what ran behind its communication."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .bandwidth import moved
from .by_collective import is_by_collective
from .classify import Class
from .intervals import intersection, length, union
from .kernel_table import COMMUNICATION, COMPUTE
from .phases import Phases
from .pieces import Piece, is_waiting
from .report import Phase
from .trace import Activity, Exchange, Interval

_Key = tuple[str, int | None]  # a phase's name and layer; None for all layers


@dataclass
class _Gathered:
    """All of one phase."""

    compute: list[Interval] = field(default_factory=list[Interval])
    comm: list[Interval] = field(default_factory=list[Interval])
    transfer: list[Interval] = field(default_factory=list[Interval])
    runs: set[int] = field(default_factory=set[int])
    start: int | None = None
    end: int = 0
    sent_bytes: list[int | None] = field(default_factory=list["int | None"])
    exchanges: list[Exchange | None] = field(default_factory=list["Exchange | None"])
    waits: bool = False


def phase_times(
    pieces: Sequence[Piece],
    activities: Iterable[Activity],
    runs: Iterable[int],
    classes: Mapping[str, Class],
    phases: Phases,
    compute: Sequence[Interval],
    window: Interval,
) -> tuple[tuple[Phase, ...], tuple[Phase, ...]]:
    """Each phase over all layers, and each phase by layer, in the order of first appearance.

    Args:
        pieces: what ran within the window.
        activities: the same uncut, with `runs` that each belongs to.
        classes: of each name.
        phases: the runs.
        compute: where anything computed.
        window: which marked runs without any activity count.
    """
    gathered: dict[_Key, _Gathered] = {}
    by_run: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_run.setdefault(piece.run, []).append(piece)
    outside = _compute(by_run.pop(-1, []))
    for run, ran in by_run.items():
        _gather(_both(gathered, phases, run), ran)
    for activity, run in zip(activities, runs, strict=True):
        known = classes[activity.name]
        if run < 0 or known.group != COMMUNICATION:
            continue
        sent = activity.exchange.sent_bytes if activity.exchange else activity.num_bytes
        for one in _both(gathered, phases, run):
            if is_waiting(known):
                one.waits = True
            else:
                one.sent_bytes.append(sent)
                one.exchanges.append(activity.exchange)
    _add_empty_runs(gathered, phases, window)
    behind = {name: union(one.compute) for (name, layer), one in gathered.items() if layer is None}
    behind[""] = union(outside)
    found = [_phase(key, one, compute, behind, phases.inferred) for key, one in gathered.items()]
    found.sort(key=lambda phase: phase.window)
    over_all = tuple(phase for phase in found if phase.layer is None)
    return over_all, tuple(phase for phase in found if phase.layer is not None)


def _both(gathered: dict[_Key, _Gathered], phases: Phases, run: int) -> tuple[_Gathered, ...]:
    """What is gathered of a run's phase over all layers, and in its layer."""
    name, layer = phases.runs[run].name, phases.runs[run].layer
    found = [gathered.setdefault((name, None), _Gathered())]
    if layer is not None:
        found.append(gathered.setdefault((name, layer), _Gathered()))
    for one in found:
        one.runs.add(run)
    return tuple(found)


def _gather(into: Iterable[_Gathered], ran: Sequence[Piece]) -> None:
    """Add what one run did, in the order of its start."""
    compute = _compute(ran)
    comm = [piece for piece in ran if piece.group == COMMUNICATION]
    every = [(piece.start, piece.end) for piece in comm]
    transfer = [(piece.start, piece.end) for piece in comm if not piece.waits]
    start, end = ran[0].start, max(piece.end for piece in ran)
    for one in into:
        one.compute += compute
        one.comm += every
        one.transfer += transfer
        one.start = start if one.start is None else min(one.start, start)
        one.end = max(one.end, end)


def _compute(ran: Iterable[Piece]) -> list[Interval]:
    return [(piece.start, piece.end) for piece in ran if piece.group == COMPUTE]


def _add_empty_runs(gathered: dict[_Key, _Gathered], phases: Phases, window: Interval) -> None:
    """Runs that launched nothing at all, so that each phase that was marked appears."""
    busy = set(phases.of)
    for index, run in enumerate(phases.runs):
        if index not in busy and window[0] <= run.start and run.end <= window[1]:
            for one in _both(gathered, phases, index):
                one.start = run.start if one.start is None else one.start
                one.end = max(one.end, run.end)


def _phase(
    key: _Key,
    one: _Gathered,
    compute: Sequence[Interval],
    behind: Mapping[str, Sequence[Interval]],
    inferred: bool,
) -> Phase:
    comm = union(one.comm)
    comm_ns = length(comm)
    known = [sent for sent in one.sent_bytes if sent is not None]
    size, bus = moved(one.exchanges)
    hidden_by = {
        name: hidden
        for name, others in behind.items()
        if name != key[0] and (hidden := length(intersection(comm, others)))
    }
    return Phase(
        name=key[0],
        layer=key[1],
        count=len(one.runs),
        window=(one.start or 0, one.end),
        compute=length(union(one.compute)),
        comm=comm_ns,
        exposed=comm_ns - length(intersection(comm, compute)),
        waiting=comm_ns - length(union(one.transfer)),
        behind=hidden_by,
        inferred=inferred and not is_by_collective(key[0]),
        sent_bytes=sum(known) if known and len(known) == len(one.sent_bytes) else None,
        waiting_known=one.waits,
        algorithm_bytes=size,
        bus_bytes=bus,
    )
