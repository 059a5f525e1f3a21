"""What ranks send each other: against counted routings, what was measured, and arithmetic."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.comm.cost import Links
from counterflow.comm.dispatch.grid import NodeGrid
from counterflow.comm.dispatch.layout import ExpertLayout
from counterflow.comm.traffic import ACROSS, INSIDE, across_nodes, route
from counterflow.comm.traffic_sizes import PHASES, PayloadSizes, RowSizes
from counterflow.comm.traffic_synthetic import Choice, random_routing
from counterflow.model import ModelConfig, num_parameters
from counterflow.model.stages import Part
from counterflow.parallel.mesh import MeshShape
from counterflow.predict.cluster import Cluster, load_cluster
from counterflow.predict.exchange import (
    exchange,
    gathering,
    message_bytes,
    message_transfer,
    mirror_ms,
    mirroring,
    ranks_per_node,
    reduce_ms,
    reduction,
    stage_parameters,
)
from counterflow.predict.layout import Layout

V3 = ModelConfig()
H800 = load_cluster("h800")
UNMEASURED = replace(H800, all_to_all={})
TRAINED = Layout(pp=16, dp=128, ep=64)
ROW_FP8 = 7168 + 4 * 7168 // 128
STAGE = Part(range(10, 14), embed=False, head=False)


def counted(model: ModelConfig, layout: Layout, per_node: int) -> dict[str, tuple[float, float]]:
    """By phase, bytes that a rank sends across nodes and inside, in a routing by random scores."""
    choice = Choice(
        model.n_routed_experts, model.num_experts_per_tok, model.n_group, model.topk_group
    )
    experts = random_routing(choice, num_ranks=layout.ep, num_tokens=layout.tokens, seed=11)
    grid = NodeGrid.of([rank // per_node for rank in range(layout.ep)])
    routes = route(experts, ExpertLayout.contiguous(choice.num_experts, layout.ep), grid)
    sizes = RowSizes(PayloadSizes.named(layout.payload), model.hidden_size)
    traffic, crosses_RR = routes.traffic(layout.dispatcher), across_nodes(grid)
    found: dict[str, tuple[float, float]] = {}
    for phase in PHASES:
        sent_RR = traffic.rank_bytes(phase, sizes)
        found[phase] = (
            sent_RR[crosses_RR].sum() / layout.ep,
            sent_RR[~crosses_RR].sum() / layout.ep,
        )
    return found


@pytest.mark.parametrize("dispatcher", ["flat", "dedup", "two_hop"])
@pytest.mark.parametrize(
    ("model", "ep", "per_node"),
    [
        (V3, 64, 8),
        (V3, 16, 8),
        (V3, 8, 8),
        (replace(V3, topk_group=8), 32, 4),
        (replace(V3, n_routed_experts=64, n_group=1, topk_group=1), 16, 4),
    ],
)
def test_bytes_are_those_of_a_counted_routing(
    model: ModelConfig, ep: int, per_node: int, dispatcher: Any
) -> None:
    cluster = replace(H800, gpus_per_node=per_node)
    layout = Layout(dp=ep, ep=ep, length=16384 // ep, dispatcher=dispatcher)
    found = exchange(model, layout, cluster)
    for phase, (across, inside) in counted(model, layout, per_node).items():
        # Either mean is of 8,192 tokens or more: of what a token reaches, within 1 %.
        assert found[phase].across_bytes == pytest.approx(across, rel=0.01)
        assert found[phase].inside_bytes == pytest.approx(inside, rel=0.01)


def test_a_token_of_v3_crosses_once_to_each_of_at_most_four_nodes() -> None:
    sent = exchange(V3, replace(TRAINED, dispatcher="two_hop"), H800)["dispatch(F)"]
    record = ROW_FP8 + 8 * (4 + 2)  # eight weights and slots
    rows = sent.across_bytes / 4096 / record
    # Nearly all tokens reach four nodes, of which an eighth is the one that they are on.
    assert 0.97 * 4 * 7 / 8 < rows <= 4 * 7 / 8
    flat = exchange(V3, replace(TRAINED, dispatcher="flat"), H800)["combine(B)"]
    assert flat.across_bytes / 4096 == 8 * 7 / 8 * ROW_FP8


def test_hops_wait_for_the_slower_link() -> None:
    """V3's links: 13 experts could be had at the cost of four nodes, 8 are."""
    found = exchange(V3, replace(TRAINED, payload="bf16"), UNMEASURED)
    for sent in found.values():
        assert sent.basis == "links"
        assert sent.across_bytes / 50 > sent.inside_bytes / 160
        assert sent.ms == pytest.approx(sent.across_bytes / 50e6 + (3.7 + 3.33) * 1e-3, rel=1e-9)


