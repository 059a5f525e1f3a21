"""What the steps of a schedule cost: a stage's layers put together, alone and in pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

from ..model import ModelConfig
from ..model.stages import Part
from ..parallel.schedule import Action, Op, Pair, Schedule, Step
from ..parallel.schedule.interleaving import PUBLISHED_ORDER
from ..parallel.simulate import Costs
from ..parallel.simulate.phases import (
    BACKWARD,
    FORWARD,
    WEIGHTS,
    PhaseSpan,
    compose,
    duration,
    lane_of,
)
from .calibration import Calibration
from .cluster import Cluster
from .exchange import (
    message_bytes,
    message_transfer,
    mirror_ms,
    reduce_ms,
    stage_parameters,
)
from .layout import Kind, Layout
from .times import COMMUNICATES, LayerTimes, layer_times
from .work import optimizer_bytes

Stages = tuple[tuple[LayerTimes, ...], ...]


def kinds_of(part: Part, model: ModelConfig) -> tuple[Kind, ...]:
    """The layers of a part of the model in the order of its forward."""
    kinds: list[Kind] = []
    if part.embed:
        kinds.append("embedding")
    for layer in part.layers:
        kinds.append("moe" if model.is_moe(layer) else "dense")
    if part.head:
        kinds.append("head")
        for _ in range(model.num_nextn_predict_layers):
            kinds.append("mtp")
    return tuple(kinds)


def stage_times(
    model: ModelConfig,
    layout: Layout,
    cluster: Cluster,
    calibration: Calibration,
    parts: Iterable[Part],
) -> Stages:
    """Per stage the times of its layers, in the order of its forward.

    The embedding is counted with the first layer: layers of two chunks are interleaved one by one,
    and a look-up would shift them all.
    """
    key = replace(layout, layers=None, microbatches=1, schedule="", stages_per_rank=None)
    return tuple(
        _joined(
            tuple(
                layer_times(model, key, cluster, calibration, kind)
                for kind in kinds_of(part, model)
            )
        )
        for part in parts
    )


def slowed(stages: Stages, rows: float, num_bytes: float) -> Stages:
    """The same where the slowest rank of each expert group has more to do than the mean.

    Args:
        stages: with balanced routing.
        rows: of its experts, over the mean.
        num_bytes: that it moves in dispatch and combine, over the mean.
    """
    return tuple(tuple(_slowed(layer, rows, num_bytes) for layer in stage) for stage in stages)


def phases_of(
    stages: Stages, step: Step, *, overlap: bool = True, order: Sequence[str] = PUBLISHED_ORDER
) -> tuple[PhaseSpan, ...]:
    """The phases of one step of a schedule, from its start.

    F, I and W run one phase after the other; pairs and B on two lanes, if `overlap`. What a pair's
    forward has more layers than its backward then runs alone; a backward's layers always have
    weight gradients to run beside their communication.
    """
    if isinstance(step, Pair):
        forward, backward = stages[step.forward.stage], stages[step.backward.stage][::-1]
        if overlap:
            beside = min(len(forward), len(backward))
            left = _alone(forward[beside:])
            return compose(order, _paired(forward[:beside]) + left, _paired(backward))
        first = _one_by_one(FORWARD, _alone(forward), forward=True)
        return first + _later(_whole_backward(backward, order), duration(first))
    layers = stages[step.stage]
    if step.op is Op.F:
        return _one_by_one(FORWARD, _alone(layers), forward=True)
    layers = layers[::-1]
    if step.op is Op.I:
        return _one_by_one(BACKWARD, _alone(layers), forward=False)
    if step.op is Op.W:
        return _one_by_one(tuple(WEIGHTS), _alone(layers), forward=False)
    return compose(order, [], _paired(layers)) if overlap else _whole_backward(layers, order)


def step_costs(
    model: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    calibration: Calibration,
    schedule: Schedule,
    stages: Stages,
) -> Costs:
    """What the simulation needs, ms.

    Args:
        model: that is trained.
        cluster: on what.
        layout: how.
        calibration: of the machine.
        schedule: of a step.
        stages: times of the layers.
    """
    overhead = calibration.overhead_ms
    memo: dict[object, float] = {}

    def time(step: Step, *held: tuple[LayerTimes, ...]) -> float:
        key = (type(step) if isinstance(step, Pair) else step.op, *map(_signature, held))
        if key not in memo:
            memo[key] = duration(phases_of(stages, step, overlap=layout.overlap)) + overhead
        return memo[key]

    numbers = range(len(stages))

    def alone(op: Op) -> list[float]:
        return [time(Action(s, op, 0), stages[s]) for s in numbers]

    def pair(forward: int, backward: int) -> float:
        step = Pair(Action(forward, Op.F, 0), Action(backward, Op.B, 1))
        return time(step, stages[forward], stages[backward])

    parts = layout.parts(model, len(stages))
    size = message_bytes(model, layout) if layout.pp > 1 else 0
    message = message_transfer(model, layout, cluster)
    latency = cluster.links.latency_ms(message.bound) if size else 0.0
    copies = max(len(schedule.placement.replicas(s)) for s in numbers)
    return Costs(
        F=alone(Op.F),
        I=alone(Op.I),
        W=alone(Op.W),
        B=alone(Op.B),
        pair=pair,
        reduce=[reduce_ms(model, layout, cluster, part) for part in parts],
        mirror=[mirror_ms(model, layout, cluster, part) if copies > 1 else 0.0 for part in parts],
        optimizer=[update_ms(model, layout, cluster, calibration, part) for part in parts],
        send=latency,
        message=size,
        bandwidth=size / (message.ms - latency) if size else math.inf,
        unit="ms",
    )


def update_ms(
    model: ModelConfig, layout: Layout, cluster: Cluster, calibration: Calibration, part: Part
) -> float:
    """The optimizer's update of a stage's parameters: memory traffic alone."""
    sizes = stage_parameters(model, layout, part)
    num_bytes = optimizer_bytes(layout, routed=sizes.routed, other=sizes.other, plain=sizes.plain)
    gbps = calibration.optimizer_gbps or cluster.gpu.memory_gbps * calibration.memory
    return num_bytes / gbps * 1e-6


def _joined(layers: tuple[LayerTimes, ...]) -> tuple[LayerTimes, ...]:
    if len(layers) < 2 or layers[0].kind != "embedding":
        return layers
    return (_sum(layers[0], layers[1]), *layers[2:])


@lru_cache(maxsize=4096)
def _slowed(layer: LayerTimes, rows: float, num_bytes: float) -> LayerTimes:
    more = 1 + layer.routed * (rows - 1)

    def of(times: dict[str, float]) -> dict[str, float]:
        return {
            name: time
            * (num_bytes if name in COMMUNICATES else more if name.startswith("mlp") else 1.0)
            for name, time in times.items()
        }

    return replace(layer, alone=of(dict(layer.alone)), paired=of(dict(layer.paired)))


@lru_cache(maxsize=4096)
def _sum(embedding: LayerTimes, layer: LayerTimes) -> LayerTimes:
    """One layer that begins with the other's feed-forward phases, counted with attention."""

    def of(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
        return {
            name: time + (one[name.replace("attn", "mlp")] if name.startswith("attn") else 0.0)
            for name, time in other.items()
        }

    return replace(
        layer,
        alone=of(dict(embedding.alone), dict(layer.alone)),
        paired=of(dict(embedding.paired), dict(layer.paired)),
    )


def _signature(layers: tuple[LayerTimes, ...]) -> tuple[int, ...]:
    return tuple(map(id, layers))


def _paired(layers: Sequence[LayerTimes]) -> list[dict[str, float]]:
    return [dict(layer.paired) for layer in layers]


def _alone(layers: Sequence[LayerTimes]) -> list[dict[str, float]]:
    return [dict(layer.alone) for layer in layers]


def _one_by_one(
    names: Sequence[str], layers: Sequence[dict[str, float]], *, forward: bool
) -> tuple[PhaseSpan, ...]:
    """Each phase after the one before it, whatever its lane: nothing overlaps."""
    return compose(names, layers, []) if forward else compose(names, [], layers)


def _whole_backward(layers: Sequence[LayerTimes], order: Sequence[str]) -> tuple[PhaseSpan, ...]:
    """Input gradients and weight gradients without overlap: each phase after the one before it."""
    spans: list[PhaseSpan] = []
    now = 0.0
    for index, layer in enumerate(layers):
        for name in order:
            if name in FORWARD:
                continue
            end = now + layer.alone[name]
            spans.append(PhaseSpan(name, index, lane_of(name), now, end))
            now = end
    return tuple(spans)


def _later(spans: Sequence[PhaseSpan], by: float) -> tuple[PhaseSpan, ...]:
    return tuple(s._replace(start=s.start + by, end=s.end + by) for s in spans)
