"""A whole training step: the pipeline, what follows it, and what randomness adds."""

from __future__ import annotations

from dataclasses import dataclass

from ..model import ModelConfig
from ..parallel.schedule import Schedule
from ..parallel.simulate import Result, simulate
from .assumptions import notes
from .calibration import Calibration
from .cluster import Cluster
from .costs import Stages, slowed, stage_times, step_costs
from .layout import Layout
from .memory import Device, rank_memory
from .prediction import Prediction, RankTime, Share
from .ranks import Jitter, RanksResult, simulate_ranks
from .routing import Routing, expected_slowdown
from .waterfall import OF_KERNELS, ideal_ms, waterfall


@dataclass(frozen=True)
class Quick:
    """A step without randomness of its own: what the slowest of each expert group takes on average.

    Attributes:
        schedule: of the step.
        stages: times of its layers, balanced.
        result: the simulation, with `expected_slowdown` in its costs.
        step_ms: the step.
    """

    schedule: Schedule
    stages: Stages
    result: Result
    step_ms: float


def quick_step(
    model: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    calibration: Calibration,
    routing: Routing | None = None,
) -> Quick:
    """A step by one simulated pipeline, some milliseconds' work.

    Args:
        model: that is trained.
        cluster: on what.
        layout: how.
        calibration: how fast the machine is.
        routing: how uneven tokens fall on ranks; None: balanced.

    Raises:
        ValueError: there is no such schedule, or the model cannot be cut so.
    """
    schedule = layout.make_schedule()
    parts = layout.parts(model, schedule.num_stages)
    stages = stage_times(model, layout, cluster, calibration, parts)
    taken = stages
    if routing is not None and layout.ep > 1:
        taken = slowed(stages, *_slowdown(routing, model, layout, cluster))
    costs = step_costs(model, cluster, layout, calibration, schedule, taken)
    result = simulate(schedule, costs)
    return Quick(schedule, stages, result, result.makespan + calibration.step_ms)


def predict(
    model: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    calibration: Calibration,
    *,
    routing: Routing | None = None,
    jitter: Jitter | None = None,
    seed: int = 0,
) -> Prediction:
    """A step with every rank simulated by itself, and why it takes as long as it does.

    Args:
        model: that is trained.
        cluster: on what.
        layout: how.
        calibration: how fast the machine is.
        routing: how uneven tokens fall on ranks; None: balanced.
        jitter: how ranks differ, and phases of one rank; None: not at all.
        seed: of what is drawn.

    Raises:
        ValueError: there is no such schedule, the model cannot be cut so, or the cluster has not
            as many GPUs.
    """
    cluster.check_gpus(layout.world_size)

    def quick(
        *, calibration: Calibration = calibration, routing: Routing | None = routing
    ) -> Result:
        return quick_step(model, cluster, layout, calibration, routing).result

    balanced = quick_step(model, cluster, layout, calibration)
    schedule, stages, result = balanced.schedule, balanced.stages, balanced.result
    times = result.times
    drawn = None
    if routing is not None and routing.kind != "balanced" and layout.ep > 1:
        drawn = routing.of(model, layout, gpus_per_node=cluster.gpus_per_node)
    ranks = simulate_ranks(
        schedule,
        stages,
        dp=layout.dp,
        ep=layout.ep,
        routing=drawn,
        jitter=jitter,
        overlap=layout.overlap,
        send_ms=times.send,
        message_ms=[*times.occupy, 0.0] if times.occupy else 0.0,
        overhead_ms=calibration.overhead_ms,
        seed=seed,
    )
    after = result.makespan - simulate(schedule, times).makespan
    step_ms = ranks.makespan + after + calibration.step_ms
    steps = waterfall(model, cluster, layout, calibration, schedule, stages, step_ms=step_ms)
    ideal = ideal_ms(model, cluster, layout)
    return Prediction(
        model=model,
        cluster=cluster,
        layout=layout,
        result=result,
        stages=stages,
        step_ms=step_ms,
        ranks=_rank_times(result, ranks, step_ms),
        waterfall=steps,
        memory=rank_memory(model, layout, schedule, device=device_of(cluster)),
        memory_bytes=cluster.gpu.memory_bytes,
        mfu=ideal / step_ms,
        notes=notes(model, cluster, layout, calibration, routing, quick),
        limit=limit_of(steps),
    )


def _slowdown(
    routing: Routing, model: ModelConfig, layout: Layout, cluster: Cluster
) -> tuple[float, float]:
    found = expected_slowdown(routing, model, layout, gpus_per_node=cluster.gpus_per_node)
    return found.rows, found.bytes


def _rank_times(result: Result, ranks: RanksResult, step_ms: float) -> tuple[RankTime, ...]:
    """Per pipeline rank; what is not busy is its bubble."""
    kinds = {kind: ranks.means(kind) for kind in ("F", "B", "I", "W", "pair")}
    found: list[RankTime] = []
    for rank, finish in enumerate(result.finish):
        reduce = sum(f.end - f.start for f in finish if f.kind != "optimizer")
        update = sum(f.end - f.start for f in finish if f.kind == "optimizer")
        busy = RankTime(
            forward=kinds["F"][rank],
            backward=kinds["B"][rank] + kinds["I"][rank],
            weight=kinds["W"][rank],
            paired=kinds["pair"][rank],
            bubble=0.0,
            reduce=reduce,
            optimizer=update,
        )
        found.append(busy._replace(bubble=step_ms - busy.total))
    return tuple(found)


def device_of(cluster: Cluster) -> Device:
    """Where ranks of a cluster compute: whatever has multiprocessors is a GPU."""
    return "cuda" if cluster.gpu.num_sms else "cpu"


def limit_of(steps: tuple[Share, ...]) -> str:
    """Of what a layout, a schedule or a network can change, what adds most."""
    worst = max(steps, key=lambda share: 0.0 if share.name in OF_KERNELS else share.ms)
    return f"{worst.name}: {worst.why}"
