"""How long a step of each of many layouts takes: what layouts share is worked out once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, pairwise
from math import inf

import numpy as np
from numpy.typing import NDArray

from ..model import ModelConfig
from ..model.stages import Part
from ..parallel.schedule import Action, Op, Pair, Schedule
from ..parallel.simulate import Costs
from ..parallel.simulate.amounts import by_stage
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
from .clock_batch import BatchClock
from .cluster import Cluster
from .costs import Stages, kinds_of, phases_of, slowed, stage_times, step_costs, update_ms
from .costs_batch import Chunk, ChunkTimes, table_of
from .exchange import reduce_ms
from .feasible import Reason, schedule_of, size_of, why_no_memory, why_no_schedule, why_no_states
from .layout import Layout
from .partition import Cut, LayerCosts, best_cut, even_cut
from .routing import Routing, expected_slowdown
from .times import Kind, LayerTimes, layer_times

Floats = NDArray[np.float64]


class Estimator:
    """Step times of layouts of one model on one machine.

    Layouts that share a schedule are simulated together (`clock_batch`), without a queue at the
    sending lanes: a message takes its time and the latency, whatever else its rank sends.
    `step.quick_step` simulates one layout, with the queue.

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
        self._chunks = _Chunks(model)
        # Families of layouts come one after the other: what they share is kept, old ones are not.
        self._table = lru_cache(maxsize=2048)(self._make_table)
        self._besides = lru_cache(maxsize=512)(self._make_besides)
        self._no_memory = lru_cache(maxsize=4096)(self._why_no_memory)

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

    def why_no_states(self, layout: Layout) -> Reason | None:
        """Whether a layout lacks memory whatever its schedule."""
        return why_no_states(self.model, self.cluster, layout)

    def why_not(self, layout: Layout) -> Reason | None:
        """What stands against a layout that can be placed: its schedule, or memory by its cut."""
        return why_no_schedule(self.model, layout) or self.why_no_memory(self.cut(layout))

    def why_no_memory(self, layout: Layout) -> Reason | None:
        """Whether a layout, with its cut, lacks memory."""
        # How rows get to experts and which SMs move them takes none of it.
        return self._no_memory(replace(layout, comm_sms=None, dispatcher="flat"))

    def _why_no_memory(self, layout: Layout) -> Reason | None:
        return why_no_memory(self.model, self.cluster, layout)

    def cut(self, layout: Layout) -> Layout:
        """The layout with an even cut or the trainer's, unless it has one; its schedule exists.

        Which of the two, the first layout of a number of ranks, kind of placement and use of FP8
        decides by its step.
        """
        if layout.layers is not None:
            return layout
        placement = _schedule(layout).placement
        key = (placement.routes, layout.pp, layout.fp8)
        if key not in self._cuts:
            costs = self._layer_costs(replace(self._typical, pp=layout.pp, fp8=layout.fp8))
            cuts = (even_cut(costs, placement), self._usual(layout))
            steps = self.steps_ms([replace(layout, layers=cut) for cut in cuts])
            self._cuts[key] = cuts[steps.index(min(steps))]
        return replace(layout, layers=self._cuts[key])

    def refined(self, layout: Layout) -> Layout:
        """The layout with the cut that makes such a step fastest, as far as memory allows.

        The cut is searched once for all layouts with the same schedule and use of FP8.
        """
        key = (*size_of(layout), layout.fp8)
        if key not in self._refined:
            placement = _schedule(layout).placement
            costs = self._layer_costs(layout)
            starts = (even_cut(costs, placement), self._usual(layout))
            self._refined[key] = best_cut(
                costs, placement, lambda cuts: self._fits(layout, cuts), starts
            )
        own, best = layout.layers or self.cut(layout).layers, self._refined[key]
        assert own is not None
        before, after = self._fits(layout, (own, best))
        return replace(layout, layers=best if after < before else own)

    def _usual(self, layout: Layout) -> Cut:
        """The trainer's cut."""
        num_stages = _schedule(layout).num_stages
        parts = replace(layout, layers=None).parts(self.model, num_stages)
        return tuple(len(part.layers) for part in parts)

    def _fits(self, layout: Layout, cuts: Sequence[Cut]) -> list[float]:
        """A step by each of these cuts; infinite where memory is lacking."""
        made = [replace(layout, layers=cut) for cut in cuts]
        can = [one for one in made if self.why_no_memory(one) is None]
        steps = dict(zip(can, self.steps_ms(can), strict=True)) if can else {}
        return [steps.get(one, inf) for one in made]

    def step_ms(self, layout: Layout) -> float:
        """A step of a feasible layout."""
        return self.steps_ms([layout])[0]

    def steps_ms(self, layouts: Sequence[Layout]) -> list[float]:
        """Steps of feasible layouts, one or more, which share a schedule and `overlap`."""
        layouts = [self.cut(layout) for layout in layouts]
        first = layouts[0]
        assert all(size_of(one) == size_of(first) for one in layouts)
        assert all(one.overlap == first.overlap for one in layouts)
        schedule, clock = _schedule(first), _clock(*size_of(first))
        times = ChunkTimes(
            np.array([self._table(_alike(layout)) for layout in layouts]),
            overlap=first.overlap,
            overhead_ms=self.calibration.overhead_ms,
        )
        groups: dict[Layout, list[int]] = {}
        for index, layout in enumerate(layouts):
            groups.setdefault(_besides(layout), []).append(index)
        durations = self._durations(clock, times, layouts)
        besides = {key: self._besides(key, size_of(first)) for key in groups}
        send = np.empty(len(layouts))
        for key, members in groups.items():
            costs = besides[key]
            longest = max(by_stage("message", costs.message, schedule.num_stages))
            send[members] = costs.send + longest / costs.bandwidth
        ends = clock.row_ends(durations, send)
        steps = np.empty(len(layouts))
        for key, members in groups.items():
            steps[members] = _finished(schedule, besides[key], ends[:, members])
        return (steps + self.calibration.step_ms).tolist()

    def _durations(self, clock: BatchClock, times: ChunkTimes, layouts: Sequence[Layout]) -> Floats:
        """Of each kind of the clock's steps, in each layout: [kinds, layouts]."""
        durations = np.empty((len(clock.kinds), len(layouts)))
        by_cut: dict[Cut, list[int]] = {}
        for index, layout in enumerate(layouts):
            assert layout.layers is not None
            by_cut.setdefault(layout.layers, []).append(index)
        for cut, members in by_cut.items():
            chunks = self._chunks.of(cut)
            for row, kind in zip(durations, clock.kinds, strict=True):
                row[members] = times.of(kind, chunks[kind.stage], chunks[kind.backward])[members]
        return durations

    def _make_table(self, layout: Layout) -> Floats:
        """Times of the layers of which chunks consist, of layouts `_alike`."""
        parts = self._chunks.parts
        stages = stage_times(self.model, layout, self.cluster, self.calibration, parts)
        if self.routing is not None and layout.ep > 1:
            per_node = self.cluster.gpus_per_node
            more = expected_slowdown(self.routing, self.model, layout, gpus_per_node=per_node)
            stages = tuple(_slowed(stage, *more) for stage in stages)
        return table_of([layer for stage in stages for layer in stage])

    def _make_besides(self, layout: Layout, size: tuple[str, int, int, int | None]) -> Costs:
        """What a step has besides its chunks: messages, reductions and the update."""
        schedule = schedule_of(*size)
        assert not isinstance(schedule, str), schedule
        # Costs are of stages with layers: any will do, as chunks are timed by themselves.
        stages: Stages = ((self._layer(layout, self._whole[1]),),) * schedule.num_stages
        return step_costs(self.model, self.cluster, layout, self.calibration, schedule, stages)

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


