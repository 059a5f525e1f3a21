"""The search finds what a look at every layout finds, and says what became of the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.model import ModelConfig
from counterflow.predict.calibration import Calibration
from counterflow.predict.cluster import Cluster, load_cluster
from counterflow.predict.estimate import Estimator
from counterflow.predict.feasible import Reason
from counterflow.predict.layout import Layout
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
    steps=st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(0, 9), max_size=4)), max_size=12
    ),
    keep=st.integers(1, 5),
)
def test_pruning_loses_none_of_the_best(steps: list[tuple[int, list[int]]], keep: int) -> None:
    """Groups of layouts with steps above a bound; a zero stands for a layout that cannot be."""
    times: dict[Layout, float | Reason] = {}
    groups: list[Bounded] = []
    for index, (bound, more) in enumerate(steps):
        layouts = [Layout(pp=index + 1, dp=n + 1) for n in range(len(more))]
        for layout, above in zip(layouts, more, strict=True):
            refused = Reason("memory", "too much", "take less")
            times[layout] = bound + above - 1 if above else refused
        groups.append(Bounded(bound, lambda layouts=layouts: layouts, len(layouts)))
    pruned, whole = (rank(groups, times.__getitem__, keep=keep, prune=p) for p in (True, False))
    assert pruned.best == whole.best
    assert whole.num_pruned == 0
    seen = pruned.num_evaluated + pruned.num_pruned + pruned.infeasible.total()
    assert seen == len(times) == whole.num_evaluated + whole.infeasible.total()
    feasible = sorted(time for time in times.values() if not isinstance(time, Reason))
    assert [one.step_ms for one in whole.best] == feasible[:keep]


def test_the_bound_is_below_every_step() -> None:
    found = candidates(MODEL, h800(), SPACE, **RUN)
    estimator = Estimator(MODEL, h800(), DATASHEET, found.layouts[0])
    checked = 0
    for layout in found.layouts[::3]:
        bound = estimator.bound_ms(layout)
        for variant in SPACE.variants(layout):
            if estimator.why_not(variant) is None:
                assert bound <= estimator.step_ms(estimator.cut(variant))
                checked += 1
    assert checked > 20


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipe", "zbv", "interleaved"])
def test_estimated_steps_are_those_of_the_whole_simulation(schedule: str) -> None:
    layout = replace(typical(), schedule=schedule)
    estimator = Estimator(MODEL, h800(), DATASHEET, layout)
    layout = estimator.cut(layout)
    whole = quick_step(MODEL, h800(), layout, DATASHEET).step_ms
    # Messages queue there, and do not here.
    assert estimator.step_ms(layout) == pytest.approx(whole, rel=0.01)


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


def test_progress_ends_with_all_or_with_the_pruned_left() -> None:
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
    assert told[-1][0] == told[-1][1] - result.num_pruned


@pytest.mark.parametrize("name", ["gpus", "batch_sequences", "length", "keep"])
def test_sizes_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be 1 or more"):
        search(MODEL, h800(), DATASHEET, **{**RUN, name: 0})


def test_a_space_without_a_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="without any choice of zero"):
        Space(zero=())
