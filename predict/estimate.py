"""How long a step of each of many layouts takes: what layouts share is worked out once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import inf

from ..model import ModelConfig
from ..model.stages import Part
from ..parallel.schedule import Action, Op, Pair, Placement, Schedule, Times
from ..parallel.schedule.clock import row_ends, run
from ..parallel.simulate import Costs
from ..parallel.simulate.amounts import ByStage, by_stage
from ..parallel.simulate.phases import (
    BACKWARD,
    COMMUNICATION,
    COMPUTE,
    FORWARD,
    WEIGHTS,
    duration,
    lane_of,
)
from .calibration import Calibration
from .cluster import Cluster
from .costs import Stages, kinds_of, phases_of, slowed, stage_times, step_costs, update_ms
from .exchange import reduce_ms
from .feasible import Reason, schedule_of, size_of, why_no_memory, why_no_schedule, why_no_states
from .layout import Layout
from .partition import Cut, LayerCosts, best_cut, even_cut
from .routing import Routing, expected_slowdown
from .times import Kind, LayerTimes, layer_times


class Estimator:
    """Step times of layouts of one model on one machine.

    A step is simulated without a queue at the sending lanes: a message takes its time and the
    latency, whatever else its rank sends. (`step.quick_step` has the queue, and takes ten times as
    long.)

    Args:
        model: that is trained.
        cluster: on what.
        calibration: how fast it is.
        typical: the layout by whose times models are cut, for each number of ranks, kind of
            placement and use of FP8.
        routing: how uneven tokens fall on ranks; None: balanced.
    """

    def __init__(
        self,
        model: ModelConfig,
        cluster: Cluster,
        calibration: Calibration,
        typical: Layout,
        routing: Routing | None = None,
    ) -> None:
        self.model, self.cluster, self.calibration = model, cluster, calibration
        self.routing = routing
        self._typical = typical
        self._cuts: dict[tuple[object, ...], Cut] = {}
        self._refined: dict[tuple[object, ...], Cut] = {}
        self._busy: dict[Layout, float] = {}
        self._part = Part.whole(model)
        self._whole = kinds_of(self._part, model)

    def bound_ms(self, layout: Layout) -> float:
        """What no schedule can be faster than, whatever its cut.

        A forward and a backward of a layer run either beside others, and then the step that they
        are part of is no shorter than all its phases of one lane, at their paired times; or by
        themselves, one phase after the other. So a rank is busy for at least the shorter of the two
        with each layer and micro-batch. After its row it reduces the gradients of its stages and
        updates them. All ranks together do that for the whole model at least once; the busiest of
        them has no less to do than the mean, and no step ends before it has. Waits and imbalance
        only add.
        """
        key = _alike(layout)
        if key not in self._busy:
            by_lane = [
                sum(
                    count * _least(self._layer(layout, kind), lane, overlap=layout.overlap)
                    for kind, count in Counter(self._whole).items()
                )
                for lane in (COMPUTE, COMMUNICATION)
            ]
            self._busy[key] = max(by_lane)
        after = reduce_ms(self.model, layout, self.cluster, self._part)
        after += update_ms(self.model, layout, self.cluster, self.calibration, self._part)
        return (layout.microbatches * self._busy[key] + after) / layout.pp

    def why_not(self, layout: Layout) -> Reason | None:
        """What stands against a layout that can be placed, its memory left out as far as it
        depends on the schedule."""
        states = why_no_states(self.model, self.cluster, layout)
        return states or why_no_schedule(self.model, layout)

    def why_no_memory(self, layout: Layout) -> Reason | None:
        """Whether a layout, with its cut, lacks memory."""
        return why_no_memory(self.model, self.cluster, layout)

    def cut(self, layout: Layout) -> Layout:
        """The layout with an even cut, unless it has one; its schedule exists."""
        if layout.layers is not None:
            return layout
        placement = _schedule(layout).placement
        key = (placement.routes, layout.pp, layout.fp8)
        if key not in self._cuts:
            costs = self._layer_costs(replace(self._typical, pp=layout.pp, fp8=layout.fp8))
            self._cuts[key] = even_cut(costs, placement)
        return replace(layout, layers=self._cuts[key])

    def refined(self, layout: Layout) -> Layout:
        """The layout with the cut that makes such a step fastest, as far as memory allows.

        The cut is searched once for all layouts with the same schedule and use of FP8.
        """
        key = (*size_of(layout), layout.fp8)
        if key not in self._refined:
            placement = _schedule(layout).placement
            costs = self._layer_costs(layout)
            self._refined[key] = best_cut(costs, placement, lambda cut: self._fits(layout, cut))
        cut = self._refined[key]
        return min(
            (layout, replace(layout, layers=cut)), key=lambda one: self._fits(one, one.layers)
        )

    def _fits(self, layout: Layout, cut: Cut | None) -> float:
        """A step by this cut; infinite where memory is lacking."""
        made = replace(layout, layers=cut)
        return inf if self.why_no_memory(made) else self.step_ms(made)

    def step_ms(self, layout: Layout) -> float:
        """A step of a feasible layout."""
        schedule = _schedule(layout)
        parts = layout.parts(self.model, schedule.num_stages)
        alike = _alike(layout)
        stages = stage_times(self.model, alike, self.cluster, self.calibration, parts)
        if self.routing is not None and layout.ep > 1:
            per_node = self.cluster.gpus_per_node
            more = expected_slowdown(self.routing, self.model, layout, gpus_per_node=per_node)
            stages = slowed(stages, *more)
        costs = step_costs(self.model, self.cluster, layout, self.calibration, schedule, stages)
        _, ends = run(schedule, _times(costs, stages))
        last = _finished(schedule.placement, costs, row_ends(schedule, ends))
        return last + self.calibration.step_ms

    def _layer(self, layout: Layout, kind: Kind) -> LayerTimes:
        return layer_times(self.model, _alike(layout), self.cluster, self.calibration, kind)

    def _layer_costs(self, layout: Layout) -> LayerCosts:
        """What each layer adds to a pair of two chunks with it."""
        moe = self._layer(layout, "moe" if "moe" in self._whole else "dense")

        def adds(*kinds: Kind) -> float:
            stage = (moe, *(self._layer(layout, kind) for kind in kinds))
            return self._pair_ms(stage, layout) - self._pair_ms((moe,), layout)

        taken = {kind: adds(kind) for kind in dict.fromkeys(self._whole)}
        layers = tuple(taken[kind] for kind in self._whole if kind in ("dense", "moe"))
        tail = self._whole[self._whole.index("head") :]
        return LayerCosts(layers, taken["embedding"], adds(*tail))

    def _pair_ms(self, stage: tuple[LayerTimes, ...], layout: Layout) -> float:
        pair = Pair(Action(0, Op.F, 0), Action(0, Op.B, 1))
        return duration(phases_of((stage,), pair, overlap=layout.overlap))


def _least(times: LayerTimes, lane: str, *, overlap: bool) -> float:
    """The least that a rank is busy with one layer and micro-batch, by the phases of one lane."""
    total = 0.0
    for names in (FORWARD, (*BACKWARD, *WEIGHTS)):
        alone = sum(times.alone[name] for name in names)
        beside = sum(times.paired[name] for name in names if lane_of(name) == lane)
        total += min(alone, beside) if overlap else alone
    return total


def _alike(layout: Layout) -> Layout:
    """The layout that stands for all whose layers take as long: those with its expert group."""
    return replace(
        layout,
        pp=1,
        dp=layout.ep,
        schedule="",
        microbatches=1,
        stages_per_rank=None,
        layers=None,
        zero=0,
    )


def _schedule(layout: Layout) -> Schedule:
    schedule = schedule_of(*size_of(layout))
    assert not isinstance(schedule, str), schedule
    return schedule


def _times(costs: Costs, stages: Stages) -> Times:
    """The times of the steps; of pairs, once for all stages with the same layers."""
    kinds: dict[tuple[int, ...], int] = {}
    of = [kinds.setdefault(tuple(map(id, stage)), index) for index, stage in enumerate(stages)]
    pair = costs.pair
    assert callable(pair)
    made = {
        (forward, backward): pair(forward, backward)
        for forward in kinds.values()
        for backward in kinds.values()
    }
    rows = {f: tuple(made[f, b] for b in of) for f in kinds.values()}

    def listed(value: ByStage) -> tuple[float, ...]:
        return by_stage("cost", value, len(stages))

    assert costs.B is not None
    return Times(
        F=listed(costs.F),
        I=listed(costs.I),
        W=listed(costs.W),
        B=listed(costs.B),
        pair=tuple(rows[f] for f in of),
        send=costs.send + max(listed(costs.message)) / costs.bandwidth,
    )


def _finished(placement: Placement, costs: Costs, ends: Sequence[float]) -> float:
    """When the last rank has reduced its gradients and updated its parameters, as `simulate`."""
    count = placement.num_stages
    reduce, mirror, update = (
        by_stage("cost", cost, count) for cost in (costs.reduce, costs.mirror, costs.optimizer)
    )
    held = [placement.stages(rank) for rank in range(placement.num_ranks)]
    free = [end + sum(reduce[s] for s in held[rank]) for rank, end in enumerate(ends)]
    for stage in range(count):
        holders = placement.replicas(stage)
        if len(holders) > 1 and mirror[stage]:
            met = max(free[rank] for rank in holders) + mirror[stage]
            for rank in holders:
                free[rank] = met
    return max(free) + max(sum(update[s] for s in stages) for stages in held)