@lru_cache(maxsize=4)
def _clock(name: str, ranks: int, microbatches: int, stages_per_rank: int | None) -> BatchClock:
    schedule = schedule_of(name, ranks, microbatches, stages_per_rank)
    assert not isinstance(schedule, str), schedule
    return BatchClock(schedule)


def _besides(layout: Layout) -> Layout:
    """The layout that stands for all with one schedule whose reductions and messages are alike.

    How rows get to experts, and what is made again, changes neither.
    """
    return replace(
        layout,
        dispatcher="flat",
        payload="exact",
        comm_sms=None,
        recompute_norms=False,
        recompute_up_projections=False,
    )


def _slowed(stage: tuple[LayerTimes, ...], rows: float, num_bytes: float) -> tuple[LayerTimes, ...]:
    """As `slowed`; layers without experts are as they were."""
    (found,) = slowed((stage,), rows, num_bytes) if any(map(_routes, stage)) else (stage,)
    return found


def _routes(layer: LayerTimes) -> bool:
    return layer.kind in ("moe", "mtp")


class _Chunks:
    """The layers of which stages consist, each kind once.

    Attributes:
        parts: of the model, that have each of them once: the first layer with the embedding, others
            by their kind, and what follows the last one.
    """

    def __init__(self, model: ModelConfig) -> None:
        last = model.num_hidden_layers
        number: dict[bool, int] = {}  # by whether a layer has experts
        self.parts = [Part(range(1), embed=True, head=False)]
        self._layers = [0]
        for layer in range(1, last):
            moe = model.is_moe(layer)
            if moe not in number:
                number[moe] = len(self.parts)
                self.parts.append(Part(range(layer, layer + 1), embed=False, head=False))
            self._layers.append(number[moe])
        tail = Part(range(last, last), embed=False, head=True)
        after = len(self.parts)
        self._tail = tuple(range(after, after + len(kinds_of(tail, model))))
        self.parts.append(tail)

    def of(self, cut: Cut) -> list[Chunk]:
        """The chunk of each stage."""
        found = [tuple(self._layers[a:b]) for a, b in pairwise((0, *accumulate(cut)))]
        found[-1] += self._tail
        return found


def _finished(schedule: Schedule, costs: Costs, ends: Floats) -> Floats:
    """When the last rank has reduced its gradients and updated its parameters, as `simulate`.

    Args:
        schedule: of the step.
        costs: of what follows the rows.
        ends: [ranks, layouts], of the rows.

    Returns:
        [layouts].
    """
    placement, count = schedule.placement, schedule.num_stages
    reduce, mirror, update = (
        by_stage("cost", cost, count) for cost in (costs.reduce, costs.mirror, costs.optimizer)
    )
    held = [placement.stages(rank) for rank in range(placement.num_ranks)]
    free = ends + np.array([[sum(reduce[s] for s in stages)] for stages in held])
    for stage in range(count):
        holders = list(placement.replicas(stage))
        if len(holders) > 1 and mirror[stage]:
            free[holders] = free[holders].max(axis=0) + mirror[stage]
    return free.max(axis=0) + max(sum(update[s] for s in stages) for stages in held)
