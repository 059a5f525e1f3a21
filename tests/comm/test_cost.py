"""The cost model: against hand counts, its limits, and the papers' numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.comm.cost import (
    PRESETS,
    Links,
    exchange_cost,
    experts_at_same_cost,
    phase_cost,
    phase_costs,
)
from counterflow.comm.dispatch.grid import NodeGrid
from counterflow.comm.dispatch.layout import ExpertLayout
from counterflow.comm.traffic import ACROSS, BACKENDS, INSIDE, Routes, route
from counterflow.comm.traffic_expected import expected_traffic
from counterflow.comm.traffic_sizes import PHASES, Elements, PayloadSizes, RowSizes
from counterflow.comm.traffic_synthetic import Choice, balanced_routing, random_routing
from counterflow.parallel.simulate.phases import NAMES

H800 = PRESETS[0]
V3_SIZES = RowSizes(PayloadSizes.named("bf16"), 7168)
PAIR = NodeGrid.of([0, 0, 1, 1])


def grid_of(nodes: int, ranks_per_node: int) -> NodeGrid:
    return NodeGrid.of([rank // ranks_per_node for rank in range(nodes * ranks_per_node)])


def bandwidths(inside: float, across: float) -> Links:
    return Links("test", inside, across)


# ---- the model ----


def test_a_hop_lasts_as_long_as_its_busiest_link() -> None:
    #               to 0  1  2  3
    sent = np.array([[9, 5, 0, 0], [0, 0, 2, 1], [0, 0, 0, 0], [0, 3, 0, 0]]) * 1_000_000
    cost = exchange_cost([sent], PAIR, Links("test", 1.0, 1.0, inside_us=7, across_us=2))
    (hop,) = cost.hops
    assert [(load.link, load.direction, load.rank, load.num_bytes) for load in hop.loads] == [
        (ACROSS, "sending", 1, 3e6),
        (ACROSS, "receiving", 1, 3e6),
        (INSIDE, "sending", 0, 5e6),
        (INSIDE, "receiving", 1, 5e6),
    ]
    assert (cost.transfer_ms, cost.latency_ms, cost.ms) == (5.0, 0.007, 5.007)
    assert cost.bound_by == "rank 0 sending inside nodes"
    slow = exchange_cost([sent], PAIR, bandwidths(inside=2.0, across=1.0))
    assert (slow.ms, slow.bound_by) == (3.0, "rank 1 sending across nodes")


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=16, max_size=16),
    st.lists(st.integers(0, 9), min_size=16, max_size=16),
    st.integers(1, 5),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_cost_is_that_of_a_slow_count(
    first: list[int], second: list[int], inside: int, across: int, chunks: int | None
) -> None:
    nodes = [0, 1, 0, 1]
    links = Links("test", inside, across, inside_us=100, across_us=300)
    matrices = [np.array(cells).reshape(4, 4) * 1_000_000 for cells in (first, second)]
    times, latency = [], 0.0
    for matrix in matrices:
        carried: dict[tuple[int, str, bool], float] = {}
        for source in range(4):
            for target in range(4):
                away = nodes[source] != nodes[target]
                if source != target and matrix[source, target]:
                    ms = matrix[source, target] / 1e6 / (across if away else inside)
                    for key in ((source, "sends", away), (target, "receives", away)):
                        carried[key] = carried.get(key, 0.0) + ms
        times.append(max(carried.values(), default=0.0))
        if carried:
            latency += 0.3 if any(away for _, _, away in carried) else 0.1
    cost = exchange_cost(matrices, NodeGrid.of(nodes), links, chunks=chunks)
    # Chunk by chunk: the second hop of one beside the first hop of the next.
    done = [0.0, 0.0]
    for _ in range(chunks or 0):
        done[0] += times[0] / (chunks or 1)
        done[1] = max(done) + times[1] / (chunks or 1)
    expected = max(times) if chunks is None else done[1]
    assert cost.ms == pytest.approx(latency + expected, rel=1e-12)


def test_more_chunks_bring_two_hops_from_their_sum_to_the_slower_one() -> None:
    across = np.zeros((4, 4), int)
    across[0, 2] = 6_000_000
    inside = np.zeros((4, 4), int)
    inside[2, 3] = 4_000_000
    times = [
        exchange_cost([across, inside], PAIR, bandwidths(1, 1), chunks=c).ms for c in (1, 2, 4, 400)
    ]
    assert times == pytest.approx([10, 8, 7, 6.01])
    assert exchange_cost([across, inside], PAIR, bandwidths(1, 1)).ms == 6
    with pytest.raises(ValueError, match="chunks must be from 1 up, got 0"):
        exchange_cost([across], PAIR, bandwidths(1, 1), chunks=0)


def test_small_messages_are_bound_by_latency_and_nothing_costs_nothing() -> None:
    tiny = np.zeros((4, 4), int)
    assert exchange_cost([tiny, tiny], PAIR, H800, chunks=4).ms == 0
    assert exchange_cost([tiny], PAIR, H800).bound_by == "nothing is sent"
    tiny[0, 2] = 64
    cost = exchange_cost([tiny], PAIR, H800)
    assert cost.bound_by == "latency"
    assert cost.ms == pytest.approx(3.7e-3, rel=1e-3)


@pytest.mark.parametrize(("latency_us", "bound_by"), [(9.9, "rank 0 sending"), (10.1, "latency")])
def test_latency_binds_where_it_is_longer_than_the_transfer(
    latency_us: float, bound_by: str
) -> None:
    sent = np.zeros((4, 4), int)
    sent[0, 2] = 10_000  # 10 us at 1 GB/s
    cost = exchange_cost([sent], PAIR, Links("test", 1.0, 1.0, across_us=latency_us))
    assert cost.bound_by.startswith(bound_by)


def test_the_four_phases_carry_what_they_should() -> None:
    grid, layout = grid_of(8, 8), ExpertLayout.contiguous(256, 64)
    choice = Choice(256, 8, 8, 4)
    routes = route(random_routing(choice, num_ranks=64, num_tokens=64), layout, grid)
    two_hop = routes.traffic("two_hop")
    plain = phase_costs(two_hop, V3_SIZES, H800)
    fp8 = phase_costs(two_hop, RowSizes(PayloadSizes.named("fp8"), 7168), H800)
    assert set(plain) == set(PHASES) <= set(NAMES)
    for spread in ("dispatch(F)", "combine(B)"):
        assert 0.5 < fp8[spread].transfer_ms / plain[spread].transfer_ms < 0.55
    for gather in ("combine(F)", "dispatch(B)"):
        assert fp8[gather] == plain[gather]
    # Back the same way: who received most there, sends most here.
    there, back = plain["combine(B)"], plain["combine(F)"]
    assert there.ms == pytest.approx(back.ms, rel=1e-12)
    assert there.bound is not None
    assert back.bound is not None
    assert there.bound.rank == back.bound.rank
    assert {there.bound.direction, back.bound.direction} == {"sending", "receiving"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_even_routing_costs_what_the_closed_form_says(backend: str) -> None:
    """The closed form is the mean over tokens; the busiest rank of a random routing is above it."""
    choice, grid = Choice(16, 4), grid_of(4, 2)
    layout = ExpertLayout.contiguous(16, 8)
    sizes = RowSizes(PayloadSizes.named("bf16"), 1024)
    expected = expected_traffic(backend, choice, num_tokens=4000, layout=layout, grid=grid)
    experts = random_routing(choice, num_ranks=8, num_tokens=4000)
    counted = route(experts, layout, grid).traffic(backend)
    one = phase_cost(expected, "dispatch(F)", sizes, H800, chunks=4).transfer_ms
    other = phase_cost(counted, "dispatch(F)", sizes, H800, chunks=4).transfer_ms
    # Of some 4,000 records on each link; five standard deviations of the mean are below 4%.
    assert one <= other < 1.04 * one


# ---- the papers' numbers ----


def spread_out(nodes: int, experts: int) -> Routes:
    """Each rank sends a token to so many experts, all on other nodes, spread evenly over `nodes`
    of them, each on a rank of its own and none on the relay."""
    grid = grid_of(nodes + 1, 8)
    layout = ExpertLayout.contiguous(grid.num_ranks, grid.num_ranks)
    chosen: list[list[list[int]]] = []
    for rank in range(grid.num_ranks):
        node, index = divmod(rank, 8)
        targets = [
            (node + 1 + e % nodes) % (nodes + 1) * 8 + (index + 1 + e // nodes) % 8
            for e in range(experts)
        ]
        chosen.append([targets])
    return route(chosen, layout, grid)


def test_up_to_12_experts_on_4_nodes_cost_no_more_than_8_and_13_cost_1_6_percent_more() -> None:
    """arXiv 2412.19437, section 3.2.2: 3.2 experts a node and 4 nodes, 12.8, are "up to 13"."""
    assert experts_at_same_cost(4, H800) == 12.8

    def ms(experts: int) -> float:
        traffic = spread_out(4, experts).traffic("two_hop")
        links = bandwidths(H800.inside_gbps, H800.across_gbps)
        return phase_cost(traffic, "combine(F)", V3_SIZES, links).ms

    crossing = 4 * 2 * 7168 / 50e9 * 1e3
    assert [ms(e) for e in (4, 8, 12)] == pytest.approx([crossing] * 3, rel=1e-12)
    assert ms(13) == pytest.approx(1.015625 * crossing, rel=1e-12)
    assert ms(16) == pytest.approx(1.25 * crossing, rel=1e-12)


@pytest.mark.parametrize(("nodes", "ratio"), [(4, 1.0), (1, 3.2), (2, 2.5), (3, 4.0)])
def test_up_to_the_experts_at_same_cost_the_model_charges_crossings_alone(
    nodes: int, ratio: float
) -> None:
    links = bandwidths(inside=50 * ratio, across=50)
    equal = experts_at_same_cost(nodes, links)
    crossing = nodes * 2 * 7168 / 50e9 * 1e3
    for experts in range(nodes, 7 * nodes + 1):
        traffic = spread_out(nodes, experts).traffic("two_hop")
        ms = phase_cost(traffic, "combine(F)", V3_SIZES, links).ms
        assert ms == pytest.approx(crossing * max(1.0, experts / equal), rel=1e-12)


def test_eight_experts_cross_eight_times_without_the_limit_and_four_times_with_it() -> None:
    """arXiv 2505.09343: 8 t in the worst case against M t, t the time of a token."""
    links = bandwidths(inside=1e9, across=50)  # inside a node takes no time
    t = 2 * 7168 / 50e9 * 1e3

    def ms(nodes: int, backend: str) -> float:
        traffic = spread_out(nodes, 8).traffic(backend)
        return phase_cost(traffic, "combine(F)", V3_SIZES, links).ms

    assert ms(8, "two_hop") == pytest.approx(8 * t)
    assert ms(4, "two_hop") == pytest.approx(4 * t)
    assert ms(4, "flat") == ms(4, "dedup") == pytest.approx(8 * t)


@pytest.mark.parametrize(
    ("gbps", "layer_us", "total_ms"), [(50.0, 120.96, 14.76), (900.0, 6.72, 0.82)]
)
def test_the_published_time_per_output_token(gbps: float, layer_us: float, total_ms: float) -> None:
    """arXiv 2505.09343: 32 tokens, 9 experts, rows of 7000, 1 byte there and 2 back,
    each (token, expert) across nodes; two micro-batches, 61 layers."""
    grid = grid_of(2, 9)
    # The nine experts of a token on the other node, one a rank.
    experts = [[[(rank // 9 + 1) % 2 * 9 + e for e in range(9)]] * 32 for rank in range(18)]
    traffic = route(experts, ExpertLayout.contiguous(18, 18), grid).traffic("flat")
    sizes = RowSizes(
        PayloadSizes("1 and 2 bytes", Elements(8), Elements(16)), 7000
    )  # the paper counts no scales
    links = bandwidths(inside=1, across=gbps)
    us = 1e3 * sum(
        phase_cost(traffic, phase, sizes, links).ms for phase in ("combine(B)", "combine(F)")
    )
    assert us == pytest.approx(layer_us, rel=1e-9)
    assert 2 * 61 * us / 1e3 == pytest.approx(total_ms, abs=0.005)


def test_two_hops_beat_flat_on_v3s_shape_and_the_limit_beats_none() -> None:
    grid, layout = grid_of(8, 8), ExpertLayout.contiguous(256, 64)

    def ms(limit: int, backend: str) -> float:
        experts = balanced_routing(Choice(256, 8, 8, limit), num_ranks=64, num_tokens=64)
        traffic = route(experts, layout, grid).traffic(backend)
        return phase_cost(traffic, "dispatch(F)", V3_SIZES, H800).ms

    assert ms(4, "two_hop") < 0.6 * ms(4, "flat")
    assert ms(4, "two_hop") < 0.6 * ms(8, "two_hop")


# ---- links ----


def test_links_by_name_and_by_numbers() -> None:
    assert Links.parse("h800") is H800
    assert (H800.inside_gbps / H800.across_gbps, H800.inside_us, H800.across_us) == (3.2, 3.33, 3.7)
    found = Links.parse("across=25,inside=100,across_us=5")
    assert (found.inside_gbps, found.across_gbps, found.inside_us, found.across_us) == (
        100,
        25,
        0,
        5,
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h900", "'h900' .* use h800"),
        ("inside=1", "needs both inside= and across="),
        ("inside=1,across=1,inside=2", "each once"),
        ("inside=fast,across=1", "'inside=fast'"),
        ("inside=0,across=1", "inside=0 must be a bandwidth from 1e-06 to 1e"),
        ("inside=1,across=inf", "across=inf must be a bandwidth"),
        ("inside=5e-324,across=1", "inside=4.94066e-324 must be a bandwidth"),
        ("inside=1,across=1e10", "across=1e\\+10 must be a bandwidth"),
        ("inside=1,across=1,inside_us=-1", "inside_us=-1 must be a latency from 0"),
        ("inside=1,across=1,across_us=1e10", "across_us=1e\\+10 must be a latency"),
        ("", "not understood"),
    ],
)
def test_links_that_make_no_sense_are_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Links.parse(text)


def test_bandwidths_are_checked_in_python_too() -> None:
    bad: Any = math.nan
    with pytest.raises(ValueError, match="inside=nan must be"):
        Links("test", bad, 1.0)
