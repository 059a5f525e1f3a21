"""From the ideal step to the predicted one, one reason after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..model import ModelConfig
from ..model.flops import token_flops
from ..parallel.schedule import Pair, Schedule, Step
from ..parallel.simulate import Costs, simulate
from .calibration import Calibration
from .cluster import Cluster
from .costs import Stages, phases_of, step_costs
from .layout import Layout
from .prediction import Share
from .times import COMMUNICATES, COMPUTES, LayerTimes

IDEAL, KERNELS = "model FLOPs at the BF16 peak", "kernels"
PREDICTION = "multi-token prediction and routers"
OF_KERNELS = (IDEAL, PREDICTION, KERNELS)
"""Shares that are the same in every layout."""


def ideal_ms(model: ModelConfig, cluster: Cluster, layout: Layout) -> float:
    """Model FLOPs of a step at the BF16 peak of all GPUs: the step of a utilisation (MFU) of 1."""
    flops = token_flops(model, layout.length).published * layout.tokens_per_step
    return flops / (layout.world_size * cluster.gpu.bf16_tflops * 1e12) * 1e3


def waterfall(
    model: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    calibration: Calibration,
    schedule: Schedule,
    stages: Stages,
    *,
    step_ms: float,
) -> tuple[Share, ...]:
    """The reasons in the order in which they are added up; the sum is `step_ms`.

    Up to the pipeline's own they are means over its ranks of what these are busy; from there on
    they are differences of simulated steps. What the last one is given for is what remains: how
    routing and jitter make the step longer.

    Args:
        model, cluster, layout, calibration: as of `predict`.
        schedule: of a step.
        stages: times of the layers, with balanced routing.
        step_ms: the predicted step.
    """
    ideal = ideal_ms(model, cluster, layout)
    quiet = _changed(stages, lambda layer: _without_communication(layer, layer.alone))
    flops = token_flops(model, layout.length)
    beyond = ideal * (flops.everything / flops.published - 1)
    computing = _mean_busy(schedule, quiet, layout)
    crowded = _changed(stages, lambda layer: _in_pairs(layer, calibration.pair_gaps))
    sharing = _mean_busy(schedule, crowded, layout)
    no_gaps = _changed(stages, lambda layer: _paired_by(layer, 1 / calibration.pair_gaps))
    exchanging = _mean_busy(schedule, no_gaps, layout)
    busy = _mean_busy(schedule, stages, layout)
    costs = step_costs(model, cluster, layout, calibration, schedule, stages)
    rows = _rows_only(costs)
    still = replace(rows, send=0.0, message=0.0, bandwidth=float("inf"))
    with_overhead = _busy_of(schedule, still)
    whole = simulate(schedule, still).makespan
    level = simulate(schedule, _even(schedule, still)).makespan
    sent = simulate(schedule, rows).makespan
    finished = simulate(schedule, replace(costs, optimizer=0.0)).makespan
    updated = simulate(schedule, costs).makespan
    found = [
        Share(IDEAL, ideal, "a utilisation (MFU) of 1"),
        Share(PREDICTION, beyond, "their FLOPs at the same peak, which no utilisation counts"),
        Share(
            KERNELS,
            computing - ideal - beyond,
            "what is made again, what is no product, and how near kernels come to the peak; FP8 "
            "takes from it",
        ),
        Share(
            "computation beside communication",
            sharing - computing,
            "pairs and full backwards have fewer SMs, or cores, to compute with",
        ),
        Share(
            "exposed dispatch and combine",
            exchanging - sharing,
            "by themselves in F, I and W, and where a pair cannot hide them",
        ),
        Share(
            "gaps in pairs",
            busy - exchanging,
            "launches and waits for other ranks where two lanes are at work, as calibrated",
        ),
        Share("overhead of actions", with_overhead - busy, "as calibrated"),
        Share("bubble", level - with_overhead, f"of {schedule.name} with even stages"),
        Share("uneven stages", whole - level, "the slowest stages hold up the others"),
        Share("messages between stages", sent - whole, "where a rank waits for one"),
        Share(
            "gradients and parameters between ranks",
            finished - sent,
            "reductions after the rows, and gathered parameters",
        ),
        Share("optimizer", updated - finished, "the update's memory traffic"),
        Share("the step's own overhead", calibration.step_ms, "as calibrated"),
    ]
    rest = step_ms - sum(share.ms for share in found)
    found.append(Share("routing and jitter", rest, "each all-to-all waits for its slowest rank"))
    kept = [found[0], *(share for share in found[1:] if abs(share.ms) > 1e-9 * step_ms)]
    return tuple(kept)


def _changed(stages: Stages, change: Callable[[LayerTimes], LayerTimes]) -> Stages:
    made: dict[int, LayerTimes] = {}
    for stage in stages:
        for layer in stage:
            if id(layer) not in made:
                made[id(layer)] = change(layer)
    return tuple(tuple(made[id(layer)] for layer in stage) for stage in stages)


def _without_communication(layer: LayerTimes, paired: Mapping[str, float]) -> LayerTimes:
    silent = dict.fromkeys(COMMUNICATES, 0.0)
    alone = {**layer.alone, **silent}
    return replace(layer, alone=alone, paired={**paired, **silent})


def _in_pairs(layer: LayerTimes, gaps: float) -> LayerTimes:
    return _without_communication(layer, {name: layer.paired[name] / gaps for name in COMPUTES})


def _paired_by(layer: LayerTimes, factor: float) -> LayerTimes:
    return replace(layer, paired={name: time * factor for name, time in layer.paired.items()})


def _mean_busy(schedule: Schedule, stages: Stages, layout: Layout) -> float:
    """Time in steps, the mean over pipeline ranks, ms."""
    memo: dict[object, float] = {}

    def time(step: Step) -> float:
        key = _kind(step)
        if key not in memo:
            memo[key] = max(
                (span.end for span in phases_of(stages, step, overlap=layout.overlap)), default=0.0
            )
        return memo[key]

    return sum(time(step) for row in schedule.rows for step in row) / schedule.num_ranks


def _busy_of(schedule: Schedule, costs: Costs) -> float:
    times = costs.times(schedule.num_stages)
    return sum(times.of(step) for row in schedule.rows for step in row) / schedule.num_ranks


def _kind(step: Step) -> tuple[object, ...]:
    if isinstance(step, Pair):
        return "pair", step.forward.stage, step.backward.stage
    return step.op, step.stage


def _rows_only(costs: Costs) -> Costs:
    return replace(costs, reduce=0.0, mirror=0.0, optimizer=0.0)


def _even(schedule: Schedule, costs: Costs) -> Costs:
    """About the same work: each stage takes the mean of all, a pair that of the pairs."""
    times = costs.times(schedule.num_stages)
    number = schedule.num_stages

    def mean(values: Sequence[float]) -> float:
        return sum(values) / number

    used = [times.of(step) for row in schedule.rows for step in row if isinstance(step, Pair)]
    return replace(
        costs,
        F=mean(times.F),
        I=mean(times.I),
        W=mean(times.W),
        B=mean(times.B),
        pair=sum(used) / len(used) if used else None,
    )
