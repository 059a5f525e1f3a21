"""How near the simulation's makespan comes to the measured time of a pipeline's step over gloo.

Two ranks train the blocks of `bench.pipeline`, a process and one thread each; every round runs one
step of each schedule. A step is predicted from the others alone, never from its own times: an
action costs the median of the times, over its stage and kind, that the executor's stopwatch
says it was busy, waits excluded. With these go a message's latency (half a round trip through the
executor's transport, measured by itself) and the sum of the gradients of stages held twice
(likewise). Beside it stands what comes out where each action costs just what it took in that step:
what is then missing is the model's own share, not that times differ from step to step.

The measured time runs from the first rank's call of `Pipeline.step` until the last one has also
summed the gradients of stages held twice. What it has and the prediction has not is reported beside
it: the time between one action and the next, and the rest of the step after its rows (open
transfers, the sum of the losses).

The claim is one of ranks that have a core each, so a step counts where no rank's computing thread
was without one for more than WITHOUT_CORE of it: the thread neither ran, as its processor time
says, nor waited for a message. On an idle machine that is nearly every step; on a busy one more
rounds are run until there are enough, and the ratio over all steps is reported too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from counterflow.comm.messages import Message
from counterflow.comm.p2p import ChannelGroups, Transport
from counterflow.parallel import Mesh, MeshShape, Pipeline
from counterflow.parallel.schedule import Schedule, Step, Times, build, names
from counterflow.parallel.simulate import Costs, simulate
from counterflow.parallel.simulate.measured import measured_costs
from tests.ranks import RankPool

from .pipeline import Block

SCHEDULES = ("1f1b", "zb-h1", "zbv", "dualpipe", "dualpipev")
RANKS = 2
TARGET = 0.10
WITHOUT_CORE = 0.05
FEWEST = 5  # steps, for a median over the others of each
PINGS = 40


class StepTimes(NamedTuple):
    """One step on one rank; times in ms.

    Attributes:
        began, ended: of the step and the sum of replicas' gradients, on a clock that all share.
        spans: of the row: start and end since the row began, and what of it was waiting.
        computed: processor time of the thread that computes, in `Pipeline.step`.
        mirror: a second sum of the gradients of replicas, begun by all ranks together.
    """

    began: float
    ended: float
    spans: list[tuple[float, float, float]]
    computed: float
    mirror: float

    @property
    def waited(self) -> float:
        return sum(waited for _, _, waited in self.spans)

    @property
    def between(self) -> float:
        """Time from the end of one action to the start of the next, summed over the row."""
        last = self.spans[-1][1]
        return last - self.spans[0][0] - sum(end - start for start, end, _ in self.spans)

    @property
    def row_ended(self) -> float:
        """On the clock of `began`."""
        return self.began + self.spans[-1][1]

    @property
    def without_core(self) -> float:
        """Share of the step in which the thread neither computed nor waited within its row."""
        lost = self.spans[-1][1] - self.waited - self.computed
        return max(0.0, lost / (self.ended - self.began))


def now_ms() -> float:
    return time.perf_counter() * 1e3  # one clock for all processes, on Linux and macOS


@dataclass
class _Trained:
    """This rank's part of a pipeline, ready to run steps that are timed."""

    pipeline: Pipeline
    modules: list[nn.Sequential]
    batch: torch.Tensor
    targets: torch.Tensor

    def step(self) -> StepTimes:
        for module in self.modules:
            module.zero_grad()
        dist.barrier()
        began, computed = now_ms(), time.thread_time()
        self.pipeline.step(self.batch, self.targets, sum_replicas=False)
        computed = (time.thread_time() - computed) * 1e3
        self.pipeline.replicas.sum()
        ended = now_ms()
        spans = [(s.start_ms, s.end_ms, s.waited_ms) for s in self.pipeline.last_step_spans()]
        dist.barrier()
        again = now_ms()
        self.pipeline.replicas.sum()
        return StepTimes(began, ended, spans, computed, now_ms() - again)


