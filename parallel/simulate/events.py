"""The event simulation: when each step of a schedule runs, and what follows from that."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from ..schedule import Action, Op, Pair, Schedule, Step, actions, replay, verify
from .costs import Costs


class Span(NamedTuple):
    """One step of one rank, and when it starts and ends."""

    step: Step
    start: float
    end: float


@dataclass(frozen=True)
class Result:
    """What a schedule costs. Times are in the unit of the costs and count from 0.

    Attributes:
        schedule: name of the schedule.
        ranks: number of pipeline ranks.
        stages: number of stages.
        microbatches: micro-batches a step.
        makespan: when the last rank ends.
        busy: per rank, time in steps.
        idle: per rank, makespan - busy.
        bubble_rate: 1 - sum(busy) / (ranks * makespan).
        peak_activations: per rank, the most chunks (one stage's share of one micro-batch) whose
            activations are alive at once: from the start of F to the end of B, or to the end of I.
            After I, W still holds its own inputs, the linear layers', which are not counted here.
            Without any backward a chunk's activations end with its F.
        parameter_copies: most ranks that hold any one stage: 2 in bidirectional DualPipe, else 1.
        op_counts: per rank, number of steps by kind: "F", "B", "I", "W", and "pair", whose members
            are not counted again as F and B.
        spans: per rank, its steps with their times.
    """

    schedule: str
    ranks: int
    stages: int
    microbatches: int
    makespan: float
    busy: tuple[float, ...]
    idle: tuple[float, ...]
    bubble_rate: float
    peak_activations: tuple[int, ...]
    parameter_copies: int
    op_counts: tuple[dict[str, int], ...]
    spans: tuple[tuple[Span, ...], ...]

    def to_json(self) -> dict[str, object]:
        """All but the spans, as `counterflow simulate --json` prints it."""
        return {
            "schedule": self.schedule,
            "ranks": self.ranks,
            "stages": self.stages,
            "microbatches": self.microbatches,
            "makespan": self.makespan,
            "busy": list(self.busy),
            "idle": list(self.idle),
            "bubble_rate": self.bubble_rate,
            "peak_activations": list(self.peak_activations),
            "parameter_copies": self.parameter_copies,
            "op_counts": [dict(counts) for counts in self.op_counts],
        }


def simulate(schedule: Schedule, costs: Costs) -> Result:
    """Run the schedule's rows against each other in simulated time.

    A rank takes its steps in order. A step starts when the rank is free and all that its actions
    need has arrived: at once from the same rank, `costs.send` after the end of the step that made
    it from another. A pair starts when both its members can, and both end with it.

    Args:
        schedule: any schedule that verifies.
        costs: time of each kind of step.

    Raises:
        ScheduleError: the schedule cannot be executed.
    """
    verify(schedule)
    spans = _spans(schedule, costs)
    busy = tuple(sum(costs.of(step) for step in row) for row in schedule.rows)
    makespan = max(row[-1].end for row in spans)
    placement = schedule.placement
    return Result(
        schedule=schedule.name,
        ranks=schedule.num_ranks,
        stages=schedule.num_stages,
        microbatches=schedule.num_microbatches,
        makespan=makespan,
        busy=busy,
        idle=tuple(makespan - time for time in busy),
        bubble_rate=1 - sum(busy) / (schedule.num_ranks * makespan),
        peak_activations=tuple(_peak(row, schedule.has_backward) for row in schedule.rows),
        parameter_copies=max(len(placement.replicas(s)) for s in range(schedule.num_stages)),
        op_counts=tuple(_op_counts(row) for row in schedule.rows),
        spans=spans,
    )


def _spans(schedule: Schedule, costs: Costs) -> tuple[tuple[Span, ...], ...]:
    spans: list[list[Span]] = [[] for _ in schedule.rows]
    made: dict[Action, tuple[float, int]] = {}  # when, and on which rank
    for rank, index in replay(schedule).order:
        step = schedule.rows[rank][index]
        start = spans[rank][-1].end if index else 0
        for action in actions(step):
            for need in schedule.needs[action]:
                end, maker = made[need]
                start = max(start, end if maker == rank else end + costs.send)
        span = Span(step, start, start + costs.of(step))
        spans[rank].append(span)
        for action in actions(step):
            made[action] = (span.end, rank)
    return tuple(tuple(row) for row in spans)


def _peak(row: tuple[Step, ...], has_backward: bool) -> int:
    """Steps of a rank do not overlap, so the order of its row alone decides."""
    if not has_backward:
        return 1
    alive = peak = 0
    for step in row:
        ops = [action.op for action in actions(step)]
        alive += ops.count(Op.F)
        peak = max(peak, alive)
        alive -= ops.count(Op.B) + ops.count(Op.I)
    return peak


def _op_counts(row: tuple[Step, ...]) -> dict[str, int]:
    counts = Counter("pair" if isinstance(step, Pair) else step.op.value for step in row)
    return {kind: counts[kind] for kind in (*(op.value for op in Op), "pair")}