@pytest.mark.parametrize("ranks", [8, 16, 32, 64, 128])
def test_deep_ep_reaches_what_was_measured_of_it(ranks: int) -> None:
    found = exchange(V3, Layout(dp=ranks, ep=ranks), H800)
    choice = Choice(256, 8, 8, 4)
    grid = NodeGrid.of([rank // 8 for rank in range(ranks)])
    experts = random_routing(choice, num_ranks=ranks, num_tokens=16384 // ranks, seed=5)
    routes = route(experts, ExpertLayout.contiguous(256, ranks), grid)
    reached = routes.nodes_per_token if ranks > 8 else routes.ranks_per_token
    logical = 4096 * float(reached.mean())
    measured = H800.all_to_all[ranks]
    for phase, row, gbps in (
        ("dispatch(F)", ROW_FP8, measured.dispatch_gbps),
        ("combine(F)", 2 * 7168, measured.combine_gbps),
    ):
        assert found[phase].basis == "measured"
        # Two samples of tokens.
        assert found[phase].ms == pytest.approx(logical * row / gbps * 1e-6, rel=0.01)


def test_backwards_take_the_way_of_the_other_phase() -> None:
    """The gradient of a dispatch is summed on its way back; that of a combine goes to experts."""
    found = exchange(V3, TRAINED, H800)
    assert found["combine(B)"].ms == found["dispatch(F)"].ms
    assert found["dispatch(B)"].ms == found["combine(F)"].ms
    assert found["dispatch(F)"].across_bytes > found["combine(B)"].across_bytes  # with weights
    assert found["combine(F)"].across_bytes > 1.9 * found["combine(B)"].across_bytes


def test_between_measured_numbers_of_ranks_the_bandwidth_of_what_crosses_lies_between_them() -> (
    None
):
    model = replace(V3, n_routed_experts=384)

    def crossing(ep: int) -> float:
        cluster = replace(H800, gpus_per_node=8)
        sent = exchange(model, Layout(dp=ep, ep=ep), cluster)["combine(F)"]
        return sent.across_bytes / sent.ms * 1e-6

    below, between, above = (crossing(ep) for ep in (64, 96, 128))
    assert exchange(model, Layout(dp=96, ep=96), H800)["combine(F)"].basis == "interpolated"
    assert above < between < below
    # Measured 48.54 * 7/8 and 41.6 * 15/16; 96 is more than half the way from 64 in ratios.
    assert below == pytest.approx(48.54 * 7 / 8, rel=0.01)
    assert above == pytest.approx(41.6 * 15 / 16, rel=0.01)
    assert between < (below + above) / 2


@pytest.mark.parametrize(
    ("layout", "basis"),
    [
        (Layout(dp=256, ep=256), "extrapolated"),
        (Layout(dp=4, ep=4), "extrapolated"),
        (Layout(dp=64, ep=64, length=1024), "measured"),
        (Layout(dp=64, ep=64, length=1023), "extrapolated"),
        (Layout(dp=64, ep=64, dispatcher="two_hop"), "links"),
        (Layout(dp=64, ep=1), "nothing"),
    ],
)
def test_an_exchange_says_what_its_time_is_from(layout: Layout, basis: str) -> None:
    assert {sent.basis for sent in exchange(V3, layout, H800).values()} == {basis}


def test_alone_a_rank_sends_nothing() -> None:
    for sent in exchange(V3, Layout(dp=8, ep=1), H800).values():
        assert (sent.across_bytes, sent.inside_bytes, sent.ms) == (0, 0, 0)


def test_within_a_node_nothing_crosses() -> None:
    layouts = [Layout(pp=4, dp=8, ep=ep, dispatcher="two_hop") for ep in (2, 4, 8)]
    sent = [exchange(V3, layout, H800)["combine(F)"] for layout in layouts]
    assert [one.across_bytes for one in sent] == [0, 0, 0]
    assert sent[0].ms < sent[1].ms < sent[2].ms


def test_exact_payloads_travel_in_the_dtype_of_the_layout() -> None:
    sent = {
        dtype: exchange(
            V3,
            Layout(dp=8, ep=8, dispatcher="flat", payload="exact", fp8=False, dtype=dtype),
            H800,
        )["combine(F)"].inside_bytes
        for dtype in ("bfloat16", "float32", "float64")
    }
    assert [size / sent["bfloat16"] for size in sent.values()] == [1, 2, 4]


def test_a_known_exchange_is_found_in_less_than_a_millisecond() -> None:
    exchange(V3, TRAINED, H800)
    started = time.process_time()  # of the processor, which others use too
    for microbatches in range(1, 201):
        exchange(V3, replace(TRAINED, microbatches=microbatches), H800)
    assert time.process_time() - started < 0.2


@st.composite
def placed(draw: st.DrawFn) -> tuple[Layout, int]:
    """Layouts and GPUs of a node, on whole nodes or within one."""
    pp, ep, copies = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.integers(1, 6))
    return Layout(pp=pp, dp=ep * copies, ep=ep), draw(st.integers(1, 12))


@settings(max_examples=120, deadline=None)
@given(placed())
def test_a_group_is_refused_where_the_mesh_lays_it_unevenly(case: tuple[Layout, int]) -> None:
    layout, node = case
    shape = MeshShape(layout.pp, layout.dp, layout.ep)
    on_nodes = {
        tuple(np.bincount([r // node for r in shape.ep_peers(first)]).tolist())
        for first in range(shape.world_size)
    }
    numbers = {number for counts in on_nodes for number in counts if number}
    try:
        found = ranks_per_node(layout, replace(H800, gpus_per_node=node))
    except ValueError:
        assert node % layout.ep
        assert layout.ep % node
        assert layout.world_size > node
    else:
        assert numbers == {found}


@settings(max_examples=120, deadline=None)
@given(placed())
def test_reductions_send_each_byte_as_often_as_a_reduce_scatter_must(
    case: tuple[Layout, int],
) -> None:
    layout, node = case
    model = replace(V3, n_routed_experts=8 * layout.ep, n_group=1, topk_group=1)
    cluster = replace(H800, gpus_per_node=node)
    shape = MeshShape(layout.pp, layout.dp, layout.ep)
    sizes, sent = stage_parameters(model, layout, STAGE), reduction(model, layout, cluster, STAGE)
    copies = layout.dp // layout.ep
    expected = 4 * sizes.routed * (copies - 1) / copies
    expected += 4 * sizes.other * (layout.dp - 1) / layout.dp
    assert sent.across_bytes + sent.inside_bytes == pytest.approx(expected, rel=1e-9)
    # Where nobody has to leave a node, nothing does.
    groups = [shape.dp_peers(rank) for rank in range(shape.world_size)]
    if all(len({rank // node for rank in group}) == 1 for group in groups):
        assert sent.across_bytes == 0
    if all(len({rank // node for rank in group}) == len(group) for group in groups):
        assert sent.inside_bytes == 0


def test_a_reduction_within_a_node_takes_what_its_links_give() -> None:
    layout = Layout(dp=8, ep=8, fp8=False)
    sizes = stage_parameters(V3, layout, STAGE)
    sent = reduction(V3, layout, H800, STAGE)
    # Experts are on one rank each: nothing to reduce.
    assert sent.ms == pytest.approx(4 * sizes.other * 7 / 8 / 160e6 + 3.33e-3, rel=1e-9)
    assert sent.bound == INSIDE
    gathered = gathering(V3, layout, H800, STAGE)
    assert gathered.inside_bytes == sent.inside_bytes / 2  # bfloat16
    masters = gathering(V3, replace(layout, fp8=True), H800, STAGE)
    assert masters.inside_bytes == pytest.approx(
        (4 * sizes.other - 2 * sizes.plain) * 7 / 8, rel=1e-12
    )
    both = reduce_ms(V3, layout, H800, STAGE)
    assert both == sent.ms + gathered.ms


def test_experts_are_reduced_by_the_ranks_that_hold_the_same() -> None:
    few = replace(V3, n_shared_experts=0, num_attention_heads=1, q_lora_rank=1)
    sent = reduction(few, TRAINED, H800, STAGE)
    sizes = stage_parameters(few, TRAINED, STAGE)
    assert sizes.routed == 4 * 4 * 3 * 7168 * 2048  # four layers of four experts
    # Two groups of 64 ranks: the other holder is on another node.
    assert sent.across_bytes == pytest.approx(
        4 * (sizes.routed / 2 + sizes.other / 8 * 15 / 16), rel=1e-12
    )
    assert sent.bound == ACROSS


def test_without_zero_gradients_are_sent_twice_and_parameters_never() -> None:
    shared, whole = TRAINED, replace(TRAINED, zero=0)
    one, two = reduction(V3, shared, H800, STAGE), reduction(V3, whole, H800, STAGE)
    assert (two.across_bytes, two.inside_bytes) == (2 * one.across_bytes, 2 * one.inside_bytes)
    assert gathering(V3, whole, H800, STAGE).ms == 0
    assert gathering(V3, shared, H800, STAGE).ms > 0


def test_holders_of_a_stage_sum_their_shares_alone_with_zero() -> None:
    sizes = stage_parameters(V3, TRAINED, STAGE)
    whole = mirroring(V3, replace(TRAINED, zero=0), H800, STAGE)
    assert whole.across_bytes == 4 * (sizes.routed + sizes.other)
    shared = mirroring(V3, TRAINED, H800, STAGE)
    assert shared.across_bytes == 4 * (sizes.routed / 2 + sizes.other / 128)
    assert shared.bound == ACROSS
    assert mirror_ms(V3, TRAINED, H800, STAGE) == shared.ms
    inside = mirroring(V3, Layout(pp=4, dp=2), H800, STAGE)
    assert inside.bound == INSIDE
    assert inside.across_bytes == 0


def test_ranks_of_all_stages_hold_the_whole_model() -> None:
    parts = TRAINED.parts(V3, 16)
    found = [stage_parameters(V3, TRAINED, part) for part in parts]
    total = sum(64 * sizes.routed + sizes.other for sizes in found)
    again = 129280 * 7168  # the embedding, which multi-token prediction has too
    assert total == num_parameters(V3, mtp=True) + again


def test_messages_between_stages_are_hidden_states() -> None:
    assert message_bytes(V3, TRAINED) == 4096 * 7168 * 2
    assert message_bytes(V3, replace(TRAINED, dtype="float32")) == 4096 * 7168 * 4
    assert message_transfer(V3, TRAINED, H800).ms == pytest.approx(4096 * 7168 * 2 / 50e6 + 3.7e-3)
    small = Layout(pp=4, dp=2)
    assert message_transfer(V3, small, H800).ms == pytest.approx(4096 * 7168 * 2 / 160e6 + 3.33e-3)
    assert message_transfer(V3, Layout(dp=8), H800).ms == 0


def test_slower_links_make_everything_slower() -> None:
    slow: Cluster = replace(UNMEASURED, links=Links("slow", 80.0, 25.0))
    fast: Cluster = replace(UNMEASURED, links=Links("fast", 160.0, 50.0))
    for of in (
        lambda c: exchange(V3, TRAINED, c)["combine(F)"].ms,
        lambda c: message_transfer(V3, TRAINED, c).ms,
        lambda c: reduce_ms(V3, TRAINED, c, STAGE),
        lambda c: mirror_ms(V3, TRAINED, c, STAGE),
    ):
        assert of(slow) == pytest.approx(2 * of(fast), rel=1e-9)
