"""The event simulation: when each step of a schedule runs, and what follows from that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from ..schedule import Action, Op, Pair, Schedule, Step, Times, verify
from ..schedule.clock import occupied, row_ends, run
from .amounts import by_stage
from .costs import Costs


class Span(NamedTuple):
    """One step of one rank, and when it starts and ends."""

    step: Step
    start: float
    end: float


class Transfer(NamedTuple):
    """A message from one rank to another.

    Attributes:
        action: the action that made it.
        source, destination: ranks.
        start: when the sending lane of the source takes it up.
        end: when it has arrived.
    """

    action: Action
    source: int
    destination: int
    start: float
    end: float


class Delivery(NamedTuple):
    """A transfer, and the numbers of the steps that make and take its message."""

    source: int
    target: int
    transfer: Transfer


class Finish(NamedTuple):
    """What a rank does after its row: "reduce", "mirror" or "optimizer", of one stage.

    Time in which it waits for another rank lies between these and belongs to none.
    """

    kind: str
    stage: int
    start: float
    end: float


@dataclass(frozen=True)
class Result:
    """What a schedule costs. Times are in the unit of the costs and count from 0.

    Attributes:
        plan: the schedule.
        costs: what was simulated; without steps' costs of its own where `times` were given.
        times: of its steps and messages: what the costs come to for its stages.
        starts, ends: of the steps, numbered row after row as in `plan.graph`.
        finish: per rank, what follows its row.
    """

    plan: Schedule
    costs: Costs
    times: Times
    starts: Sequence[float]
    ends: Sequence[float]
    finish: tuple[tuple[Finish, ...], ...]

    @cached_property
    def spans(self) -> tuple[tuple[Span, ...], ...]:
        """Per rank, its steps with their times."""
        first = self.plan.graph.first
        return tuple(
            tuple(map(Span, row, self.starts[first[rank] :], self.ends[first[rank] :]))
            for rank, row in enumerate(self.plan.rows)
        )

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """Messages between ranks, by source rank and then in the order of sending."""
        return tuple(delivery.transfer for delivery in self.deliveries)

    @cached_property
    def deliveries(self) -> tuple[Delivery, ...]:
        """The transfers with the steps that make and take them."""
        graph, times = self.plan.graph, self.times
        found: list[Delivery] = []
        for rank in range(self.ranks):
            lane = 0.0
            for number in range(graph.first[rank], graph.first[rank + 1]):
                for target, action in self.plan.outgoing[number]:
                    left = max(lane, self.ends[number])
                    lane = left + occupied(times, action)
                    destination = graph.rank_of[target]
                    transfer = Transfer(action, rank, destination, left, lane + times.send)
                    found.append(Delivery(number, target, transfer))
        return tuple(found)

    @property
    def schedule(self) -> str:
        """Name of the schedule."""
        return self.plan.name

    @property
    def ranks(self) -> int:
        """Number of pipeline ranks."""
        return self.plan.num_ranks

    @property
    def stages(self) -> int:
        """Number of stages."""
        return self.plan.num_stages

    @property
    def microbatches(self) -> int:
        """Micro-batches a step."""
        return self.plan.num_microbatches

    @cached_property
    def done(self) -> tuple[float, ...]:
        """Per rank, when it has ended its row and what follows."""
        rows = row_ends(self.plan, self.ends)
        return tuple(
            finish[-1].end if finish else end for end, finish in zip(rows, self.finish, strict=True)
        )

    @property
    def makespan(self) -> float:
        """When the last rank is done."""
        return max(self.done)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Per rank, time in steps, and in reductions and the optimizer after them."""
        of = self.times.of
        return tuple(
            sum(map(of, row)) + sum(f.end - f.start for f in finish)
            for row, finish in zip(self.plan.rows, self.finish, strict=True)
        )

    @property
    def idle(self) -> tuple[float, ...]:
        """Per rank, makespan - busy."""
        makespan = self.makespan
        return tuple(makespan - time for time in self.busy)

    @property
    def bubble_rate(self) -> float:
        """1 - sum(busy) / (ranks * makespan)."""
        return 1 - sum(self.busy) / (self.ranks * self.makespan)

    @property
    def rolling_makespan(self) -> float:
        """The longest that a rank takes from its first start to its end.

        What a step adds where steps follow each other without a barrier, so that a rank begins the
        next one while others end this one: the zero-bubble paper's cost (arXiv 2401.10241, section
        2.3 and table 5), which it reaches by validating the optimizer step afterwards.
        """
        first = self.plan.graph.first
        return max(
            end - (self.starts[start] if start < after else 0.0)
            for end, (start, after) in zip(self.done, pairwise(first), strict=True)
        )

    @property
    def rolling_bubble_rate(self) -> float:
        """1 - sum(busy) / (ranks * rolling_makespan): the zero-bubble paper's bubble rate."""
        return 1 - sum(self.busy) / (self.ranks * self.rolling_makespan)

    @cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """Per rank, the most chunks whose activations are alive at once.

        A chunk is one stage's share of one micro-batch; it lives from the start of F to the end of
        B, or to the end of I. What W still needs after I is counted in `peak_chunks`. Without any
        backward a chunk's activations end with its F.
        """
        return self._peaks((Op.B, Op.I))

    @cached_property
    def peak_chunks(self) -> tuple[int, ...]:
        """Per rank, the most chunks alive at once, where one lives until the end of B or W."""
        return self._peaks((Op.B, Op.W))

    @property
    def parameter_copies(self) -> int:
        """Most ranks that hold any one stage: 2 in bidirectional DualPipe, else 1."""
        placement = self.plan.placement
        return max(len(placement.replicas(stage)) for stage in range(self.stages))

    @cached_property
    def op_counts(self) -> tuple[dict[str, int], ...]:
        """Per rank, number of steps by kind: "F", "B", "I", "W", and "pair".

        The members of a pair are not counted again as F and B.
        """
        return tuple(_op_counts(row) for row in self.plan.rows)

    def to_json(self) -> dict[str, object]:
        """What `counterflow simulate --json` prints of the result itself."""
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
            "peak_chunks": list(self.peak_chunks),
            "rolling_makespan": self.rolling_makespan,
            "rolling_bubble_rate": self.rolling_bubble_rate,
        }

    def _peaks(self, last: tuple[Op, Op]) -> tuple[int, ...]:
        """Steps of a rank do not overlap, so the order of its row alone decides."""
        if not self.plan.has_backward:
            return (1,) * self.ranks
        peaks: list[int] = []
        for row in self.plan.rows:
            alive = peak = 0
            for step in row:
                if isinstance(step, Pair):
                    peak = max(peak, alive + 1)
                elif step.op is Op.F:
                    alive += 1
                    peak = max(peak, alive)
                elif step.op in last:
                    alive -= 1
            peaks.append(peak)
        return tuple(peaks)


