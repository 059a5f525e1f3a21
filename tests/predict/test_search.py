"""The search finds what a look at every layout finds, and says what became of the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.model import ModelConfig
from counterflow.parallel.simulate import simulate
from counterflow.predict.calibration import Calibration
from counterflow.predict.cluster import Cluster, load_cluster
from counterflow.predict.costs import slowed, stage_times, step_costs
from counterflow.predict.estimate import Estimator
from counterflow.predict.feasible import Reason
from counterflow.predict.layout import Layout
from counterflow.predict.routing import Routing, expected_slowdown
from counterflow.predict.search import Bounded, rank, search
from counterflow.predict.space import Space, candidates
from counterflow.predict.step import quick_step

MODEL = replace(ModelConfig(), num_hidden_layers=12, n_routed_experts=64, n_group=4, topk_group=4)
DATASHEET = Calibration("datasheet", "h800")
SPACE = Space(
    pp=(2, 4),
    ep=(8, 16),
    schedules=("1f1b", "zbv", "dualpipe", "dualpipev", "interleaved"),
    stages_per_rank=(2,),
    sequences=(1,),
    fp8=(True, False),
    recompute=((True, True), (False, False)),
    exchanges=(("deep_ep", "fp8"),),
    comm_sms=(20, 12),
    zero=(1, 0),
)
RUN: dict[str, Any] = {"gpus": 64, "batch_sequences": 512, "length": 2048}


def h800() -> Cluster:
    return load_cluster("h800")


def typical(ep: int = 16) -> Layout:
    return Layout(pp=4, dp=16, ep=ep, microbatches=16, length=2048)


@settings(max_examples=80, deadline=None)
@given(
    families=st.lists(
        st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=8), max_size=6
    ),
    keep=st.integers(1, 5),
    together=st.integers(1, 4),
)
def test_pruning_loses_none_of_the_best(
    families: list[list[tuple[int, int]]], keep: int, together: int
) -> None:
    """Layouts with steps above a bound; a zero stands for a layout that cannot be."""
    steps: dict[Layout, float] = {}
    refused: dict[Layout, Reason] = {}
    groups: list[list[Bounded]] = []
    for index, members in enumerate(families):
        groups.append([])
        for place, (bound, above) in enumerate(members):
            layout = Layout(pp=index + 1, dp=place + 1)
            groups[-1].append(Bounded(bound, layout))
            if above:
                steps[layout] = bound + above - 1
            else:
                refused[layout] = Reason("memory", "too much", "take less")

    def timed(layouts: Sequence[Layout]) -> list[float]:
        assert len(layouts) <= together
        assert len({layout.pp for layout in layouts}) == 1, "of one family"
        return [steps[layout] for layout in layouts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("counterflow.predict.search._TOGETHER", together)
        pruned, whole = (
            rank(groups, refused.get, timed, keep=keep, prune=prune) for prune in (True, False)
        )
    assert pruned.best == whole.best
    assert whole.num_pruned == 0
    seen = pruned.num_evaluated + pruned.num_pruned + pruned.infeasible.total()
    total = len(steps) + len(refused)
    assert seen == total == whole.num_evaluated + whole.infeasible.total()
    assert [one.step_ms for one in whole.best] == sorted(steps.values())[:keep]


def test_layouts_that_take_as_long_by_any_exchange_count_once() -> None:
    ways = [
        replace(typical(), comm_sms=sms, payload=p) for sms in (20, 24) for p in ("fp8", "bf16")
    ]
    other = replace(typical(), zero=0)
    steps = dict(zip([*ways, other], [5.0, 5.0 + 1e-12, 5.0, 6.0, 5.0], strict=True))
    family = [Bounded(1.0, layout) for layout in steps]
    found = rank([family], lambda layout: None, lambda some: [steps[one] for one in some])
    assert [one.layout for one in found.best] == [ways[0], other, ways[3]]
    assert found.num_evaluated == 5


def test_the_bound_is_below_every_step() -> None:
    found = candidates(MODEL, h800(), SPACE, **RUN)
    estimator = Estimator(MODEL, h800(), DATASHEET, found.layouts[0])
    checked = 0
    for layout in found.layouts[::3]:
        bound = estimator.bound_ms(layout)
        for variant in SPACE.variants(layout):
            if estimator.why_not(variant) is None:
                assert bound <= estimator.step_ms(variant)
                checked += 1
    assert checked > 20


def test_steps_of_layouts_together_are_those_of_each_alone() -> None:
    """Whatever they share and do not: cuts, ZeRO, formats, exchange, uneven routing."""
    routing = Routing.with_max_vio(0.5, MODEL.n_routed_experts)
    estimator = Estimator(MODEL, h800(), DATASHEET, typical(), routing)
    changes: list[dict[str, Any]] = [
        {},
        {"layers": (1, 4, 4, 3)},
        {"zero": 0},
        {"fp8": False, "recompute_norms": False},
        {"comm_sms": 12},
        {"ep": 8, "payload": "bf16"},
    ]
    layouts = [replace(typical(), **change) for change in changes]
    together = estimator.steps_ms(layouts)
    alone = [
        Estimator(MODEL, h800(), DATASHEET, typical(), routing).step_ms(one) for one in layouts
    ]
    assert together == alone
    assert len(set(together)) == len(changes)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe", "zbv", "zb-h1", "interleaved"])
def test_estimated_steps_are_those_of_the_simulation_without_a_queue(
    schedule: str, overlap: bool
) -> None:
    routing = Routing.with_max_vio(0.5, MODEL.n_routed_experts)
    calibration = replace(DATASHEET, overhead_ms=0.1, step_ms=7.0)
    layout = replace(typical(), schedule=schedule, overlap=overlap)
    estimator = Estimator(MODEL, h800(), calibration, layout, routing)
    layout = estimator.cut(layout)
    made = layout.make_schedule()
    parts = layout.parts(MODEL, made.num_stages)
    stages = stage_times(MODEL, layout, h800(), calibration, parts)
    more = expected_slowdown(routing, MODEL, layout)
    taken = slowed(stages, more.rows, more.bytes)
    costs = step_costs(MODEL, h800(), layout, calibration, made, taken)
    message = costs.message
    assert isinstance(message, int | float)
    send = costs.send + message / costs.bandwidth
    still = replace(costs, send=send, message=0.0, bandwidth=math.inf)
    expected = simulate(made, still).makespan + 7.0
    assert estimator.step_ms(layout) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe", "zbv", "interleaved"])
def test_estimated_steps_are_those_of_the_whole_simulation(schedule: str) -> None:
    layout = replace(typical(), schedule=schedule)
    estimator = Estimator(MODEL, h800(), DATASHEET, layout)
    layout = estimator.cut(layout)
    whole = quick_step(MODEL, h800(), layout, DATASHEET).step_ms
    # Messages queue there, and do not here.
    assert estimator.step_ms(layout) == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("schedule", ["dualpipe", "1f1b", "dualpipev"])
def test_a_cut_is_no_worse_than_the_trainers(schedule: str) -> None:
    v3 = Layout(pp=16, dp=128, ep=64, microbatches=120, schedule=schedule)
    plenty = h800()
    plenty = replace(plenty, gpu=replace(plenty.gpu, memory_bytes=0))
    estimator = Estimator(ModelConfig(), plenty, DATASHEET, v3)
    num_stages = v3.make_schedule().num_stages
    usual = tuple(len(part.layers) for part in v3.parts(ModelConfig(), num_stages))
    even = estimator.cut(v3)
    best = estimator.refined(even)
    steps = estimator.steps_ms([best, even, replace(v3, layers=usual)])
    assert steps == sorted(steps)


def test_search_finds_what_a_look_at_every_layout_finds() -> None:
    pruned, whole = (
        search(MODEL, h800(), DATASHEET, space=SPACE, keep=3, prune=prune, **RUN)
        for prune in (True, False)
    )
    assert [one.layout for one in pruned.best] == [one.layout for one in whole.best]
    assert [one.step_ms for one in pruned.best] == sorted(one.step_ms for one in whole.best)
    assert len(whole.best) == 3
    assert whole.num_pruned == 0
    assert pruned.num_pruned > 0
    assert pruned.num_evaluated < whole.num_evaluated
    for result in (pruned, whole):
        told = result.num_evaluated + result.num_pruned + sum(result.infeasible.values())
        assert told == result.num_layouts
        assert set(result.infeasible) == set(result.reasons)
        for one in result.best:
            layout = one.layout
            assert layout.world_size == 64
            assert layout.sequences * layout.microbatches * layout.dp == 512
            assert layout.layers is not None
            assert sum(layout.layers) == 12
            assert 0 < one.memory_bytes <= h800().gpu.memory_bytes
            assert 0 < one.mfu < 1
            assert one.limit


def test_a_batch_that_leaves_no_whole_micro_batches_is_told() -> None:
    result = search(MODEL, h800(), DATASHEET, gpus=64, batch_sequences=3, length=64, space=SPACE)
    assert result.best == ()
    assert result.infeasible == {"batch": result.num_layouts}
    assert "0.09 micro-batches" in result.reasons["batch"].what


def test_progress_rises_to_all() -> None:
    told: list[tuple[int, int]] = []
    space = replace(SPACE, pp=(4,), ep=(16,), schedules=("1f1b", "zbv"))
    result = search(
        MODEL,
        h800(),
        DATASHEET,
        space=space,
        progress=lambda done, of: told.append((done, of)),
        **RUN,
    )
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0
    assert result.num_evaluated


@pytest.mark.parametrize("name", ["gpus", "batch_sequences", "length", "keep"])
def test_sizes_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be 1 or more"):
        search(MODEL, h800(), DATASHEET, **{**RUN, name: 0})


def test_a_space_without_a_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="without any choice of zero"):
        Space(zero=())
