"""List scheduling: each rank, whenever it is free, takes the best of what it could do now.

A constructor, not a schedule: `zb-1p`, `zb-2p` and `simulate.search` try it with many priorities
and keep what is best. The loop walks integers and lists, since it is run hundreds of times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

from .actions import Action, Op, Pair, Step
from .lanes import ROUNDING, Lanes, saved
from .schedule import Schedule

_F, _I, _W, _B, _PAIR = range(5)
_OPS = (Op.F, Op.I, Op.W, Op.B)

# How `Priorities.forward` and `.backward` choose among several stages of a rank.
OLDEST, EARLIER_STAGE, LATER_STAGE = "oldest", "earlier stage", "later stage"


@dataclass(frozen=True)
class Priorities:
    """What a rank prefers.

    Attributes:
        warmup: per rank, how far a forward may run past the arrival of the first gradient, as a
            share of that forward's time; above it the rank waits, or fills the gap with W.
        delay: the same for all later gradients.
        w_delays_f: per rank, how far W may run past the arrival of the next forward's input, as a
            share of W's time: 0 fills only gaps that it fits, 1 fills every gap.
        w_delays_i: the same for the next gradient.
        w_delays_last: the same for the rank's last gradient, at the very end.
        in_flight: per rank, most memory in chunks whose backward has not run; `math.inf` for none.
        forward, backward: which of several ready stages goes first: OLDEST micro-batch,
            EARLIER_STAGE or LATER_STAGE.
        forward_first: a ready forward goes before a ready backward, as long as `in_flight` and
            memory allow it; else after.
        whole: backwards are not split.
        pair_wait: how long to wait for the other half of a pair, as a share of what it saves.
    """

    warmup: tuple[float, ...]
    delay: tuple[float, ...]
    w_delays_f: tuple[float, ...]
    w_delays_i: tuple[float, ...]
    w_delays_last: tuple[float, ...]
    in_flight: tuple[float, ...]
    forward: str = LATER_STAGE
    backward: str = OLDEST
    forward_first: bool = False
    whole: bool = False
    pair_wait: float = 1.0


class _Place(NamedTuple):
    """One step as it was placed: a kind, its lane and number there; of a pair the backward's too.

    A lane's chunks are numbered from 0 in the order of their micro-batches.
    """

    kind: int
    lane: int
    number: int
    start: float
    end: float
    other_lane: int = -1
    other_number: int = -1


@dataclass(frozen=True)
class Built:
    """What the constructor made.

    Where messages do not queue, a replay of its rows starts no step later than it says here.

    Attributes:
        lanes: what it was made for.
        placed: per rank, its steps with their times, as tuples of the fields of `_Place`.
        makespan: when the last rank ends.
        spans: per rank, from its first start to its end.
    """

    lanes: Lanes
    placed: tuple[list[tuple[int, int, int, float, float, int, int]], ...]
    makespan: float
    spans: tuple[float, ...]

    @property
    def rows(self) -> list[list[_Place]]:
        """Per rank, its steps with their times."""
        return [[_Place(*step) for step in row] for row in self.placed]

    def schedule(self, name: str) -> Schedule:
        """The rows as a schedule. I directly before its W becomes B where that delays nobody."""
        lanes, times, placed = self.lanes, self.lanes.times, self.rows
        needed = {  # when the stage before starts on a chunk's gradient
            (place.lane, place.number) if place.kind != _PAIR else place[5:]: place.start
            for row in placed
            for place in row
            if place.kind in (_I, _B, _PAIR)
        }

        def merges(one: _Place, other: _Place) -> bool:
            lane, stage = one.lane, lanes.stage[one.lane]
            if (one.kind, other.kind) != (_I, _W) or one[1:3] != other[1:3]:
                return False
            if times.B[stage] > times.I[stage] + times.W[stage]:
                return False
            arrival = one.start + times.B[stage] + lanes.back[lane]
            return stage == 0 or arrival <= needed[lane - 1, one.number]

        rows: list[tuple[Step, ...]] = []
        for row in placed:
            steps: list[Step] = []
            skip = False
            for place, after in zip(row, (*row[1:], None), strict=True):
                if skip:
                    skip = False
                elif after is not None and merges(place, after):
                    steps.append(self._action(_B, place.lane, place.number))
                    skip = True
                elif place.kind == _PAIR:
                    backward = self._action(_B, place.other_lane, place.other_number)
                    steps.append(Pair(self._action(_F, place.lane, place.number), backward))
                else:
                    steps.append(self._action(place.kind, place.lane, place.number))
            rows.append(tuple(steps))
        return Schedule(name, lanes.placement, tuple(rows))

    def _action(self, kind: int, lane: int, number: int) -> Action:
        route, stage = divmod(lane, self.lanes.num_stages)
        return Action(stage, _OPS[kind], self.lanes.microbatches[route][number])


def construct(lanes: Lanes, priorities: Priorities) -> Built:
    """Build a schedule by list scheduling; it is complete, free of deadlock and within the limits.

    Why it cannot block: a forward starts only if beside it a chunk of every later stage of its rank
    still fits. So of all forwards without room take the latest stage: what its rank holds of this
    and later stages goes on to its end and is released, and the rest left room for it.
    """
    run = _Run(lanes, priorities)
    run.play()
    spans = tuple(row[-1][4] - row[0][3] for row in run.rows)
    return Built(lanes, tuple(run.rows), max(row[-1][4] for row in run.rows), spans)


class _Run:
    """The state of one construction."""

    def __init__(self, lanes: Lanes, priorities: Priorities) -> None:
        self.lanes, self.p = lanes, priorities
        num_lanes, ranks = len(lanes.rank), len(lanes.of_rank)
        stages = lanes.num_stages
        self.stages = stages
        by_stage = (lanes.times.F, lanes.times.I, lanes.times.W, lanes.times.B)
        self.time = [[times[s] for s in lanes.stage] for times in by_stage]
        # Arrivals of inputs and of gradients, and how many forwards, backwards and W are done.
        self.inputs: list[list[float]] = [[] for _ in range(num_lanes)]
        self.gradients: list[list[float]] = [[] for _ in range(num_lanes)]
        self.forwards = [0] * num_lanes
        self.backwards = [0] * num_lanes
        self.owed: list[list[int]] = [[] for _ in range(num_lanes)]  # W to do, and
        self.paid = [0] * num_lanes  # how many of these are done
        self.total = [len(lanes.microbatches[lane // stages]) for lane in range(num_lanes)]
        self.backwards_left = [sum(self.total[v] for v in held) for held in lanes.of_rank]
        self.warm = [True] * ranks
        self.memory = [0.0] * ranks
        self.alive = [0.0] * ranks
        self.cap = [
            max(cap, *(lanes.size[v] + lanes.reserve[v] for v in held)) + ROUNDING
            for cap, held in zip(priorities.in_flight, lanes.of_rank, strict=True)
        ]
        self.limit = [limit + ROUNDING for limit in lanes.limit]
        self.free = [0.0] * ranks
        # Plain tuples, the fields of _Place: naming each would take as long as placing it.
        self.rows: list[list[tuple[int, int, int, float, float, int, int]]] = []
        self.rows.extend([] for _ in range(ranks))
        self.rank, self.size, self.pending = lanes.rank, lanes.size, lanes.pending
        self.onward, self.back, self.reserve = lanes.onward, lanes.back, lanes.reserve
        self.events: list[tuple[float, int]] = []
        self.forward_lanes = [_sorted(held, lanes, priorities.forward) for held in lanes.of_rank]
        self.backward_lanes = [_sorted(held, lanes, priorities.backward) for held in lanes.of_rank]

    def play(self) -> None:
        """Place every action."""
        for lane in range(0, len(self.forwards), self.stages):
            self.inputs[lane] = [0.0] * self.total[lane]
            self.events.append((0.0, self.lanes.rank[lane]))
        self.events.sort()
        events, free = self.events, self.free
        while events:
            now, rank = heappop(events)
            if free[rank] <= now:
                self._decide(now, rank)

    def _decide(self, now: float, rank: int) -> None:
        """Take the rank's next step, or wait for the next thing that is known to come."""
        p = self.p
        b, next_b = self._backward(now, rank)
        f, next_f = self._forward(now, rank)
        if self.lanes.pays and (b >= 0 or f >= 0):
            until = self._pair(now, rank, (f, next_f), (b, next_b))
            if until is not None:
                if until > now:
                    heappush(self.events, (until, rank))
                return
        if b >= 0 and (f < 0 or not p.forward_first):
            self._take_backward(now, rank, b)
            return
        if b >= 0:
            self._take_forward(now, rank, f)
            return
        if f >= 0:
            time = self.time[_F][f]
            past = now + time - next_b
            if past <= 0 or past <= (p.warmup if self.warm[rank] else p.delay)[rank] * time:
                self._take_forward(now, rank, f)
                return
            heappush(self.events, (next_b, rank))
            return
        share = (p.w_delays_last if self.backwards_left[rank] == 1 else p.w_delays_i)[rank]
        for lane in self.backward_lanes[rank]:
            if self.paid[lane] < len(self.owed[lane]):
                time = self.time[_W][lane]
                past = now + time - ROUNDING
                if past <= next_b + share * time and past <= next_f + p.w_delays_f[rank] * time:
                    self._take_weights(now, rank, lane)
                    return
        until = min(next_b, next_f)
        if now < until < math.inf:
            heappush(self.events, (until, rank))

    def _backward(self, now: float, rank: int) -> tuple[int, float]:
        """The lane of the best ready backward or -1, and when the next gradient will arrive."""
        best, best_number, arrival = -1, 0, math.inf
        oldest = self.p.backward == OLDEST
        for lane in self.backward_lanes[rank]:
            number, known = self.backwards[lane], self.gradients[lane]
            if number < len(known):
                if known[number] > now:
                    arrival = min(arrival, known[number])
                elif best < 0 or (oldest and number < best_number):
                    best, best_number = lane, number
            elif (lane + 1) % self.stages and number < self.total[lane]:
                # Not yet sent; but the stage after may have it next.
                after = self.gradients[lane + 1]
                if self.backwards[lane + 1] == number < len(after):
                    soon = max(self.free[self.rank[lane + 1]], after[number])
                    soon += self.time[_I][lane + 1] + self.back[lane + 1]
                    if now < soon < arrival:
                        arrival = soon
        return best, arrival

    def _forward(self, now: float, rank: int) -> tuple[int, float]:
        """The lane of the best ready forward or -1, and when the next one with room will be."""
        best, best_number, arrival = -1, 0, math.inf
        oldest = self.p.forward == OLDEST
        for lane in self.forward_lanes[rank]:
            number, known = self.forwards[lane], self.inputs[lane]
            if number >= len(known):
                continue
            needs = self.size[lane] + self.reserve[lane]
            if self.memory[rank] + needs > self.limit[rank] or (
                self.alive[rank] + needs > self.cap[rank]
            ):
                continue
            if known[number] > now:
                arrival = min(arrival, known[number])
            elif best < 0 or (oldest and number < best_number):
                best, best_number = lane, number
        return best, arrival

    def _pair(
        self, now: float, rank: int, forward: tuple[int, float], backward: tuple[int, float]
    ) -> float | None:
        """Take a pair (returns `now`), or say until when to wait for one; None: neither."""
        times, stage = self.lanes.times, self.lanes.stage
        (f, next_f), (b, next_b) = forward, backward
        if f >= 0 and b >= 0:
            if saved(times, stage[f], stage[b]) <= 0:
                return None
            time = times.pair[stage[f]][stage[b]]
            step = (_PAIR, f, self.forwards[f], now, now + time, b, self.backwards[b])
            self._place(rank, now + time, step)
            self._done_forward(rank, f, now + time)
            self._done_backward(rank, b, now + time, whole=True)
            return now
        until = next_f if b >= 0 else next_b
        at = stage[b if b >= 0 else f]
        return until if until - now <= self.p.pair_wait * saved(times, at, at) else None

    def _take_forward(self, now: float, rank: int, lane: int) -> None:
        end = now + self.time[_F][lane]
        self._place(rank, end, (_F, lane, self.forwards[lane], now, end, -1, -1))
        self._done_forward(rank, lane, end)

    def _take_backward(self, now: float, rank: int, lane: int) -> None:
        whole = self.p.whole
        kind = _B if whole else _I
        end = now + self.time[kind][lane]
        self._place(rank, end, (kind, lane, self.backwards[lane], now, end, -1, -1))
        self._done_backward(rank, lane, end, whole)

    def _take_weights(self, now: float, rank: int, lane: int) -> None:
        end = now + self.time[_W][lane]
        paid = self.paid[lane]
        self._place(rank, end, (_W, lane, self.owed[lane][paid], now, end, -1, -1))
        self.paid[lane] = paid + 1
        self.memory[rank] -= self.size[lane] * self.pending

    def _place(
        self, rank: int, end: float, step: tuple[int, int, int, float, float, int, int]
    ) -> None:
        self.rows[rank].append(step)
        self.free[rank] = end
        heappush(self.events, (end, rank))

    def _done_forward(self, rank: int, lane: int, end: float) -> None:
        size = self.size[lane]
        self.forwards[lane] += 1
        self.memory[rank] += size
        self.alive[rank] += size
        after = lane + 1
        if after % self.stages == 0:
            self.gradients[lane].append(end)
            return
        arrival = end + self.onward[lane]
        self.inputs[after].append(arrival)
        self._wake(self.rank[after], arrival)

    def _done_backward(self, rank: int, lane: int, end: float, whole: bool) -> None:
        size = self.size[lane]
        number = self.backwards[lane]
        self.backwards[lane] = number + 1
        self.backwards_left[rank] -= 1
        self.warm[rank] = False
        self.alive[rank] -= size
        if whole:
            self.memory[rank] -= size
        else:
            self.memory[rank] -= size * (1 - self.pending)
            self.owed[lane].append(number)
        if lane % self.stages:
            arrival = end + self.back[lane]
            self.gradients[lane - 1].append(arrival)
            self._wake(self.rank[lane - 1], arrival)

    def _wake(self, rank: int, arrival: float) -> None:
        """Have a rank look at an arrival, unless it will be busy then and look afterwards."""
        if self.free[rank] <= arrival:
            heappush(self.events, (arrival, rank))


def _sorted(held: tuple[int, ...], lanes: Lanes, order: str) -> list[int]:
    return sorted(held, key=lambda v: lanes.stage[v], reverse=order == LATER_STAGE)
