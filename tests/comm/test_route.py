"""Preprocessing: slots of choices, and counts of records, as loops over tokens find them."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from counterflow.comm.dispatch.census import UNKNOWN, take_census
from counterflow.comm.dispatch.grid import NodeGrid
from counterflow.comm.dispatch.layout import ExpertLayout
from counterflow.comm.dispatch.pieces import wanted
from counterflow.comm.dispatch.reference import Origin, Reference
from counterflow.comm.dispatch.route import (
    Counts,
    Plan,
    SlotTables,
    count_by_piece,
    count_entries,
    piece_bounds,
)
from counterflow.comm.dispatch.sizes import TOKENS_A_PIECE

CPU = torch.device("cpu")
GRIDS = {
    "one node": NodeGrid.one_node(4),
    "a rank a node": NodeGrid.of([0, 1, 2, 3]),
    "2 x 2": NodeGrid.of([0, 0, 1, 1]),
    "2 x 2 in turn": NodeGrid.of([0, 1, 0, 1]),
    "2 x 3": NodeGrid.of([0, 0, 0, 1, 1, 1]),
    "3 x 2 in turn": NodeGrid.of([0, 1, 2, 0, 1, 2]),
}


@pytest.mark.parametrize(
    "slots", [tuple(range(8)), (3, 1, 0, 2, 7, 6, 5, 4), (0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 5, 3)]
)
def test_a_choices_slot_is_the_layouts_and_copies_take_turns(slots: tuple[int, ...]) -> None:
    layout = ExpertLayout(8, 4, slots)
    made = torch.Generator().manual_seed(0)
    experts_TK = torch.randint(-1, 8, (20, 3), generator=made)
    tables = SlotTables(layout, GRIDS["2 x 2"], [0, 0, 1, 1], CPU)
    for source in range(4):
        reference = Reference("flat", layout, GRIDS["2 x 2"], [experts_TK] * 4)
        found = tables.slots(experts_TK, source)
        for t in range(20):
            for k in range(3):
                assert found[t, k] == reference.slot(Origin(source, t, k))


def test_an_index_out_of_range_has_no_slot_and_so_harms_no_table() -> None:
    for slots in (tuple(range(4)), (3, 2, 1, 0)):
        tables = SlotTables(ExpertLayout(4, 2, slots), NodeGrid.one_node(2), [0, 0], CPU)
        found = tables.slots(torch.tensor([[4, -2, 1 << 40, -(1 << 40)]]), 0)
        assert found.tolist() == [[-1] * 4]


@pytest.mark.parametrize("name", GRIDS)
def test_tables_say_where_slots_are_and_their_last_entry_is_nowhere(name: str) -> None:
    grid = GRIDS[name]
    layout = ExpertLayout.contiguous(2 * grid.num_ranks, grid.num_ranks)
    nodes = [7 - rank % 3 for rank in range(grid.num_ranks)]  # on the machine, not in the grid
    tables = SlotTables(layout, grid, nodes, CPU)
    assert tables.order_R.tolist() == list(grid.order)
    for slot in range(layout.num_slots):
        rank = slot // 2
        assert tables.host_P1[slot] == rank % 3
        assert grid.order[int(tables.rank_P1[slot])] == rank
        assert tables.node_P1[slot] == grid.node_of(rank)
        assert tables.index_P1[slot] == grid.index_of(rank)
    assert tables.host_P1[-1] == tables.num_hosts == min(3, grid.num_ranks)
    assert tables.rank_P1[-1] == grid.num_ranks
    assert tables.node_P1[-1] == grid.num_nodes
    assert tables.index_P1[-1] == grid.ranks_per_node


@pytest.mark.parametrize(("rows", "pieces"), [(0, 4), (3, 4), (10, 1), (1030, 4), (7, 2)])
def test_pieces_are_nearly_equal_and_cover_all_rows(rows: int, pieces: int) -> None:
    bounds = piece_bounds(rows, pieces)
    sizes = [b - a for a, b in pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(sizes)) == (0, rows, pieces)
    assert max(sizes) - min(sizes) <= 1
    mask = torch.ones(rows, 2, dtype=torch.bool)
    assert count_by_piece(mask, pieces).tolist() == [[size, size] for size in sizes]


def test_entries_are_counted_by_slot_and_no_expert_is_not() -> None:
    slots_TK = torch.tensor([[0, 2, -1], [2, 2, 4]])
    assert count_entries(slots_TK, 6).tolist() == [1, 0, 3, 0, 1, 0]
    assert count_entries(torch.zeros(0, 3, dtype=torch.int64), 2).tolist() == [0, 0]


def told_to_all(
    grid: NodeGrid, layout: ExpertLayout, experts: list[Tensor], pieces: int
) -> list[Counts]:
    """The counts of all ranks, exchanged by hand."""
    tables = SlotTables(layout, grid, [0] * grid.num_ranks, CPU)
    lines, firsts, plans = [], [], []
    for rank, experts_TK in enumerate(experts):
        plan = Plan(grid, rank, layout.slots_per_rank, pieces)
        slots_TK = tables.slots(experts_TK, rank)
        final_CR = count_by_piece(wanted(tables.rank_P1[slots_TK], grid.num_ranks), plan.num_pieces)
        first_CG = final_CR
        if plan.two_hops:
            to_nodes = wanted(tables.node_P1[slots_TK], grid.num_nodes)
            first_CG = count_by_piece(to_nodes, plan.num_pieces)
        census = take_census(experts_TK, slots_TK, UNKNOWN, tables.node_P1, grid.num_nodes)
        entries_P = count_entries(slots_TK, layout.num_slots)
        lines.append(plan.lines(census, first_CG, final_CR, entries_P, tables))
        firsts.append(first_CG)
        plans.append(plan)
    return [
        plan.read(torch.stack([line[rank] for line in lines]), firsts[rank])
        for rank, plan in enumerate(plans)
    ]


@pytest.mark.parametrize("tokens", [6, 4 * TOKENS_A_PIECE + 3])
@pytest.mark.parametrize("name", GRIDS)
def test_every_rank_learns_what_loops_over_all_tokens_find(name: str, tokens: int) -> None:
    grid = GRIDS[name]
    ranks, draw = grid.num_ranks, random.Random(name)
    slots = [*range(2 * ranks), *draw.choices(range(2 * ranks), k=ranks)]
    draw.shuffle(slots)
    layout = ExpertLayout(2 * ranks, ranks, tuple(slots))
    counts = [tokens, 0, 1, *draw.choices(range(tokens + 1), k=ranks - 3)]
    made = torch.Generator().manual_seed(1)
    experts = [torch.randint(-1, 2 * ranks, (T, 3), generator=made) for T in counts]
    found = told_to_all(grid, layout, experts, 4)
    two_hops = grid.num_nodes > 1 and grid.ranks_per_node > 1
    pieces = 4 if two_hops and tokens > 6 else 1
    tables = SlotTables(layout, grid, [0] * ranks, CPU)
    # to[a][t]: the ranks of token t of rank a.
    to = [
        [{slot // 3 for slot in row if slot >= 0} for row in tables.slots(experts_TK, a).tolist()]
        for a, experts_TK in enumerate(experts)
    ]

    def cut(a: int, c: int) -> list[set[int]]:
        bounds = piece_bounds(len(to[a]), pieces)
        return to[a][bounds[c] : bounds[c + 1]]

    for rank, counts_here in enumerate(found):
        assert len(counts_here.hops) == (2 if two_hops else 1)
        assert [census.num_tokens for census in counts_here.ranks] == counts
        reference = Reference("dedup", layout, grid, experts)
        assert counts_here.entries == reference.counts[rank]
        for c in range(pieces):
            from_source = [sum(rank in ranks_ for ranks_ in cut(a, c)) for a in range(ranks)]
            assert counts_here.from_source[c] == from_source
            if not two_hops:
                sent = [sum(b in ranks_ for ranks_ in cut(rank, c)) for b in range(ranks)]
                assert counts_here.hops[0][c].sent == sent
                assert counts_here.hops[0][c].received == from_source
                continue
            check_two_hops(counts_here, grid, rank, c, [cut(a, c) for a in range(ranks)])
        assert all(len(hop) == pieces for hop in counts_here.hops)


def check_two_hops(
    found: Counts, grid: NodeGrid, rank: int, c: int, to: list[list[set[int]]]
) -> None:
    node, index = grid.rows[grid.node_of(rank)], grid.index_of(rank)
    rail = [row[index] for row in grid.rows]

    def crossing(a: int, row: tuple[int, ...]) -> int:
        return sum(bool(ranks & set(row)) for ranks in to[a])

    def within(middle: int, last: int) -> int:
        """Records that arrived at `middle` over its rail and go on to `last`."""
        sources = [row[grid.index_of(middle)] for row in grid.rows]
        return sum(last in ranks for a in sources for ranks in to[a])

    first, second = found.hops[0][c], found.hops[1][c]
    assert first.sent == [crossing(rank, row) for row in grid.rows]
    assert first.received == [crossing(a, node) for a in rail]
    assert second.sent == [within(rank, b) for b in node]
    assert second.received == [within(b, rank) for b in node]