def simulate(schedule: Schedule, costs: Costs | Times) -> Result:
    """Run the schedule's rows against each other in simulated time.

    A rank takes its steps in order. A step starts when the rank is free and all that its actions
    need has arrived: at once from the same rank; from another, once the message has had its turn on
    that rank's sending lane and `send` has passed. A pair is one
    step: it starts when both its members can, and what both make is sent when it ends. (The
    executor takes each message when the first phase that needs it is due, and sends the gradient
    as soon as it is there.)

    Args:
        schedule: any schedule that verifies.
        costs: times of the steps and of what goes beside them.

    Raises:
        ScheduleError: the schedule cannot be executed.
        ValueError: the costs do not fit its number of stages.
    """
    verify(schedule)
    if isinstance(costs, Costs):
        times = costs.times(schedule.num_stages)
    else:
        times, costs = costs, Costs()
        if times.num_stages != schedule.num_stages:
            raise ValueError(
                f"times of {times.num_stages} stages, but schedule {schedule.name!r} has "
                f"{schedule.num_stages}"
            )
    starts, ends = run(schedule, times)
    finish = _finish(schedule, costs, row_ends(schedule, ends))
    return Result(schedule, costs, times, starts, ends, finish)


def _finish(schedule: Schedule, costs: Costs, last: list[float]) -> tuple[tuple[Finish, ...], ...]:
    """Reductions of the gradients after the rows, and the optimizer.

    A rank, once its row has ended, sums each of its stages' gradients over its data-parallel ranks;
    then the ranks that hold a stage sum its copies, for which all of them must have come; then,
    when every rank has its gradients, and their norm with them, each updates its parameters. (This
    project's trainer first sums the losses over the pipeline, so that no rank reduces before the
    last row has ended; with ZeRO-1 a stage's gradients leave as soon as it has ended, and
    parameters are gathered beside the next step's beginning.)
    """
    stages = range(schedule.num_stages)
    reduce, mirror, optimizer = (
        by_stage(f"cost {name}", getattr(costs, name), len(stages))
        for name in ("reduce", "mirror", "optimizer")
    )
    done: list[list[Finish]] = [[] for _ in last]
    free = list(last)

    def take(rank: int, kind: str, stage: int, start: float, time: float) -> None:
        free[rank] = start + time
        done[rank].append(Finish(kind, stage, start, free[rank]))

    for rank in range(len(last)):
        for stage in schedule.placement.stages(rank):
            if reduce[stage]:
                take(rank, "reduce", stage, free[rank], reduce[stage])
    for stage in stages:
        holders = schedule.placement.replicas(stage)
        if len(holders) > 1 and mirror[stage]:
            start = max(free[rank] for rank in holders)
            for rank in holders:
                take(rank, "mirror", stage, start, mirror[stage])
    if any(optimizer):
        everyone = max(free)
        for rank in range(len(last)):
            free[rank] = everyone
            for stage in schedule.placement.stages(rank):
                take(rank, "optimizer", stage, free[rank], optimizer[stage])
    return tuple(tuple(row) for row in done)


def _op_counts(row: tuple[Step, ...]) -> dict[str, int]:
    counts = {**dict.fromkeys((op.value for op in Op), 0), "pair": 0}
    for step in row:
        counts["pair" if isinstance(step, Pair) else step.op.value] += 1
    return counts
