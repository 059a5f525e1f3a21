"""How unevenly tokens fall on ranks: against counted routings, and what users give."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterflow.comm.dispatch.balance import balanced_layout
from counterflow.comm.dispatch.grid import NodeGrid
from counterflow.comm.dispatch.layout import ExpertLayout
from counterflow.comm.traffic import ACROSS, Routes, across_nodes, route
from counterflow.comm.traffic_synthetic import Choice, random_routing
from counterflow.model import ModelConfig
from counterflow.predict.layout import Dispatcher, Layout
from counterflow.predict.loads import Loads
from counterflow.predict.routing import GroupRouting, Routing, expected_slowdown

LIMITED, FREE = Choice(64, 6, 8, 3), Choice(64, 6)
EP, NODE, TOKENS = 16, 4, 256
V3 = ModelConfig()
V3_LAYOUT = Layout(pp=16, dp=128, ep=64, microbatches=120)
MANY = 10**9  # tokens, of which chance leaves nothing to see


def group(
    routing: Routing, choice: Choice, dispatcher: Dispatcher = "flat", tokens: int = TOKENS
) -> GroupRouting:
    experts = ExpertLayout.contiguous(choice.num_experts, EP)
    return GroupRouting(routing, choice, experts, tokens, NODE, dispatcher)


@cache
def counted(choice: Choice, skew: float, seed: int, tokens: int = TOKENS) -> Routes:
    nodes = tuple(tuple(range(n, n + NODE)) for n in range(0, EP, NODE))
    experts = random_routing(choice, num_ranks=EP, num_tokens=tokens, skew=skew, seed=seed)
    return route(experts, ExpertLayout.contiguous(choice.num_experts, EP), NodeGrid(nodes))


def busiest(routes: Routes, backend: Dispatcher) -> float:
    """Records that the busiest rank receives from others, over the mean."""
    hop = routes.traffic("two_hop" if backend == "deep_ep" else backend).hops[0]
    records = np.where(~np.eye(EP, dtype=bool), hop.records_RR, 0)
    if hop.name == ACROSS:
        records = np.where(across_nodes(routes.grid), records, 0)
    received = records.sum(axis=0)
    return received.max() / received.mean()


@pytest.mark.parametrize("choice", [LIMITED, FREE])
def test_chance_makes_ranks_as_uneven_as_in_counted_routings(choice: Choice) -> None:
    counts = np.array([counted(choice, 0.0, seed).rows_per_rank for seed in range(40)])
    rows = counts / counts.mean(axis=1, keepdims=True)
    drawn = group(Routing(), choice).draw(range(2000), 0, 1).rows
    # 640 counted ranks have their deviation to 3 %, and the router is 2 to 4 % more even here.
    assert drawn.std() == pytest.approx(rows.std(), rel=0.1)
    assert drawn.mean() == pytest.approx(1, abs=1e-9)
    # 40 counted maxima have their mean to 4 % of what they are above 1.
    above = rows.max(axis=1).mean() - 1
    assert drawn.max(axis=-1).mean() - 1 == pytest.approx(above, rel=0.15)


def test_a_limit_of_groups_makes_ranks_of_a_group_vary_together() -> None:
    rows = {
        choice: group(Routing(), choice).draw(range(4000), 0, 1).rows[:, 0]
        for choice in (LIMITED, FREE)
    }
    counts = np.array([counted(LIMITED, 0.0, seed, 32).rows_per_rank for seed in range(150)])

    def together(of: Any) -> float:  # ranks 2 i and 2 i + 1 have the experts of a group
        return float(np.mean([np.corrcoef(of[:, i], of[:, i + 1])[0, 1] for i in range(0, EP, 2)]))

    assert together(rows[FREE]) == pytest.approx(-1 / (EP - 1), abs=0.02)
    # The router takes groups that have good experts, and so ties them less than the model has it.
    assert 0.05 < together(counts) < together(rows[LIMITED]) < together(counts) + 0.15


@pytest.mark.parametrize("backend", ["flat", "dedup", "two_hop", "deep_ep"])
@pytest.mark.parametrize("skew", [0.0, 0.2])
@pytest.mark.parametrize("choice", [LIMITED, FREE])
def test_bytes_of_the_busiest_link_are_near_the_counted_ones(
    choice: Choice, skew: float, backend: Dispatcher
) -> None:
    above: list[float] = []
    predicted: list[float] = []
    for seed in range(24):
        routes = counted(choice, skew, seed)
        above.append(busiest(routes, backend) - 1)
        routing = Routing()
        if skew:
            loads = routes.rows_per_slot[None].astype(float)
            routing = Routing.measured(Loads(loads, "counted"))
        drawn = group(routing, choice, backend).draw(range(1), seed, 100)
        predicted.append(drawn.busiest.mean() - 1)
    # A model of one line: to a fifth of what is above the mean, and 24 counted maxima to 5 %.
    assert np.mean(predicted) == pytest.approx(np.mean(above), rel=0.25)


def test_popularity_has_the_max_vio_that_was_asked_for() -> None:
    for max_vio in (0.04, 0.6):
        routing = Routing.with_max_vio(max_vio, 64)
        experts = ExpertLayout.contiguous(64, 64)
        each = GroupRouting(routing, FREE, experts, MANY, 64, "flat").draw(range(2000), 0, 1)
        # Blom's formula is of the median more than of the mean: 3 % too small at 0.6.
        assert each.rows.max(axis=-1).mean() - 1 == pytest.approx(max_vio, rel=0.06)


def test_what_is_four_times_as_popular_varies_twice_as_much() -> None:
    load = np.ones((1, 64))
    load[:, :4] = 4  # the first rank's
    rows = group(Routing.measured(Loads(load, "made up")), FREE).draw(range(1), 0, 4000).rows[0]
    deviation = rows.std(axis=0)
    assert deviation[0] / deviation[1:].mean() == pytest.approx(2, rel=0.05)


def test_a_persistent_popularity_is_that_of_all_groups_and_microbatches() -> None:
    for persistent in (True, False):
        held = group(Routing("skewed", 0.3, persistent), LIMITED, tokens=MANY)
        one, other = (held.draw(range(3, 5), m, 2).rows for m in (0, 1))
        same = pytest.approx(one[:, 0], rel=1e-3)
        assert (one[:, 1] == same) is persistent
        assert (other[:, 0] == same) is persistent


def test_a_draw_depends_on_its_arguments_alone() -> None:
    held = group(Routing("skewed", 0.1, persistent=False), LIMITED, "two_hop")
    first = held.draw(range(2), 7, 3, seed=5)
    held.draw(range(2), 8, 3, seed=5)
    again = group(Routing("skewed", 0.1, persistent=False), LIMITED, "two_hop")
    second = again.draw(range(2), 7, 3, seed=5)
    assert (first.rows == second.rows).all()
    assert (first.busiest == second.busiest).all()
    assert (first.rows != again.draw(range(2), 7, 3, seed=6).rows).any()


def test_balanced_routing_and_one_rank_have_nothing_uneven() -> None:
    for held in (
        group(Routing("balanced"), LIMITED),
        GroupRouting(Routing(), FREE, ExpertLayout.contiguous(64, 1), 8, 1, "flat"),
    ):
        assert not held.is_random
        drawn = held.draw(range(2), 0, 3)
        assert drawn.rows.shape == (2, 3, held.ep)
        assert (drawn.rows == 1).all()
        assert (drawn.busiest == 1).all()


def test_a_layout_of_experts_that_balances_a_load_takes_its_unevenness_away() -> None:
    load = np.random.default_rng(0).lognormal(0.0, 0.8, 64)
    loads = Loads(load[None], "made up")
    model = ModelConfig(
        n_routed_experts=64, num_hidden_layers=4, first_k_dense_replace=3, n_group=8, topk_group=3
    )
    layout = Layout(dp=EP, ep=EP, length=MANY, dispatcher="flat")
    better = balanced_layout(load, num_ranks=EP, num_slots=96, num_nodes=4)
    plain, dealt = (
        Routing.measured(loads).of(model, layout, experts=experts).draw(range(1), 0, 1)
        for experts in (None, better)
    )
    by_rank = load.reshape(EP, -1).sum(axis=1)
    assert plain.rows[0, 0] == pytest.approx(by_rank / by_rank.mean(), rel=1e-3)
    assert plain.busiest[0, 0] > 1.5
    assert dealt.busiest[0, 0] < 1.1


def test_measured_loads_that_change_are_those_of_steps() -> None:
    counts = np.random.default_rng(1).lognormal(0.0, 0.5, (3, 2, 64))
    loads = Loads(counts, "made up")
    steps = loads.shares.reshape(3, 2, EP, -1).mean(axis=-1)
    held = group(Routing.measured(loads, persistent=False), LIMITED, tokens=MANY)
    rows = held.draw(range(2), 0, 40).rows
    found = {
        next(s for s in range(3) if rows[:, g] == pytest.approx(steps[s], rel=1e-3))
        for g in range(40)
    }
    assert found == {0, 1, 2}
    mean = group(Routing.measured(loads), LIMITED, tokens=MANY).draw(range(2), 0, 1).rows[:, 0]
    assert mean == pytest.approx(steps.mean(axis=0), rel=1e-3)


@pytest.mark.parametrize("routing", [Routing(), Routing("skewed", 0.1, persistent=False)])
def test_the_expected_slowdown_is_the_mean_of_many_draws(routing: Routing) -> None:
    found = expected_slowdown(routing, V3, V3_LAYOUT)
    held = routing.of(V3, V3_LAYOUT)
    drawn = held.draw(range(58), 1, 20, seed=9)
    assert found.rows - 1 == pytest.approx(drawn.rows.max(axis=-1).mean() - 1, rel=0.05)
    assert found.bytes - 1 == pytest.approx(drawn.busiest.mean() - 1, rel=0.05)
    assert expected_slowdown(routing, V3, V3_LAYOUT) is found


def test_fewer_tokens_and_more_ranks_are_less_even() -> None:
    def rows(**changes: Any) -> float:
        sizes: dict[str, Any] = {"dp": 64, "ep": 64, "length": 4096}
        layout = Layout(**(sizes | changes))
        return expected_slowdown(Routing(), V3, layout).rows

    assert rows(length=64) > rows(length=1024) > rows() > rows(ep=8) > rows(ep=1) == 1
    assert expected_slowdown(Routing("balanced"), V3, V3_LAYOUT) == (1, 1)


def test_loads_are_read_from_a_run_and_from_arrays(tmp_path: Path) -> None:
    counts = np.arange(1, 25).reshape(3, 8)
    layers = {str(number): row for number, row in zip((9, 10, 11), counts.tolist(), strict=True)}
    (tmp_path / "load.json").write_text(json.dumps({"layers": dict(reversed(layers.items()))}))
    (tmp_path / "some.json").write_text(json.dumps([counts.tolist()] * 2))
    np.save(tmp_path / "some.npy", counts)
    for name, steps in (("", 1), ("load.json", 1), ("some.json", 2), ("some.npy", 1)):
        found = Loads.read(tmp_path / name)
        assert found.counts.tolist() == [counts.tolist()] * steps
        assert found.source in (str(tmp_path / name), str(tmp_path / "load.json"))
    # 8 / 4.5, 16 / 12.5 and 24 / 20.5
    assert found.max_vio == pytest.approx((8 / 4.5 + 16 / 12.5 + 24 / 20.5) / 3 - 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "holds no loads"),
        ("{}", "no loads of any layer"),
        ('{"layers": {"a": [1]}}', "'a' is no number"),
        ("[1, 2]", r"got \[2\]"),
        ("[[1, 2], [3]]", "as many for each layer"),
        ('[["a", 2]]', "loads are numbers"),
        ("[[1, -2]]", "from 0 up"),
        ("[[1, 2], [0, 0]]", "layer 1 of step 0 has no tokens"),
    ],
)
def test_files_without_loads_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Loads.read(path)
    with pytest.raises(ValueError, match=r"load\.json in the folder of a run"):
        Loads.read(tmp_path / "absent.json")


def test_impossible_routings_are_refused() -> None:
    loads = Loads(np.ones((58, 256)), "some")
    for refused, message in (
        (lambda: Routing("skewed", -0.1), "from 0 up"),
        (lambda: Routing("even", 0.1), "a spread is of skewed"),
        (lambda: Routing("even", persistent=False), "no popularity that could change"),
        (lambda: Routing("measured"), "measured routing has loads"),
        (lambda: Routing.with_max_vio(300, 256), "below the number of experts"),
        (lambda: Routing.with_max_vio(200, 256), "beyond log-normal"),
        (lambda: Routing().of(V3, Layout(dp=12, ep=12)), "do not divide"),
        (lambda: Routing().of(V3, Layout(dp=16, ep=16), gpus_per_node=6), "do not fill nodes"),
        (lambda: Routing.measured(Loads(np.ones((3, 256)), "x")).of(V3, V3_LAYOUT), "58 or 59"),
        (
            lambda: Routing().of(V3, V3_LAYOUT, experts=ExpertLayout.contiguous(256, 8)),
            "256 experts on 8 ranks",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    # Without those of multi-token prediction, which are then as the last layer's.
    assert Routing.measured(loads).of(V3, V3_LAYOUT).draw(range(58, 59), 0, 1).rows.size == 64
