"""Stages folded in a V, and rows made by a rule on a clock in which every action takes one tick.

The model is cut in 2 * ranks stages, half a rank's share each. Micro-batches go down the ranks with
the first half of the stages and back up with the second, so rank r holds stages r and 2P-1-r.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum

from ..actions import Action, Op
from ..placement import Placement
from ..schedule import Schedule
from .sizes import require_counts


class Kind(IntEnum):
    """What a rank can do in a V: a forward or input half of either of its stages, or a W."""

    F_DOWN = 0
    F_UP = 1
    I_UP = 2
    I_DOWN = 3
    W = 4


class Seat:
    """What a rule sees of one rank.

    Attributes:
        rank: which.
        done: how many of each kind it has done.
        chunks: chunks that it holds: of which it has done F and not yet W.
        chunks_down: those among them that are of its first stage.
        last: what it did last; None before the first.
        waiting: (stage, micro-batch) of the weight halves that it can do.
    """

    __slots__ = ("chunks", "chunks_down", "done", "last", "rank", "waiting")

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.done = [0] * len(Kind)
        self.chunks = self.chunks_down = 0
        self.last: Kind | None = None
        self.waiting: deque[tuple[int, int]] = deque()


Rule = Callable[[Seat, Sequence[Kind]], Kind | None]


def run_clock(name: str, ranks: int, microbatches: int, limit: int, rule: Rule) -> Schedule:
    """A schedule in a V: in each tick each rank does what a rule picks of what is ready.

    Of each kind, micro-batches go in order. Every action takes a tick and messages take none, so
    the order is made for F = I = W.

    Args:
        name: of the schedule.
        ranks: pipeline ranks, from 1 up.
        microbatches: micro-batches a step, from 1 up.
        limit: chunks that a rank may hold, from F to W.
        rule: picks of the kinds that are ready, of which there is at least one; None to wait.

    Raises:
        ValueError: a size is not a whole number from 1 up.
    """
    require_counts(name, ranks=ranks, microbatches=microbatches)
    stages = 2 * ranks
    seats = [Seat(rank) for rank in range(ranks)]
    rows: list[list[Action]] = [[] for _ in seats]
    # How often each stage has run, at the beginning of the tick; all of the micro-batches have run
    # before the first stage.
    forwards = [*[0] * stages, microbatches]
    inputs = [0] * stages
    left = 3 * stages * microbatches
    while left:
        picked: list[tuple[Seat, Kind]] = []
        for seat in seats:
            ready = _ready(seat, forwards, inputs, limit)
            kind = rule(seat, ready) if ready else None
            if kind is not None:
                picked.append((seat, kind))
        assert picked, f"{name}: every rank waits"
        for seat, kind in picked:
            rows[seat.rank].append(_do(seat, kind, forwards, inputs))
        left -= len(picked)
    down = tuple(range(ranks))
    placement = Placement((down + down[::-1],), (0,) * microbatches)
    return Schedule(name, placement, tuple(map(tuple, rows)))


def _ready(seat: Seat, forwards: list[int], inputs: list[int], limit: int) -> list[Kind]:
    down, up = seat.rank, len(inputs) - 1 - seat.rank
    ready: list[Kind] = []
    if seat.chunks < limit:
        if forwards[down] < forwards[down - 1]:  # of stage 0: the entry past the last stage
            ready.append(Kind.F_DOWN)
        if forwards[up] < forwards[up - 1]:
            ready.append(Kind.F_UP)
    if inputs[up] < (inputs[up + 1] if seat.rank else forwards[up]):
        ready.append(Kind.I_UP)
    if inputs[down] < inputs[down + 1]:
        ready.append(Kind.I_DOWN)
    if seat.waiting:
        ready.append(Kind.W)
    return ready


def _do(seat: Seat, kind: Kind, forwards: list[int], inputs: list[int]) -> Action:
    down, up = seat.rank, len(inputs) - 1 - seat.rank
    seat.last = kind
    seat.done[kind] += 1
    if kind is Kind.W:
        stage, microbatch = seat.waiting.popleft()
        seat.chunks -= 1
        seat.chunks_down -= stage == down
        return Action(stage, Op.W, microbatch)
    stage = up if kind in (Kind.F_UP, Kind.I_UP) else down
    if kind in (Kind.F_DOWN, Kind.F_UP):
        microbatch = forwards[stage]
        forwards[stage] += 1
        seat.chunks += 1
        seat.chunks_down += stage == down
        return Action(stage, Op.F, microbatch)
    microbatch = inputs[stage]
    inputs[stage] += 1
    seat.waiting.append((stage, microbatch))
    return Action(stage, Op.I, microbatch)
