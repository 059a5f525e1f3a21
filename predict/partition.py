"""How many layers each stage gets, where layers, embedding and head take unequal times.

Stages are contiguous, and a rank may hold several of them: in bidirectional DualPipe rank i has
the stages i and P - 1 - i of P, in DualPipeV i and 2P - 1 - i. What has to be even is therefore the
time of the ranks, not of the stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from ..parallel.schedule import Placement

Cut = tuple[int, ...]  # decoder layers of each stage

# A cut counts as near the best if its busiest rank is busier by at most this; what a step takes
# differs by less than that between cuts whose ranks are equally busy.
_NEAR = 0.03
_ROUNDING = 1e-9  # by which equal loads differ, summed in another order

# How many short stages a local search begins with, at most: as many as there are layers that take
# less than others, the dense ones of DeepSeek-V3.
_SHORT = 4


class LayerCosts(NamedTuple):
    """What a micro-batch takes, forward and backward, in any one unit.

    Attributes:
        layers: of each decoder layer.
        embedding: beside the first layer.
        head: beside the last one: norm, head, loss and multi-token prediction.
    """

    layers: tuple[float, ...]
    embedding: float
    head: float

    def stages(self, cut: Sequence[int]) -> list[float]:
        """Of each stage."""
        upto = [0.0, *accumulate(self.layers)]
        ends = list(accumulate(cut))
        costs = [upto[end] - upto[end - size] for end, size in zip(ends, cut, strict=True)]
        costs[0] += self.embedding
        costs[-1] += self.head
        return costs


class Load(NamedTuple):
    """How even a cut is; the smaller, the better.

    Attributes:
        busiest: the time of the busiest rank.
        squares: sum of the squares of all ranks' times, which tells cuts with the same busiest
            rank apart.
    """

    busiest: float
    squares: float


def rank_loads(costs: LayerCosts, cut: Sequence[int], placement: Placement) -> list[float]:
    """The time of each rank for all micro-batches of a step."""
    stages = costs.stages(cut)
    loads = [0.0] * placement.num_ranks
    for index, route in enumerate(placement.routes):
        count = placement.route_of.count(index)
        for stage, rank in enumerate(route):
            loads[rank] += count * stages[stage]
    return loads


def even_cut(costs: LayerCosts, placement: Placement) -> Cut:
    """The cut whose busiest rank is least busy.

    From a cut with equal numbers of layers, layers are taken from the busiest rank's stages and
    given to any other stage (those between move by one), as long as that helps; else one may cross
    any boundary. That is a local search from several cuts: layers of a few kinds, one after the
    other, leave it nowhere to get stuck, which is tested against all cuts.

    Args:
        costs: of the model's parts.
        placement: which rank holds which stage, with at most as many stages as layers.
    """
    ranks = _Ranks(costs, placement)
    found = [ranks.descend(start) for start in ranks.starts()]
    least = min(ranks.load(cut).busiest for cut in found) * (1 + _ROUNDING)
    # Of those, stages that are alike fill and drain the pipeline soonest.
    return min(
        (cut for cut in found if ranks.load(cut).busiest <= least),
        key=lambda cut: sum(cost * cost for cost in costs.stages(cut)),
    )


def best_cut(
    costs: LayerCosts,
    placement: Placement,
    makespans: Callable[[Sequence[Cut]], Sequence[float]],
    starts: Sequence[Cut],
) -> Cut:
    """The cut that makes a step fast: near the fastest of some, what takes least in simulation.

    Single layers are moved over single boundaries as long as that makes the step faster, among the
    cuts whose busiest rank is not much busier than those of the first ones. (That alone does not
    tell: a pair takes as long as the longer of two unlike stages.)

    Args:
        costs: of the model's parts.
        placement: which rank holds which stage.
        makespans: of steps by each of several cuts.
        starts: cuts to begin with, such as `even_cut`.
    """
    ranks = _Ranks(costs, placement)
    limit = max(ranks.load(cut).busiest for cut in starts) * (1 + _NEAR)
    known = dict(zip(starts, makespans(starts), strict=True))
    cut = min(known, key=known.__getitem__)
    while True:
        near = [
            other
            for other in _over_boundaries(cut)
            if other not in known and ranks.load(other).busiest <= limit
        ]
        if near:
            known.update(zip(near, makespans(near), strict=True))
        best = min(known, key=known.__getitem__)
        if known[best] >= known[cut]:
            return cut
        cut = best


class _Ranks:
    """Loads of cuts on one placement, kept."""

    def __init__(self, costs: LayerCosts, placement: Placement) -> None:
        self.costs, self.placement = costs, placement
        self._upto = (0.0, *accumulate(costs.layers))
        routes = placement.routes
        counts = [placement.route_of.count(index) for index in range(len(routes))]
        # Per stage, its ranks and how many micro-batches each runs there.
        self._on = [
            [(route[stage], count) for route, count in zip(routes, counts, strict=True)]
            for stage in range(placement.num_stages)
        ]

    def starts(self) -> Iterator[Cut]:
        """Cuts to begin with: some stages of one layer, at either end, and the others alike."""
        num_layers, num_stages = len(self.costs.layers), self.placement.num_stages
        for short in range(min(num_stages, _SHORT)):
            each, more = divmod(num_layers - short, num_stages - short)
            rest = (each + 1,) * more + (each,) * (num_stages - short - more)
            for cut in ((1,) * short + rest, (1,) * short + rest[::-1]):
                yield cut
                yield cut[::-1]

    def load(self, cut: Cut) -> Load:
        loads = self.loads(cut)
        return Load(max(loads), sum(load * load for load in loads))

    def loads(self, cut: Cut) -> list[float]:
        upto, start, last = self._upto, 0, len(cut) - 1
        loads = [0.0] * self.placement.num_ranks
        for stage, size in enumerate(cut):
            cost = upto[start + size] - upto[start]
            start += size
            if stage == 0:
                cost += self.costs.embedding
            if stage == last:
                cost += self.costs.head
            for rank, count in self._on[stage]:
                loads[rank] += count * cost
        return loads

    def descend(self, cut: Cut) -> Cut:
        """The cut that is reached by moving one layer at a time."""
        load = self.load(cut)
        while True:
            loads = self.loads(cut)
            busiest = max(range(len(loads)), key=loads.__getitem__)
            held = self.placement.stages(busiest)
            for others in (_moves(cut, held), _over_boundaries(cut)):
                best = min(others, key=self.load, default=cut)
                if self.load(best) < load:
                    break
            else:
                return cut
            cut, load = best, self.load(best)


def _moves(cut: Cut, givers: Sequence[int]) -> Iterator[Cut]:
    """The cuts in which one of these stages has a layer less and another stage one more."""
    for giver in givers:
        if cut[giver] > 1:
            for taker in range(len(cut)):
                if taker != giver:
                    yield _moved(cut, giver, taker)


def _over_boundaries(cut: Cut) -> Iterator[Cut]:
    """The cuts in which one layer is on the other side of a boundary."""
    for stage in range(len(cut) - 1):
        for giver, taker in ((stage, stage + 1), (stage + 1, stage)):
            if cut[giver] > 1:
                yield _moved(cut, giver, taker)


def _moved(cut: Cut, giver: int, taker: int) -> Cut:
    moved = list(cut)
    moved[giver] -= 1
    moved[taker] += 1
    return tuple(moved)
