"""A whole step: its parts add up, and it agrees with what can be computed otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest

from counterflow.model import ModelConfig
from counterflow.parallel.schedule import Action, Op, Pair
from counterflow.parallel.simulate import Costs, Phases, simulate
from counterflow.parallel.simulate.phases import NAMES, duration
from counterflow.predict.calibration import Calibration, Reference
from counterflow.predict.cluster import Cluster, load_cluster
from counterflow.predict.costs import kinds_of, phases_of, stage_times
from counterflow.predict.jitter import Jitter
from counterflow.predict.layout import Layout
from counterflow.predict.routing import Routing
from counterflow.predict.step import predict, quick_step
from counterflow.predict.times import expected_ms, layer_times
from counterflow.predict.waterfall import ideal_ms
from counterflow.predict.work import layer_work

H800 = load_cluster("h800")
# Only layers with experts, four a stage; embedding and head are small.
MODEL = ModelConfig(num_hidden_layers=16, first_k_dense_replace=0, num_nextn_predict_layers=0)
LAYOUT = Layout(pp=4, dp=16, ep=16, microbatches=12, layers=(4, 4, 4, 4))
PAIRED = {name: 1.0 + index / 8 for index, name in enumerate(NAMES)}
SMALL: dict[str, float] = {"mlp(F)": 1e-9, "mlp(B)": 1e-9, "mlp(W)": 1e-9}
TIMED = Calibration(
    "measured",
    "made up",
    (
        Reference("moe", MODEL, LAYOUT, PAIRED, PAIRED, "made up"),
        Reference("head", MODEL, LAYOUT, SMALL, SMALL, "made up"),
        Reference("embedding", MODEL, LAYOUT, SMALL, SMALL, "made up"),
    ),
)
DATASHEET = Calibration("datasheet", "h800")
SCHEDULES = ("1f1b", "zb-h1", "zbv", "dualpipe", "dualpipev")


@pytest.mark.parametrize("name", SCHEDULES)
def test_even_stages_cost_what_the_simulation_of_their_phases_says(name: str) -> None:
    layout = replace(LAYOUT, schedule=name, layers=None)
    plan = layout.make_schedule()
    each = MODEL.num_hidden_layers // plan.num_stages
    layout = replace(layout, layers=(each,) * plan.num_stages)
    quick = quick_step(MODEL, H800, layout, TIMED)
    found = quick.result.costs
    phases = Phases(PAIRED, layers=each)
    # Messages and what follows the rows as they were predicted, the steps by their phases.
    beside = Costs(
        phases=phases,
        send=found.send,
        message=found.message,
        bandwidth=found.bandwidth,
        reduce=found.reduce,
        mirror=found.mirror,
        optimizer=found.optimizer,
    )
    # Head and embedding take next to nothing; but in a pair with the last stage's backward the
    # forward's first layer goes with the head, and all others a layer later.
    near = 1e-2 if any(isinstance(step, Pair) for row in plan.rows for step in row) else 1e-6
    assert quick.step_ms == pytest.approx(simulate(plan, beside).makespan, rel=near)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_ranks_times_and_the_waterfall_add_up_to_the_step(name: str) -> None:
    layout = replace(LAYOUT, schedule=name, layers=None)
    found = predict(
        MODEL, H800, layout, DATASHEET, routing=Routing(), jitter=Jitter(computation=0.02)
    )
    assert len(found.ranks) == len(found.memory) == layout.pp
    for rank in found.ranks:
        assert rank.total == pytest.approx(found.step_ms, rel=1e-9)
        assert min(rank) >= 0
    assert sum(share.ms for share in found.waterfall) == pytest.approx(found.step_ms, rel=1e-9)
    assert found.waterfall[0].ms == ideal_ms(MODEL, H800, layout)
    assert found.mfu == pytest.approx(found.waterfall[0].ms / found.step_ms)
    tokens = layout.tokens_per_step
    hours = found.step_ms / 3.6e6 * layout.world_size
    assert found.gpu_hours_per_trillion == pytest.approx(hours / tokens * 1e12)


def test_without_randomness_the_step_is_that_of_one_pipeline() -> None:
    found = predict(MODEL, H800, LAYOUT, DATASHEET)
    assert found.step_ms == pytest.approx(quick_step(MODEL, H800, LAYOUT, DATASHEET).step_ms)


def test_uneven_routing_and_jitter_only_make_a_step_longer() -> None:
    quiet = predict(MODEL, H800, LAYOUT, DATASHEET).step_ms
    even = predict(MODEL, H800, LAYOUT, DATASHEET, routing=Routing()).step_ms
    skewed = Routing("skewed", spread=0.3)
    worse = predict(MODEL, H800, LAYOUT, DATASHEET, routing=skewed).step_ms
    jitter = predict(MODEL, H800, LAYOUT, DATASHEET, jitter=Jitter(computation=0.1)).step_ms
    assert quiet < even < worse
    assert quiet < jitter


def test_without_overlap_a_pair_takes_what_its_parts_take_one_after_the_other() -> None:
    parts = LAYOUT.parts(MODEL, 4)
    stages = stage_times(MODEL, LAYOUT, H800, DATASHEET, parts)
    pair = Pair(Action(0, Op.F, 0), Action(3, Op.B, 1))

    def time(step: Action | Pair, overlap: bool) -> float:
        return duration(phases_of(stages, step, overlap=overlap))

    alone = sum(time(Action(*step), False) for step in ((0, Op.F, 0), (3, Op.I, 1), (3, Op.W, 1)))
    assert time(pair, False) == pytest.approx(alone)
    assert time(pair, True) < alone


def test_a_stage_has_the_layers_of_its_part_in_their_order() -> None:
    model = ModelConfig(num_hidden_layers=4, first_k_dense_replace=2)
    first, last = Layout(pp=2, layers=(3, 1)).parts(model, 2)
    assert kinds_of(first, model) == ("embedding", "dense", "dense", "moe")
    assert kinds_of(last, model) == ("moe", "head", "mtp")


def test_a_datasheet_s_time_is_the_work_by_the_shares_of_the_peaks() -> None:
    times = layer_times(MODEL, LAYOUT, H800, DATASHEET, "moe")
    for name, work in layer_work(MODEL, LAYOUT, "moe").items():
        assert times.alone[name] == pytest.approx(expected_ms(work, H800, DATASHEET))
        beside = expected_ms(work, H800, DATASHEET, sms=112 / 132)
        assert times.paired[name] == pytest.approx(beside)


def test_more_depths_of_prediction_cost_a_layer_and_a_head_each() -> None:
    model = replace(MODEL, num_nextn_predict_layers=1)
    moe, head, mtp = (
        sum(layer_times(model, LAYOUT, H800, DATASHEET, kind).alone.values())
        for kind in ("moe", "head", "mtp")
    )
    # Its projection of 2 x d to d comes on top; it sees one token of 4096 less.
    assert moe + head < mtp < 1.12 * (moe + head)


def test_what_was_not_timed_is_said_and_how_much_it_matters() -> None:
    far = replace(LAYOUT, length=512)
    notes = predict(MODEL, H800, far, TIMED).notes
    assert any(n.kind == "extrapolated" and "512, timed with 4096" in n.text for n in notes)
    assert not any(n.kind == "extrapolated" for n in predict(MODEL, H800, LAYOUT, TIMED).notes)
    assumed = [n.text for n in predict(MODEL, H800, LAYOUT, DATASHEET).notes if n.kind == "assumed"]
    for what in ("FP8 reach 50%", "products reach 65%", "1.4 times as long", "routing is balanced"):
        assert any(what in text and "the step is" in text for text in assumed)


def test_more_gpus_than_the_cluster_has_are_refused() -> None:
    small = Cluster(H800.name, H800.gpu, 8, H800.links, num_gpus=32)
    with pytest.raises(ValueError, match="64 GPUs"):
        predict(MODEL, small, LAYOUT, DATASHEET)
