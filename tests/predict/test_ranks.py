"""All ranks one by one: against the simulation of one pipeline, and against a slow walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from counterflow.comm.dispatch.layout import ExpertLayout
from counterflow.comm.traffic_synthetic import Choice
from counterflow.parallel.schedule import (
    Action,
    Op,
    Pair,
    Schedule,
    Step,
    actions,
    build,
    forward_only,
)
from counterflow.parallel.schedule.interleaving import PUBLISHED_ORDER
from counterflow.parallel.simulate import Costs, simulate
from counterflow.parallel.simulate.phases import (
    BACKWARD,
    COMMUNICATION,
    COMPUTE,
    FORWARD,
    NAMES,
    WEIGHTS,
    compose,
    duration,
    lane_of,
)
from counterflow.predict.jitter import Jitter
from counterflow.predict.programs import has_experts
from counterflow.predict.ranks import KINDS, RanksResult, simulate_ranks
from counterflow.predict.routing import GroupRouting, Routing
from counterflow.predict.times import Kind, LayerTimes

OTHER_ORDER = (
    "attn(F)",
    "combine(B)",
    "dispatch(F)",
    "mlp(B)",
    "mlp(W)",
    "mlp(F)",
    "combine(F)",
    "dispatch(B)",
    "attn(B)",
    "attn(W)",
)
NAMES_OF = {
    Op.F: FORWARD,
    Op.I: BACKWARD,
    Op.W: tuple(WEIGHTS),
    Op.B: tuple(name for name in PUBLISHED_ORDER if name not in FORWARD),
}
# Per phase the one of its layer that it needs.
NEEDS = {b: a for chain in (FORWARD, BACKWARD) for a, b in pairwise(chain)} | WEIGHTS
WITHOUT = {name: 0.0 for name in NAMES if lane_of(name) != COMPUTE}


def layer(kind: Kind, rng: np.random.Generator, routed: float = 0.0) -> LayerTimes:
    """Times in eighths, whose sums are exact."""
    alone, paired = (
        {name: float(rng.integers(1, 40)) / 8 for name in NAMES}
        | ({} if kind in ("moe", "mtp") else WITHOUT)
        for _ in range(2)
    )
    if kind == "head":
        alone |= {name: 0.0 for name in NAMES if name.startswith("attn")}
    return LayerTimes(kind, alone, paired, routed)


def uneven_stages(num_stages: int, seed: int = 0, routed: float = 0.0) -> list[list[LayerTimes]]:
    """A dense layer first, then one to three with experts, a head and one more at the end."""
    rng = np.random.default_rng(seed)
    stages = [
        [layer("moe", rng, routed) for _ in range(rng.integers(1, 4))] for _ in range(num_stages)
    ]
    stages[0].insert(0, layer("dense", rng))
    stages[-1] += [layer("head", rng), layer("mtp", rng, routed)]
    return stages


def one_lane(order: Sequence[str], layers: Sequence[LayerTimes]) -> float:
    return sum(each.alone[name] for each in layers for name in order)


def composed_costs(
    stages: Sequence[Sequence[LayerTimes]], order: Sequence[str], overlap: bool, **more: Any
) -> Costs:
    """What the same layers cost one pipeline."""

    def pair(f: int, b: int) -> float:
        if not overlap:
            return one_lane(FORWARD, stages[f]) + one_lane((*BACKWARD, *WEIGHTS), stages[b])
        backward = [each.paired for each in stages[b][::-1]]
        # What the forward has more has nothing beside it.
        forward = [
            each.paired if place < len(backward) else each.alone
            for place, each in enumerate(stages[f])
        ]
        return duration(compose(order, forward, backward))

    def whole(s: int) -> float:
        if not overlap:
            return one_lane((*BACKWARD, *WEIGHTS), stages[s])
        return duration(compose(order, [], [each.paired for each in stages[s][::-1]]))

    return Costs(
        F=lambda s: one_lane(FORWARD, stages[s]),
        I=lambda s: one_lane(BACKWARD, stages[s]),
        W=lambda s: one_lane(tuple(WEIGHTS), stages[s]),
        B=whole,
        pair=pair,
        **more,
    )


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("order", [PUBLISHED_ORDER, OTHER_ORDER])
@pytest.mark.parametrize(
    ("name", "pp", "microbatches"),
    [
        ("dualpipe", 2, 6),
        ("dualpipe", 8, 20),
        ("dualpipev", 4, 9),
        ("1f1b", 1, 3),
        ("1f1b", 5, 7),
        ("interleaved", 4, 8),
        ("zb-h1", 3, 8),
        ("zbv", 4, 8),
        ("gpipe", 3, 4),
    ],
)
def test_without_chance_all_ranks_do_what_one_pipeline_does(
    name: str, pp: int, microbatches: int, order: Sequence[str], overlap: bool
) -> None:
    schedule = build(name, ranks=pp, microbatches=microbatches)
    stages = uneven_stages(schedule.num_stages, seed=pp)
    sizes = [1.0 + s % 3 for s in range(schedule.num_stages)]
    one = simulate(
        schedule, composed_costs(stages, order, overlap, message=sizes, bandwidth=4.0, send=0.5)
    )
    result = simulate_ranks(
        schedule,
        stages,
        dp=6,
        ep=3,
        order=order,
        overlap=overlap,
        send_ms=0.5,
        message_ms=[size / 4 for size in sizes],
        keep_dp=4,
    )
    assert result.makespan == one.makespan
    assert result.spans == one.spans
    assert (result.ends == np.array(one.done)[:, None]).all()
    assert (result.idle == np.array(one.idle)[:, None]).all()
    assert (result.waiting == 0).all()
    for kind in KINDS:
        of_kind = [
            sum(s.end - s.start for s in row if kind == kind_of(s.step)) for row in one.spans
        ]
        assert result.means(kind) == tuple(of_kind)


def kind_of(step: Step) -> str:
    return "pair" if isinstance(step, Pair) else step.op.value


def test_what_steps_take_besides_their_phases_is_added_to_each() -> None:
    schedule = build("zb-h1", ranks=3, microbatches=6)
    stages = uneven_stages(3)
    one = composed_costs(stages, PUBLISHED_ORDER, overlap=True).times(3)
    forward, inputs, weights = ([t + 0.25 for t in times] for times in (one.F, one.I, one.W))
    expected = simulate(schedule, Costs(F=forward, I=inputs, W=weights))
    assert simulate_ranks(schedule, stages, dp=1, overhead_ms=0.25).spans == expected.spans


@dataclass(frozen=True)
class Walk:
    """The same step by step, rank by rank and phase by phase, in plain loops.

    Attributes:
        factors: on the times of computation, by rank (p, d).
    """

    schedule: Schedule
    stages: Sequence[Sequence[LayerTimes]]
    groups: int
    ep: int
    factors: Mapping[tuple[int, int], float]
    routing: GroupRouting
    send: float
    seed: int

    def ends(self) -> dict[tuple[Step, int], float]:
        """When each data-parallel rank ends each step."""
        schedule = self.schedule
        ends: dict[tuple[Step, int], float] = {}
        made: dict[Action, Step] = {}
        last: dict[int, Step] = {}
        for number in schedule.graph.order:
            p, place = schedule.graph.position(number)
            step = schedule.rows[p][place]
            start = [ends[last[p], d] if p in last else 0.0 for d in range(self.groups * self.ep)]
            for need in (need for action in actions(step) for need in schedule.needs[action]):
                away = schedule.placement.rank(need.stage, need.microbatch) != p
                for d in range(len(start)):
                    start[d] = max(start[d], ends[made[need], d] + self.send * away)
            for g in range(self.groups):
                ranks = range(g * self.ep, (g + 1) * self.ep)
                for d, end in self._group_ends(step, p, g, {d: start[d] for d in ranks}).items():
                    ends[step, d] = end
            made |= dict.fromkeys(actions(step), step)
            last[p] = step
        return ends

    def _group_ends(self, step: Step, p: int, g: int, start: dict[int, float]) -> dict[int, float]:
        """When the ranks of an expert group end a step that they start then."""
        lanes = {(lane, d): start[d] for lane in (COMPUTE, COMMUNICATION) for d in start}
        data = {(way, d): start[d] for way in "FB" for d in start}
        chunks = {"F" if a.op is Op.F else "B": self._chunk(a) for a in actions(step)}
        names = PUBLISHED_ORDER if isinstance(step, Pair) else NAMES_OF[step.op]
        paired = isinstance(step, Pair) or step.op is Op.B
        for place in range(max(map(len, chunks.values()))):
            done: dict[tuple[str, int], float] = {}
            for name in names:
                way, lane = "F" if name in FORWARD else "B", lane_of(name)
                if place >= len(chunks[way]):
                    continue
                layer, rows, busiest = chunks[way][place]
                beside = paired and (way == "B" or place < len(chunks["B"]))
                ms = (layer.paired if beside else layer.alone)[name]
                begin = {
                    d: max(lanes[lane, d], done.get((NEEDS.get(name, ""), d), data[way, d]))
                    for d in start
                }
                if lane == COMMUNICATION and ms:
                    begin = dict.fromkeys(start, max(begin.values()))
                    ms *= busiest[g]
                for d, own in begin.items():
                    taken = ms * (self.factors[p, d] if lane == COMPUTE else 1.0)
                    if name.startswith("mlp"):
                        taken *= 1 - layer.routed + layer.routed * rows[g][d - g * self.ep]
                    lanes[lane, d] = done[name, d] = own + taken
            for way, d in data:
                end = FORWARD[-1] if way == "F" else BACKWARD[-1]
                data[way, d] = done.get((end, d), data[way, d])
        return {d: max(lanes[COMPUTE, d], lanes[COMMUNICATION, d]) for d in start}

    def _chunk(self, action: Action) -> Sequence[tuple[Any, ...]]:
        """Layers in the order in which the action meets them, each with its loads."""
        held = [[each for each in stage if has_experts(each)] for stage in self.stages]
        first = sum(map(len, held[: action.stage]))
        layers = range(first, first + len(held[action.stage]))
        drawn = self.routing.draw(layers, action.microbatch, self.groups, self.seed)
        loads = iter(zip(drawn.rows, drawn.busiest, strict=True))
        even = (np.ones((self.groups, self.ep)), np.ones(self.groups))
        found = [
            (each, *(next(loads) if has_experts(each) else even))
            for each in self.stages[action.stage]
        ]
        return found if action.op is Op.F else found[::-1]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["dualpipe", "zb-h1", "1f1b"])
def test_ranks_that_differ_are_those_of_a_slow_walk(name: str, seed: int) -> None:
    groups, ep = 2, 4
    schedule = build(name, ranks=4, microbatches=8)
    stages = uneven_stages(4, seed, routed=0.75)
    experts = ExpertLayout.contiguous(32, ep)
    skewed = Routing("skewed", 0.4, persistent=False)
    routing = GroupRouting(skewed, Choice(32, 4, 4, 2), experts, 64, 2, "two_hop")
    rng = np.random.default_rng(seed)
    factors = {(p, d): float(rng.uniform(0.8, 1.5)) for p in range(4) for d in range(8)}
    slow = Walk(schedule, stages, groups, ep, factors, routing, 0.5, seed).ends()
    for keep in (0, 7):
        result = simulate_ranks(
            schedule,
            stages,
            dp=groups * ep,
            ep=ep,
            routing=routing,
            jitter=Jitter(stragglers=tuple((p * 8 + d, f) for (p, d), f in factors.items())),
            send_ms=0.5,
            seed=seed,
            keep_dp=keep,
        )
        spans = [span for row in result.spans for span in row]
        assert [span.end for span in spans] == pytest.approx([slow[s.step, keep] for s in spans])
        ends = [[slow[row[-1], d] for d in range(8)] for row in schedule.rows]
        assert result.ends == pytest.approx(np.array(ends))


def alike(num_stages: int, routed: float = 0.0) -> list[list[LayerTimes]]:
    times = dict.fromkeys(NAMES, 1.0)
    return [[LayerTimes("moe", times, times, routed)] for _ in range(num_stages)]


def test_an_exchange_waits_for_the_last_of_its_group_alone() -> None:
    schedule = forward_only(build("1f1b", ranks=1, microbatches=1))
    result = simulate_ranks(schedule, alike(1), dp=4, ep=2, jitter=Jitter(stragglers=((1, 3.0),)))
    # attn 1 or 3, dispatch from 3 to 4, mlp 1 or 3, combine from 7 to 8.
    assert result.ends.tolist() == [[8, 8, 4, 4]]
    assert result.waiting.tolist() == [[4, 0, 0, 0]]
    assert result.computing.tolist() == [[2, 6, 2, 2]]
    assert result.idle.tolist() == [[0, 0, 4, 4]]
    assert result.slowest == (0, 1)


def v3_like(**more: Any) -> RanksResult:
    schedule = build("dualpipe", ranks=4, microbatches=16)
    return simulate_ranks(schedule, alike(4, routed=0.8), dp=16, ep=8, **more)


def uneven(routing: Routing) -> GroupRouting:
    return GroupRouting(
        routing, Choice(64, 6, 8, 3), ExpertLayout.contiguous(64, 8), 512, 8, "flat"
    )


def test_the_more_uneven_the_longer_while_the_mean_work_stays() -> None:
    results = [v3_like()] + [
        v3_like(routing=uneven(routing))
        for routing in (Routing(), Routing("skewed", 0.2), Routing("skewed", 0.5))
    ]
    makespans = [result.makespan for result in results]
    assert makespans == sorted(set(makespans))
    for result in results:
        assert result.computing.mean() == pytest.approx(results[0].computing.mean(), rel=1e-2)
    assert results[0].waiting.max() == 0 < results[1].waiting.min()


def test_balanced_routing_is_none_at_all() -> None:
    assert v3_like(routing=uneven(Routing("balanced"))).makespan == v3_like().makespan


def test_jitter_of_single_phases_costs_more_the_more_ranks_wait_for_each_other() -> None:
    schedule = build("1f1b", ranks=2, microbatches=24)
    jitter = Jitter(computation=0.1)
    costs = [
        simulate_ranks(schedule, alike(2), dp=32, ep=ep, jitter=jitter).ends.mean()
        for ep in (1, 4, 32)
    ]
    assert costs == sorted(costs)
    alone = simulate_ranks(schedule, alike(2), dp=32, jitter=jitter)
    assert alone.waiting.max() == 0
    # The factors' mean is 1, which 2 x 32 x 24 x 6 of them with a deviation of 0.3 have to 0.3 %.
    wide = simulate_ranks(schedule, alike(2), dp=32, jitter=Jitter(computation=0.3))
    assert wide.computing.mean() == pytest.approx(24 * 6, rel=0.015)


@pytest.mark.parametrize(
    "jitter", [Jitter(computation=0.1), Jitter(exchange=0.1), Jitter(speed=0.1)]
)
def test_a_seed_decides_all_that_is_drawn(jitter: Jitter) -> None:
    routing = uneven(Routing("skewed", 0.2))
    one, same, other = (v3_like(routing=routing, jitter=jitter, seed=s) for s in (1, 1, 2))
    assert (one.ends == same.ends).all()
    assert (one.ends != other.ends).all()
    assert (one.ends != v3_like(routing=routing, seed=1).ends).all()


def test_persistent_speeds_are_those_of_a_rank_throughout() -> None:
    result = v3_like(jitter=Jitter(speed=0.1, stragglers=((37, 2.0),)))
    assert result.slowest == (2, 5)
    speeds = result.computing / v3_like().computing
    assert np.log(np.delete(speeds, 37)).std() == pytest.approx(0.1, rel=0.3)  # of 63 ranks


def test_what_cannot_be_is_refused() -> None:
    schedule = build("1f1b", ranks=2, microbatches=4)
    stages = alike(2)
    lacking = LayerTimes("dense", {}, {})
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"dp": 6, "ep": 4}, "ep=4 must divide dp=6"),
        ({"dp": 0}, "must divide"),
        ({"dp": 2, "keep_dp": 2}, r"keep_dp=2 must be one of the data-parallel ranks 0\.\.1"),
        ({"dp": 4, "ep": 4, "routing": uneven(Routing())}, "groups of 8 ranks, but ep=4"),
        ({"dp": 1, "stages": alike(3)}, "times of 3 stages, but schedule '1f1b' has 2"),
        ({"dp": 1, "stages": [[lacking], [lacking]]}, r"without a time of attn\(F\) alone"),
        ({"dp": 1, "order": PUBLISHED_ORDER[1:]}, "order must have each"),
        ({"dp": 1, "send_ms": -1.0}, "send_ms=-1.0"),
        ({"dp": 1, "overhead_ms": float("nan")}, "overhead_ms=nan"),
        ({"dp": 1, "message_ms": [1.0] * 3}, "message_ms is a list of 3"),
        ({"dp": 2, "jitter": Jitter(stragglers=((4, 2.0),))}, r"no rank 4 of 4, 0\.\.3"),
    ]
    for arguments, message in wrong:
        given: dict[str, Any] = {"stages": stages} | arguments
        with pytest.raises(ValueError, match=message):
            simulate_ranks(schedule, **given)
    for refused, message in (
        (lambda: Jitter(computation=-1), "computation=-1 must be a deviation"),
        (lambda: Jitter(stragglers=((0, 0.0),)), "rank 0 is slower by the factor 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
