"""Every rank of a step, one by one: pipelines side by side that wait for each other's experts.

Each data-parallel rank runs its pipeline's rows with times of its own. What makes ranks differ is
routing (`routing`) and jitter; what makes them wait for each other is expert parallelism: dispatch
and combine end for all of a group together, when the last rank has come and the busiest has moved
its bytes. So the step is slower than the mean of its ranks, which is what this is for.

Shapes: p pipeline ranks, d data-parallel ranks, g expert groups of R ranks each, d = g * R.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..parallel.schedule import Op, Pair, Schedule, Step, verify
from ..parallel.schedule.interleaving import PUBLISHED_ORDER
from ..parallel.simulate import Phases, Span
from ..parallel.simulate.amounts import ByStage, by_stage, check_amount
from ..parallel.simulate.phases import NAMES
from .jitter import Jitter, Noise
from .loads import Floats
from .programs import NEEDS_NO_OTHER, START, Program
from .rank_steps import Steps
from .routing import Drawn, GroupRouting
from .times import LayerTimes

# Kinds of steps, as `simulate.Result.op_counts` has them.
KINDS = (*(op.value for op in Op), "pair")


@dataclass(frozen=True, eq=False)
class RanksResult:
    """What each rank's rows came to. Times are ms; arrays are [p, d].

    Attributes:
        ends: of the rows.
        by_kind: time in steps of each of KINDS, with what they wait inside.
        computing: time that phases of computation take.
        waiting: time from when a rank was ready for dispatch or combine until the last of its
            expert group was. It is part of the steps; some of it, computation hides.
        spans: per pipeline rank, the steps of one data-parallel rank.
    """

    ends: Floats
    by_kind: Mapping[str, Floats]
    computing: Floats
    waiting: Floats
    spans: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        """When the last rank has ended its row."""
        return float(self.ends.max())

    @property
    def busy(self) -> Floats:
        """Time in steps."""
        return np.sum(list(self.by_kind.values()), axis=0)

    @property
    def idle(self) -> Floats:
        """Time outside of steps, until the last rank has ended its row."""
        return self.makespan - self.busy

    @property
    def slowest(self) -> tuple[int, int]:
        """The rank (p, d) that computes for longest, against the mean of its pipeline rank."""
        mean = np.maximum(self.computing.mean(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        place = int((self.computing / mean).argmax())
        return place // self.ends.shape[1], place % self.ends.shape[1]

    def means(self, kind: str) -> tuple[float, ...]:
        """Per pipeline rank, the mean time over its data-parallel ranks in steps of a kind."""
        return tuple(self.by_kind[kind].mean(axis=1).tolist())


def simulate_ranks(
    schedule: Schedule,
    stages: Sequence[Sequence[LayerTimes]],
    *,
    dp: int,
    ep: int = 1,
    order: Sequence[str] = PUBLISHED_ORDER,
    routing: GroupRouting | None = None,
    jitter: Jitter | None = None,
    overlap: bool = True,
    send_ms: float = 0.0,
    message_ms: ByStage = 0.0,
    overhead_ms: float = 0.0,
    seed: int = 0,
    keep_dp: int = 0,
) -> RanksResult:
    """Run the rows of all ranks.

    Steps, messages and phases follow the rules of `parallel.simulate.simulate` and
    `simulate.phases.compose`; without routing and jitter, so do all times.

    Args:
        schedule: any that verifies.
        stages: per stage the times of its layers, in the order of the forward. F, I and W take what
            phases take alone, one after the other; B and pairs what they take paired.
        dp: data-parallel ranks.
        ep: of each expert group; neighbours.
        order: of a pair's phases.
        routing: how uneven; None for balanced.
        jitter: of times; None for none.
        overlap: phases run on two lanes; without, one after the other, at their times alone.
        send_ms: latency of a message between stages.
        message_ms: that it keeps the sending lane of its rank; one number, or one a stage for the
            boundary after it.
        overhead_ms: that a step takes besides its phases, before them.
        seed: of all that is drawn.
        keep_dp: the data-parallel rank whose steps are kept.

    Raises:
        ScheduleError: the schedule cannot be executed.
        ValueError: sizes that do not fit together, a phase without a time, or a wrong order.
    """
    verify(schedule)
    _check(schedule, stages, dp, ep, order, routing, keep_dp)
    run = _Run(
        schedule,
        (dp // ep, ep),
        Steps(schedule, stages, tuple(order), overlap, routing, seed),
        (jitter or Jitter()).noise((schedule.num_ranks, dp // ep, ep), seed),
        check_amount("overhead_ms", overhead_ms),
    )
    taken = by_stage("message_ms", message_ms, schedule.num_stages, summed=False)
    run.rows(check_amount("send_ms", send_ms), taken, keep_dp)
    return run.result()


class _Run:
    """The ranks while their rows run.

    Args:
        schedule: of which rows.
        shape: (g, R).
        steps: what ranks do in each step.
        noise: of times.
        overhead_ms: of each step.
    """

    def __init__(
        self,
        schedule: Schedule,
        shape: tuple[int, int],
        steps: Steps,
        noise: Noise,
        overhead_ms: float,
    ) -> None:
        size = (schedule.num_ranks, *shape)
        self._schedule, self._shape = schedule, shape
        self._steps, self._noise, self._overhead_ms = steps, noise, overhead_ms
        self._ends = list(np.zeros(size))
        self._kinds = {kind: np.zeros(size) for kind in KINDS}
        self._computing, self._waiting = np.zeros(size), np.zeros(size)
        self._spans: list[list[Span]] = [[] for _ in schedule.rows]

    def rows(self, send_ms: float, message_ms: Sequence[float], keep_dp: int) -> None:
        """Run all rows: the walk of `schedule.clock.run`, with an entry a rank for each time.

        Args:
            send_ms: latency of messages.
            message_ms: by the boundary after each stage, what a message keeps the sending lane.
            keep_dp: the data-parallel rank whose steps are kept.
        """
        schedule, graph = self._schedule, self._schedule.graph
        numbered = [step for row in schedule.rows for step in row]
        arrived: dict[int, Floats] = {}
        lanes: dict[int, Floats] = {}
        for number in graph.order:
            p, step = graph.rank_of[number], numbered[number]
            start = self._ends[p]
            if number in arrived:
                start = np.maximum(start, arrived.pop(number))
            end = self._ends[p] = self._step(p, step, start)
            kept = float(start.flat[keep_dp]), float(end.flat[keep_dp])
            self._spans[p].append(Span(step, *kept))
            for target, action in schedule.outgoing[number]:
                left = end
                taken = message_ms[action.stage - (action.op is not Op.F)]
                if taken:
                    left = lanes[p] = np.maximum(lanes.get(p, 0.0), end) + taken
                arrival = left + send_ms
                before = arrived.get(target)
                arrived[target] = arrival if before is None else np.maximum(before, arrival)

    def _step(self, p: int, step: Step, start: Floats) -> Floats:
        """Run a step on all ranks of a pipeline rank; [g, R], when it ends."""
        table = self._steps.table(step)
        loads = self._steps.loads(step, self._shape[0])
        times = table.durations(loads, self._shape, self._noise, p)
        end = self._phases(table.program, start + self._overhead_ms, times, loads, p)
        self._computing[p] += times.sum(axis=0)
        self._kinds["pair" if isinstance(step, Pair) else step.op.value][p] += end - start
        return end

    def _phases(
        self,
        laid_out: Program,
        begin: Floats,
        times: Floats,
        loads: tuple[Drawn | None, Drawn | None],
        rank: int,
    ) -> Floats:
        """Run the phases of a step; when the last has ended on each rank.

        Times of phases are [g, R], or [g, 1] where one ends for a whole group together.
        """
        waiting = self._waiting[rank]
        ends: list[Floats] = []
        computed = 0
        for phase in laid_out.phases:
            ready = begin if phase.after == START else ends[phase.after]
            if phase.also != NEEDS_NO_OTHER:
                ready = np.maximum(ready, ends[phase.also])
            if phase.computes:
                ends.append(ready + times[computed])
                computed += 1
                continue
            if not phase.ms:  # nothing to exchange, as in a layer without experts
                ends.append(ready)
                continue
            together = np.maximum.reduce(ready, axis=1, keepdims=True)
            if ready.shape != together.shape:
                waiting += together
                waiting -= ready
            drawn = loads[phase.backward]
            taken = phase.ms
            if drawn is not None and phase.experts >= 0:
                taken = phase.ms * drawn.busiest[phase.experts][:, None]
            ends.append(together + self._noise.exchange(taken, self._shape[0]))
        one, other = (begin if last == START else ends[last] for last in laid_out.last)
        return np.broadcast_to(np.maximum(one, other), self._shape)

    def result(self) -> RanksResult:
        """What has come of it."""
        ranks = len(self._ends)
        return RanksResult(
            np.array(self._ends).reshape(ranks, -1),
            {kind: total.reshape(ranks, -1) for kind, total in self._kinds.items()},
            self._computing.reshape(ranks, -1),
            self._waiting.reshape(ranks, -1),
            tuple(map(tuple, self._spans)),
        )


def _check(
    schedule: Schedule,
    stages: Sequence[Sequence[LayerTimes]],
    dp: int,
    ep: int,
    order: Sequence[str],
    routing: GroupRouting | None,
    keep_dp: int,
) -> None:
    if dp < 1 or ep < 1 or dp % ep:
        raise ValueError(
            f"ep={ep} must divide dp={dp}: experts are sharded over ep of the dp ranks; choose "
            "another of them"
        )
    if routing is not None and routing.ep != ep:
        raise ValueError(
            f"the routing is of groups of {routing.ep} ranks, but ep={ep}; make it for the layout "
            "that is simulated"
        )
    if not 0 <= keep_dp < dp:
        raise ValueError(f"keep_dp={keep_dp} must be one of the data-parallel ranks 0..{dp - 1}")
    if len(stages) != schedule.num_stages:
        raise ValueError(
            f"times of {len(stages)} stages, but schedule {schedule.name!r} has "
            f"{schedule.num_stages}; give the layers of each stage"
        )
    Phases(dict.fromkeys(NAMES, 0.0), order=order)  # refuses orders that do not exist
    for stage, layers in enumerate(stages):
        for layer in layers:
            for name in NAMES:
                for what, times in (("alone", layer.alone), ("paired", layer.paired)):
                    if name not in times:
                        raise ValueError(
                            f"stage {stage} has a layer of kind {layer.kind} without a time of "
                            f"{name} {what}; each of {', '.join(NAMES)} has one, 0 for none"
                        )
                    check_amount(f"stage {stage}: {name} {what}", times[name])