def _trained(rank: int, world: int, plan: Schedule, rows: int, width: int) -> _Trained:
    torch.manual_seed(7)
    batch = torch.randn(plan.num_microbatches * rows, width)
    targets = torch.randn(plan.num_microbatches * rows, width)
    blocks = 2 * world // plan.num_stages  # two blocks a rank, however many stages it holds
    modules = [
        nn.Sequential(*(Block(stage * blocks + i, width) for i in range(blocks)))
        for stage in plan.placement.stages(rank)
    ]
    mesh = Mesh.create(MeshShape(pp=world))
    return _Trained(Pipeline(modules, plan, mesh, F.mse_loss), modules, batch, targets)


def _pings(rank: int, rows: int, width: int) -> list[float]:
    """Half of each round trip of a micro-batch's activations, through the executor's transport."""
    group = dist.group.WORLD
    assert group is not None
    channel = ChannelGroups(group, group)
    transport = Transport(rank, {(0, 1): channel, (1, 0): channel}, torch.device("cpu"))
    messages = [Message("a ping", index) for index in range(PINGS)]
    payload = (torch.randn(rows, width),)
    transport.begin({1 - rank: messages})
    dist.barrier()
    times: list[float] = []
    for message in messages:
        began = now_ms()
        if rank == 0:
            transport.send(1, message, payload)
        transport.receive(1 - rank, message)
        if rank == 1:
            transport.send(0, message, payload)
        times.append((now_ms() - began) / 2)
    transport.flush()
    return times[PINGS // 4 :]  # the first ones find no buffers posted


def case(
    rank: int,
    world: int,
    plans: Mapping[str, Schedule],
    rows: int,
    width: int,
    steps: int,
    limit_s: float,
) -> dict[str, Any]:
    """What one rank does: {"pings": ms, "steps": {schedule: StepTimes of each step}}.

    Rounds go on until every schedule has `steps` that count, or `limit_s` is over.
    """
    pings = _pings(rank, rows, width)
    trained = {name: _trained(rank, world, plan, rows, width) for name, plan in plans.items()}
    for one in trained.values():
        one.step()  # warm-up: buffers, connections
    taken: dict[str, list[StepTimes]] = {name: [] for name in trained}
    began = now_ms()
    counted = torch.zeros(len(trained))
    late = torch.zeros(1)
    while not late and counted.min() < steps:
        for place, (name, one) in enumerate(trained.items()):
            taken[name].append(one.step())
            share = torch.tensor(taken[name][-1].without_core)
            dist.all_reduce(share, dist.ReduceOp.MAX)
            counted[place] += share <= WITHOUT_CORE
        late = torch.tensor(float(now_ms() - began > limit_s * 1e3))
        dist.all_reduce(late, dist.ReduceOp.MAX)
    return {"pings": pings, "steps": taken}


def busy_times(plan: Schedule, step: Sequence[StepTimes]) -> dict[Step, float]:
    """How long each action or pair of the schedule was busy in one step, on whichever rank."""
    return {
        action: end - start - waited
        for row, times in zip(plan.rows, step, strict=True)
        for action, (start, end, waited) in zip(row, times.spans, strict=True)
    }


def costs_of(plan: Schedule, steps: Sequence[Sequence[StepTimes]], send: float) -> Costs:
    """Costs, ms: the medians over `steps`, by kind and stage."""
    busy = (of for step in steps for of in busy_times(plan, step).items())
    held = len(plan.placement.stages(0))
    # A cost a stage; the sum takes a rank's stages at once.
    return replace(measured_costs(plan, busy), send=send, mirror=mirror_ms(steps) / held)


@dataclass(frozen=True)
class _EachAction(Times):
    """Times by action, where the simulation has them by stage."""

    busy: Mapping[Step, float] = field(default_factory=dict)

    def of(self, step: Step) -> float:
        return self.busy[step]


def replayed(plan: Schedule, step: Sequence[StepTimes], send: float) -> float:
    """The makespan where each action takes as long as it took in this very step, ms."""
    times = Times.uniform(plan.num_stages, send=send)
    each = _EachAction(**vars(times), busy=busy_times(plan, step))
    return simulate(plan, each).makespan + mirror_ms([step])


def mirror_ms(steps: Sequence[Sequence[StepTimes]]) -> float:
    """Sum of the gradients of replicas: of the slowest rank, the median over steps."""
    return statistics.median(max(times.mirror for times in step) for step in steps)


def ratios_of(plan: Schedule, steps: Sequence[Sequence[StepTimes]], send: float) -> list[float]:
    """Predicted / measured of each step, its costs those of the other steps."""
    found: list[float] = []
    for index, step in enumerate(steps):
        others = [*steps[:index], *steps[index + 1 :]]
        found.append(simulate(plan, costs_of(plan, others, send)).makespan / measured(step))
    return found


def measured(step: Sequence[StepTimes]) -> float:
    """From the first rank's beginning to the last one's end, ms."""
    return max(t.ended for t in step) - min(t.began for t in step)


def predict(
    name: str, plan: Schedule, steps: Sequence[Sequence[StepTimes]], send: float
) -> dict[str, Any]:
    """What is known of one schedule: predicted / measured, times and costs.

    Args:
        name: of the schedule.
        plan: the schedule.
        steps: per step, its times by rank.
        send: latency of a message, ms.
    """
    kept = [step for step in steps if max(t.without_core for t in step) <= WITHOUT_CORE]
    counts = {"schedule": name, "steps_run": len(steps), "steps_counted": len(kept)}
    if len(kept) < FEWEST:
        return {**counts, "predicted_to_measured": None}
    ratios = ratios_of(plan, kept, send)
    costs = costs_of(plan, kept, send)

    def median(value: Callable[[Sequence[StepTimes]], float]) -> float:
        return statistics.median(map(value, kept))

    return {
        **counts,
        "predicted_to_measured": statistics.median(ratios),
        "target": [1 - TARGET, 1 + TARGET],
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
        "over_all_steps": statistics.median(ratios_of(plan, steps, send)),
        "each_action_as_it_was": median(lambda step: replayed(plan, step, send) / measured(step)),
        "without_send": statistics.median(ratios_of(plan, kept, 0.0)),
        "measured_ms": median(measured),
        "predicted_ms": simulate(plan, costs).makespan,
        "between_actions_ms": median(lambda step: max(t.between for t in step)),
        "after_rows_ms": median(
            lambda step: max(t.ended for t in step) - max(t.row_ended for t in step)
        ),  # with the sum that mirror_ms is, too
        "mirror_ms": mirror_ms(kept),
        "without_core": median(lambda step: max(t.without_core for t in step)),
        "costs_ms": {op: getattr(costs, op) for op in ("F", "I", "W", "B")},
    }


def predictions(
    microbatches: int, rows: int, width: int, steps: int, limit_s: float
) -> dict[str, Any]:
    """`predict` for every schedule, on two ranks; prints and returns the results."""
    plans = {
        name: build(name, ranks=RANKS, microbatches=microbatches)
        for name in SCHEDULES
        if name in names()
    }
    sizes = {"rows": rows, "width": width, "steps": steps, "limit_s": limit_s}
    with RankPool() as pool:
        by_rank = pool.run(case, world=RANKS, timeout_s=limit_s + 300, plans=plans, **sizes)
    send = statistics.median(by_rank[0]["pings"])
    print(
        f"predicted / measured: {RANKS} ranks, {microbatches} micro-batches of {rows} rows; a "
        f"message takes {send:.2f} ms   target {1 - TARGET:.2f} to {1 + TARGET:.2f}"
    )
    runs: list[dict[str, Any]] = []
    for name, plan in plans.items():
        taken = [list(step) for step in zip(*(r["steps"][name] for r in by_rank), strict=True)]
        runs.append(predict(name, plan, taken, send))
        print(f"  {name:10} {_told(runs[-1])}")
    return {"ranks": RANKS, "microbatches": microbatches, **sizes, "send_ms": send, "runs": runs}


def _told(run: Mapping[str, Any]) -> str:
    counted = f"{run['steps_counted']} of {run['steps_run']} steps"
    if run["predicted_to_measured"] is None:
        return f"too few steps with a core a rank ({counted}): the machine is busy, run it again"
    return (
        f"{run['predicted_to_measured']:6.3f}   {run['predicted_ms']:6.1f} / "
        f"{run['measured_ms']:6.1f} ms, {counted}   each action as it was "
        f"{run['each_action_as_it_was']:6.3f}   all steps {run['over_all_steps']:6.3f}"
    )
