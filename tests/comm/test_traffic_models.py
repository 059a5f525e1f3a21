"""Made-up routings against the model's router, and closed forms against every possible choice."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.comm.dispatch.balance import imbalance
from counterflow.comm.dispatch.grid import NodeGrid
from counterflow.comm.dispatch.layout import ExpertLayout
from counterflow.comm.traffic import BACKENDS, route
from counterflow.comm.traffic_expected import chance_to_reach, expected_nodes, expected_traffic
from counterflow.comm.traffic_synthetic import (
    MOST_SKEW,
    Choice,
    balanced_routing,
    hot_routing,
    random_routing,
    select,
)
from counterflow.model.config import ModelConfig
from counterflow.model.router import Router

V3 = Choice(num_experts=256, top_k=8, num_groups=8, group_limit=4)


def grid_of(nodes: int, ranks_per_node: int) -> NodeGrid:
    return NodeGrid.of([rank // ranks_per_node for rank in range(nodes * ranks_per_node)])


# ---- made-up routings ----


def loads(experts: Any, num_experts: int) -> list[int]:
    return np.bincount(np.ravel(experts), minlength=num_experts).tolist()


@pytest.mark.parametrize(("groups", "limit"), [(8, 4), (4, 1), (8, 8), (1, 1)])
def test_made_up_routings_choose_as_the_models_router_does(groups: int, limit: int) -> None:
    choice = Choice(num_experts=32, top_k=4, num_groups=groups, group_limit=limit)
    logits = np.random.default_rng(3).standard_normal((200, 32)).astype(np.float32)
    config = ModelConfig(
        hidden_size=32,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_group=groups,
        topk_group=limit,
    )
    router = Router(config, dtype=torch.float32)
    with torch.no_grad():
        router.weight.copy_(torch.eye(32))  # so that its logits are its input
        chosen = router(torch.from_numpy(logits)[None]).experts_TK
    found = select(1 / (1 + np.exp(-logits)), choice)
    assert np.sort(found).tolist() == chosen.sort().values.tolist()


def test_random_routing_keeps_the_limit_and_is_as_its_seed_says() -> None:
    experts = random_routing(V3, num_ranks=16, num_tokens=300)
    assert experts.shape == (16, 300, 8)
    routes = route(experts, ExpertLayout.contiguous(256, 16), grid_of(8, 2))
    assert len(routes.beyond(4)) == 0
    assert routes.nodes_per_token.max() == 4
    assert (np.diff(np.sort(experts, axis=2), axis=2) > 0).all()  # no expert twice
    assert (random_routing(V3, num_ranks=16, num_tokens=300) == experts).all()
    assert (random_routing(V3, num_ranks=2, num_tokens=300) == experts[:2]).all()
    assert (random_routing(V3, num_ranks=16, num_tokens=300, seed=1) != experts).any()


def test_skew_makes_loads_uneven() -> None:
    worst = [
        imbalance(np.array(loads(random_routing(V3, num_ranks=4, num_tokens=500, skew=s), 256)))
        for s in (0.0, 0.3, 1.0)
    ]
    # Some 62 rows an expert: the worst of 256 has about three standard deviations more than that.
    assert worst[0] < 1.6
    assert 1.4 * worst[0] < worst[1] < worst[2] / 1.5


@pytest.mark.filterwarnings("error")
def test_skew_has_a_limit_up_to_which_nothing_overflows() -> None:
    sizes = {"num_ranks": 1, "num_tokens": 64}
    random_routing(V3, **sizes, skew=MOST_SKEW)
    for skew in (-0.1, MOST_SKEW * 1.01, 1e300, math.nan):
        with pytest.raises(ValueError, match="skew must be from 0 to 10, got"):
            random_routing(V3, **sizes, skew=skew)


@pytest.mark.parametrize("choice", [V3, Choice(48, 6, 4, 3), Choice(12, 4, 1, 1)])
def test_balanced_routing_loads_all_experts_alike(choice: Choice) -> None:
    even = balanced_routing(choice, num_ranks=2, num_tokens=choice.num_experts)
    assert set(loads(even, choice.num_experts)) == {2 * choice.top_k}
    for tokens in (1, 7, 100):
        experts = balanced_routing(choice, num_ranks=2, num_tokens=tokens)
        counts = loads(experts, choice.num_experts)
        assert max(counts) - min(counts) <= choice.top_k
        assert (np.diff(np.sort(experts, axis=2), axis=2) > 0).all()
        groups = np.sort(experts // choice.group_size, axis=2)
        distinct = 1 + (np.diff(groups, axis=2) > 0).sum(axis=2)
        assert (distinct == choice.group_limit).all()


def test_hot_routing_has_one_set_of_experts() -> None:
    experts = hot_routing(Choice(12, 3), num_ranks=2, num_tokens=5)
    assert experts.shape == (2, 5, 3)
    assert loads(experts, 12) == [10, 10, 10] + [0] * 9


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((10, 2, 4, 2), "10 experts do not divide among 4 groups"),
        ((8, 2, 4, 5), "5 groups of 4; 4 is no limit"),
        ((8, 5, 4, 2), "2 of 4 groups have 4 experts, too few for 5"),
        ((8, 0, 4, 2), "from 1 up"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(sizes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Choice(*sizes)
    with pytest.raises(ValueError, match="multiple of the groups"):
        balanced_routing(Choice(8, 3, 4, 2), num_ranks=1, num_tokens=1)


# ---- closed forms ----


def every_choice(choice: Choice) -> list[list[int]]:
    """Each set of groups with each set of experts in them: all equally likely."""
    size = choice.group_size
    found: list[list[int]] = []
    for groups in itertools.combinations(range(choice.num_groups), choice.group_limit):
        inside = [g * size + i for g in groups for i in range(size)]
        found += map(list, itertools.combinations(inside, choice.top_k))
    return found


@pytest.mark.parametrize("choice", [Choice(8, 3, 4, 2), Choice(12, 2, 3, 2), Choice(12, 4)])
@pytest.mark.parametrize(("nodes", "per_node"), [(2, 2), (4, 1), (1, 4), (2, 1)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_expected_traffic_is_the_mean_over_all_choices(
    choice: Choice, nodes: int, per_node: int, shuffled: bool
) -> None:
    grid = grid_of(nodes, per_node)
    slots = np.arange(choice.num_experts)
    if shuffled:  # a node then has parts of several groups
        np.random.default_rng(1).shuffle(slots)
    layout = ExpertLayout(choice.num_experts, grid.num_ranks, tuple(slots.tolist()))
    all_of_them = every_choice(choice)
    routes = route([all_of_them] * grid.num_ranks, layout, grid)
    assert expected_nodes(choice, layout, grid) == pytest.approx(
        routes.nodes_per_token.mean(), rel=1e-12
    )
    for backend in BACKENDS:
        expected = expected_traffic(
            backend, choice, num_tokens=len(all_of_them), layout=layout, grid=grid
        )
        counted = routes.traffic(backend)
        assert expected.experts_per_record == counted.experts_per_record
        for one, other in zip(expected.hops, counted.hops, strict=True):
            assert one.name == other.name
            # The closed form is floating, by a few operations.
            np.testing.assert_allclose(one.records_RR, other.records_RR, rtol=1e-12)


@settings(deadline=None)
@given(st.data())
def test_the_chance_to_reach_any_set_is_the_share_of_choices_that_do(data: st.DataObject) -> None:
    choice = data.draw(st.sampled_from([Choice(8, 3, 4, 2), Choice(9, 2, 3, 1), Choice(6, 3)]))
    experts = data.draw(st.sets(st.integers(0, choice.num_experts - 1)))
    choices = every_choice(choice)
    reached = sum(bool(experts & set(chosen)) for chosen in choices)
    assert chance_to_reach(choice, experts) == pytest.approx(reached / len(choices), abs=1e-12)


def test_unrestricted_v3_would_reach_five_and_a_half_nodes() -> None:
    layout, grid = ExpertLayout.contiguous(256, 64), grid_of(8, 8)
    free = Choice(256, 8)
    assert expected_nodes(free, layout, grid) == pytest.approx(8 * (1 - miss(224, 256, 8)))
    assert expected_nodes(V3, layout, grid) == pytest.approx(4 * (1 - miss(96, 128, 8)))
    counted = route(random_routing(free, num_ranks=64, num_tokens=50), layout, grid)
    # 3,200 tokens: the mean's standard deviation is below 0.02.
    assert counted.nodes_per_token.mean() == pytest.approx(5.3, abs=0.1)
    assert expected_nodes(free, layout, grid) == pytest.approx(5.3, abs=0.05)


def miss(others: int, all_of_them: int, draws: int) -> float:
    """That all draws without replacement are of the others."""
    chance = 1.0
    for i in range(draws):
        chance *= (others - i) / (all_of_them - i)
    return chance


def test_expected_traffic_says_where_it_does_not_hold() -> None:
    twice = ExpertLayout(2, 2, (0, 1, 0, 1))
    grid = NodeGrid.one_node(2)
    with pytest.raises(ValueError, match="each expert has one slot"):
        expected_traffic("flat", Choice(2, 1), num_tokens=1, layout=twice, grid=grid)
    plain = ExpertLayout.contiguous(4, 2)
    with pytest.raises(ValueError, match="4 experts on 2 ranks, but 2 are chosen"):
        expected_traffic("flat", Choice(2, 1), num_tokens=1, layout=plain, grid=grid)
    with pytest.raises(ValueError, match="no traffic of 'best'"):
        expected_traffic("best", Choice(4, 1), num_tokens=1, layout=plain, grid=grid)
