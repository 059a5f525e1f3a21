"""Traffic of a routing: against a slow count, and against what the dispatchers send."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.comm.dispatch.grid import NodeGrid
from counterflow.comm.dispatch.layout import ExpertLayout
from counterflow.comm.dispatch.record import RecordFormat
from counterflow.comm.traffic import BACKENDS, Routes, across_nodes, node_matrix, route
from counterflow.comm.traffic_sizes import PAYLOADS, PHASES, PayloadSizes, RowSizes
from counterflow.comm.traffic_synthetic import Choice, balanced_routing
from tests import cases_traffic
from tests.clocks import least_seconds
from tests.ranks import RankPool

SIZES = RowSizes(PayloadSizes.named("bf16"), 64)
V3 = Choice(num_experts=256, top_k=8, num_groups=8, group_limit=4)


def grid_of(nodes: int, ranks_per_node: int) -> NodeGrid:
    return NodeGrid.of([rank // ranks_per_node for rank in range(nodes * ranks_per_node)])


# ---- a slow count, written from the description of the backends alone ----


class Case(NamedTuple):
    experts: list[np.ndarray[Any, Any]]
    layout: ExpertLayout
    grid: NodeGrid


@st.composite
def cases(draw: st.DrawFn) -> Case:
    nodes, per_node = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    ranks = nodes * per_node
    grid = NodeGrid.of(draw(st.permutations([n for n in range(nodes) for _ in range(per_node)])))
    num_experts = draw(st.integers(1, 2 * ranks))
    slots_per_rank = draw(st.integers(-(-num_experts // ranks), 4))
    spare = ranks * slots_per_rank - num_experts
    copies = draw(st.lists(st.integers(0, num_experts - 1), min_size=spare, max_size=spare))
    slots = draw(st.permutations([*range(num_experts), *copies]))
    top_k = draw(st.integers(1, 5))
    token = st.lists(st.integers(-1, num_experts - 1), min_size=top_k, max_size=top_k)
    experts = [
        np.array(draw(st.lists(token, max_size=6)), dtype=np.int64).reshape(-1, top_k)
        for _ in range(ranks)
    ]
    return Case(experts, ExpertLayout(num_experts, ranks, tuple(slots)), grid)


def slots_of(case: Case, rank: int, token: int) -> list[int]:
    found: list[int] = []
    for expert in case.experts[rank][token].tolist():
        if expert >= 0:
            copies = [slot for slot, e in enumerate(case.layout.slots) if e == expert]
            found.append(copies[(token + rank) % len(copies)])
    return found


def slow_hops(case: Case, backend: str) -> list[Counter[tuple[int, int]]]:
    """(from, to) -> records, hop by hop."""
    grid, hops = case.grid, [Counter[tuple[int, int]](), Counter[tuple[int, int]]()]
    for source, chosen in enumerate(case.experts):
        for token in range(len(chosen)):
            ranks = [case.layout.rank_of(slot) for slot in slots_of(case, source, token)]
            if backend == "flat":
                hops[0].update((source, rank) for rank in ranks)
            elif backend == "dedup":
                hops[0].update((source, rank) for rank in set(ranks))
            else:
                index = grid.index_of(source)
                for node in {grid.node_of(rank) for rank in ranks}:
                    relay = grid.rows[node][index]
                    hops[0][source, relay] += 1
                    hops[1].update(
                        (relay, rank) for rank in set(ranks) if grid.node_of(rank) == node
                    )
    return hops if backend == "two_hop" else hops[:1]


def dense(counts: Counter[tuple[int, int]], size: int) -> list[list[int]]:
    return [[counts[row, column] for column in range(size)] for row in range(size)]


@settings(max_examples=150, deadline=None)
@given(cases())
def test_records_are_those_of_a_count_token_by_token(case: Case) -> None:
    routes = route(*case)
    for backend in BACKENDS:
        hops = routes.traffic(backend).hops
        slow = slow_hops(case, backend)
        assert [hop.records_RR.tolist() for hop in hops] == [
            dense(counts, case.grid.num_ranks) for counts in slow
        ]


@settings(max_examples=100, deadline=None)
@given(cases())
def test_statistics_are_those_of_a_count_token_by_token(case: Case) -> None:
    routes, grid = route(*case), case.grid
    rows = Counter[int]()
    ranks, nodes, away = [], [], []
    for source, chosen in enumerate(case.experts):
        for token in range(len(chosen)):
            slots = slots_of(case, source, token)
            rows.update(slots)
            ranks.append({case.layout.rank_of(slot) for slot in slots})
            nodes.append({grid.node_of(rank) for rank in ranks[-1]})
            away.append(nodes[-1] - {grid.node_of(source)})
    assert routes.rows_per_slot.tolist() == [rows[s] for s in range(case.layout.num_slots)]
    assert routes.ranks_per_token.tolist() == list(map(len, ranks))
    assert routes.nodes_per_token.tolist() == list(map(len, nodes))
    assert routes.remote_nodes_per_token.tolist() == list(map(len, away))
    counts = list(map(len, case.experts))
    at = [(rank, token) for rank, count in enumerate(counts) for token in range(count)]
    beyond = [place for place, on in zip(at, nodes, strict=True) if len(on) > 1]
    assert list(map(tuple, routes.beyond(1).tolist())) == beyond


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from(PAYLOADS))
def test_what_is_sent_is_what_is_needed_and_comes_back(case: Case, payload: PayloadSizes) -> None:
    routes, sizes = route(*case), RowSizes(payload, 256)
    by_backend = {backend: routes.traffic(backend) for backend in BACKENDS}
    flat, dedup, two_hop = by_backend.values()
    # Every chosen expert gets its row; the second hop ends where dedup's only one does.
    assert flat.hops[0].records_RR.sum(axis=0).tolist() == routes.rows_per_rank.tolist()
    assert (
        two_hop.hops[1].records_RR.sum(axis=0).tolist()
        == dedup.hops[0].records_RR.sum(axis=0).tolist()
    )
    # A token crosses once to each node that needs it, whoever it is for there.
    away_RR = across_nodes(case.grid)
    record = two_hop.record_bytes("dispatch(F)", sizes)
    crossing, staying = two_hop.hop_bytes("dispatch(F)", sizes)
    assert crossing[away_RR].sum() == routes.remote_nodes_per_token.sum() * record
    assert crossing[~away_RR].sum() == staying[away_RR].sum() == 0
    for traffic in by_backend.values():
        for phase in PHASES:
            sent = traffic.hop_bytes(phase, sizes)
            assert (np.sum(sent, axis=0) == traffic.rank_bytes(phase, sizes)).all()
            assert all(hop.diagonal().sum() == 0 for hop in sent)
            records = sum(hop.records_RR.sum() for hop in traffic.hops)
            total = records * traffic.record_bytes(phase, sizes)
            assert sum(hop.sum() for hop in sent) + traffic.local_bytes(phase, sizes).sum() == total
        # The way back is the way there: the same records, hop by hop in the other order.
        same = RowSizes(PayloadSizes.named("bf16"), 256)
        there = traffic.hop_bytes("combine(B)", same)
        back = traffic.hop_bytes("combine(F)", same)
        assert [hop.T.tolist() for hop in reversed(back)] == [hop.tolist() for hop in there]


@settings(max_examples=50, deadline=None)
@given(cases())
def test_the_node_matrix_adds_up_the_ranks_of_nodes(case: Case) -> None:
    sent = route(*case).traffic("two_hop").rank_bytes("dispatch(F)", SIZES)
    rows = case.grid.rows
    assert node_matrix(sent, case.grid).tolist() == [
        [sum(sent[r, s] for r in one for s in other) for other in rows] for one in rows
    ]


def test_one_node_has_nothing_to_send_across() -> None:
    routes = route([[[0, 1]], [[2, 3]]], ExpertLayout.contiguous(4, 2), NodeGrid.one_node(2))
    across, inside = routes.traffic("two_hop").hop_bytes("dispatch(F)", SIZES)
    assert across.sum() == inside.sum() == 0
    swapped = route([[[2, 3]], [[0, 1]]], routes.layout, routes.grid).traffic("two_hop")
    across, inside = swapped.hop_bytes("dispatch(F)", SIZES)
    assert across.sum() == 0
    assert inside.tolist() == swapped.rank_bytes("dispatch(F)", SIZES).tolist()
    assert (inside > 0).tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ([[[0]]], "1 ranks, the layout 2 and the grid 2"),
        ([[[0]], [[4]]], r"rank 1 holds experts 4\.\.4, but there are 4"),
        ([[[-2]], [[0]]], "rank 0 holds experts -2"),
        ([[[0]], [[0, 1]]], "rank 1 has 2 experts a token, that of rank 0 has 1"),
        ([[[0.5]], [[1.0]]], "must be .T, K. integers"),
        ([[0, 1], [1, 2]], "must be .T, K. integers"),
        ([np.zeros((3, 0), int)] * 2, "K from 1 up"),
    ],
)
def test_a_routing_that_makes_no_sense_is_refused(experts: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        route(experts, ExpertLayout.contiguous(4, 2), NodeGrid.one_node(2))


def test_unknown_names_are_refused_with_those_there_are() -> None:
    routes = route([[[0]]], ExpertLayout.contiguous(1, 1), NodeGrid.one_node(1))
    with pytest.raises(ValueError, match=r"no traffic of 'deep'.*two_hop"):
        routes.traffic("deep")
    with pytest.raises(ValueError, match=r"no phase 'dispatch'.*combine"):
        routes.traffic("flat").hop_bytes("dispatch", SIZES)
    with pytest.raises(ValueError, match=r"no payload 'fp4'.*fp8"):
        PayloadSizes.named("fp4")


@pytest.mark.parametrize("backend", BACKENDS)
def test_counted_bytes_are_those_that_the_dispatchers_send(ranks: RankPool, backend: str) -> None:
    # Rows are float32, so "exact" sends float32.
    payloads = {"fp32": "exact"} | {name: name for name in ("bf16", "fp8", "logfmt8", "logfmt10")}
    told = ranks.run(
        cases_traffic.bytes_sent, world=4, name=backend, payloads=list(payloads.values())
    )
    experts = [cases_traffic.experts_of(rank) for rank in range(4)]
    routes = route(experts, cases_traffic.LAYOUT, NodeGrid.of(cases_traffic.NODES))
    for index, payload in enumerate(payloads):
        sizes = RowSizes(PayloadSizes.named(payload), cases_traffic.HIDDEN)
        for phase in PHASES:
            counted = routes.traffic(backend).rank_bytes(phase, sizes)
            assert counted.any()
            sent = [by_rank[index][phase] for by_rank in told]
            assert counted.tolist() == sent, (payload, phase)


# ---- sizes of records ----


def test_records_of_v3_have_the_sizes_that_their_parts_add_up_to() -> None:
    def of(payload: str, phase: str, experts: int = 8) -> int:
        return RowSizes(PayloadSizes.named(payload), 7168).record_bytes(phase, experts, 320)

    assert of("bf16", "dispatch(F)") == 2 * 7168 + 8 * 4 + 8 * 2
    assert of("fp8", "dispatch(F)") == 7168 + 4 * 7168 // 128 + 8 * 4 + 8 * 2
    assert of("fp8", "combine(F)") == of("bf16", "combine(F)") == 2 * 7168
    assert of("logfmt8", "combine(B)") == 7168 + 8 * 7168 // 128
    assert of("logfmt10", "combine(F)") == of("logfmt10", "combine(B)") == 7168 * 5 // 4 + 8 * 56
    assert of("bf16", "dispatch(B)") == 2 * 7168 + 8 * 4
    assert of("fp8", "combine(B)") == 7168 + 4 * 7168 // 128
    # One expert: 4 + 2 bytes, and 2 up to a multiple of 4.
    assert of("fp32", "dispatch(F)", 1) == 4 * 7168 + 8


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: payload.name)
@pytest.mark.parametrize("hidden", [1, 3, 64, 130, 7168])
@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("num_slots", [8, 32768, 32769])
def test_records_are_as_long_as_those_of_the_dispatchers(
    payload: PayloadSizes, hidden: int, top_k: int, num_slots: int
) -> None:
    plain = torch.float32 if payload.name == "fp32" else torch.bfloat16
    tiles = (torch.float32, -(-hidden // 128))
    indices = torch.int16 if num_slots <= 32768 else torch.int32
    weights, slots = (torch.float32, top_k), (indices, top_k)
    gather = spread = [(plain, hidden)]
    if payload.name == "fp8":
        spread = [(torch.uint8, hidden), tiles]
    elif payload.name == "logfmt8":
        spread = [(torch.uint8, hidden), tiles, tiles]
    elif payload.name == "logfmt10":
        gather = spread = [(torch.uint8, -(-hidden // 4) * 5), tiles, tiles]
    formats = {
        "dispatch(F)": [*spread, weights, slots],
        "combine(F)": gather,
        "dispatch(B)": [*gather, weights],
        "combine(B)": spread,
    }
    for phase, parts in formats.items():
        width = RecordFormat(tuple(parts)).width
        assert RowSizes(payload, hidden).record_bytes(phase, top_k, num_slots) == width


@pytest.mark.parametrize(("num_slots", "index_bytes"), [(32768, 2), (32770, 4)])
def test_beyond_32768_slots_their_indices_take_four_bytes(num_slots: int, index_bytes: int) -> None:
    layout = ExpertLayout.contiguous(num_slots, 2)
    traffic = route([[[0, num_slots - 1]]] * 2, layout, grid_of(1, 2)).traffic("dedup")
    sent = traffic.rank_bytes("dispatch(F)", SIZES)
    assert sent[0, 1] == 2 * 64 + 2 * 4 + 2 * index_bytes


# ---- speed, and what is needed ----


@pytest.mark.alone
def test_v3s_shape_is_counted_within_about_a_second() -> None:
    experts = balanced_routing(V3, num_ranks=64, num_tokens=4096)
    layout, grid = ExpertLayout.contiguous(256, 64), grid_of(8, 8)

    def seconds() -> float:
        begin = time.process_time()
        routes: Routes = route(experts, layout, grid)
        for backend in BACKENDS:
            routes.traffic(backend).rank_bytes("dispatch(F)", SIZES)
        return time.process_time() - begin

    assert least_seconds(seconds, enough_s=1.0, tries=10) < 1.0


def test_counting_and_costs_need_no_torch() -> None:
    program = (
        "import sys\n"
        "import counterflow.comm.cost, counterflow.comm.matrix_file\n"
        "import counterflow.comm.traffic_expected, counterflow.comm.traffic_synthetic\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
