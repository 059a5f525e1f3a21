"""Where experts and ranks are: ExpertLayout and NodeGrid."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.comm.dispatch.grid import NodeGrid
from counterflow.comm.dispatch.layout import ExpertLayout


@st.composite
def layouts(draw: st.DrawFn) -> ExpertLayout:
    num_ranks, per_rank = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    num_slots = num_ranks * per_rank
    num_experts = draw(st.integers(1, num_slots))
    more = draw(
        st.lists(
            st.integers(0, num_experts - 1),
            min_size=num_slots - num_experts,
            max_size=num_slots - num_experts,
        )
    )
    slots = draw(st.permutations([*range(num_experts), *more]))
    return ExpertLayout(num_experts, num_ranks, tuple(slots))


@given(layouts())
def test_slots_copies_and_ranks_tell_the_same(layout: ExpertLayout) -> None:
    listed = [e for rank in range(layout.num_ranks) for e in layout.experts_of(rank)]
    assert tuple(listed) == layout.slots
    assert sorted(slot for slots in layout.copies for slot in slots) == list(
        range(layout.num_slots)
    )
    for expert, slots in enumerate(layout.copies):
        assert slots
        assert list(slots) == sorted(slots)
        for slot in slots:
            rank = layout.rank_of(slot)
            assert layout.experts_of(rank)[slot - rank * layout.slots_per_rank] == expert


@given(layouts())
def test_a_layout_is_redundant_where_an_expert_has_two_slots(layout: ExpertLayout) -> None:
    assert layout.is_redundant == any(len(slots) > 1 for slots in layout.copies)


def test_a_contiguous_layout_gives_each_rank_a_run_of_experts() -> None:
    layout = ExpertLayout.contiguous(8, 4)
    assert layout.is_contiguous
    assert not layout.is_redundant
    assert [layout.experts_of(rank) for rank in range(4)] == [
        range(2), range(2, 4), range(4, 6), range(6, 8),
    ]  # fmt: skip


def test_experts_out_of_order_are_not_a_range() -> None:
    layout = ExpertLayout(4, 2, (1, 0, 2, 3))
    assert not layout.is_contiguous
    assert layout.experts_of(0) == (1, 0)
    assert layout.experts_of(1) == range(2, 4)


def test_equal_layouts_are_equal_and_hash_alike() -> None:
    first, second = ExpertLayout(2, 2, (0, 1)), ExpertLayout.contiguous(2, 2)
    assert first == second
    assert first.copies == ((0,), (1,))
    assert len({first, second}) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0, 1, ()), "at least one expert"),
        ((2, 0, (0, 1)), "at least one expert and one rank"),
        ((3, 2, (0, 1, 2)), "do not divide among 2 ranks"),
        ((2, 2, ()), "do not divide among 2 ranks"),
        ((2, 2, (0, 2)), "name expert 2"),
        ((2, 2, (0, -1)), "name expert -1"),
        ((3, 2, (0, 1, 1, 0)), "no slot for expert 2"),
    ],
)
def test_a_layout_that_does_not_exist_is_refused(
    arguments: tuple[int, int, tuple[int, ...]], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        ExpertLayout(*arguments)


@pytest.mark.parametrize("num_ranks", [0, 3])
def test_experts_that_do_not_divide_have_no_contiguous_layout(num_ranks: int) -> None:
    with pytest.raises(ValueError, match="redundant experts, or another number of ranks"):
        ExpertLayout.contiguous(8, num_ranks)


@given(st.integers(1, 5), st.integers(1, 5), st.randoms())
def test_a_grid_has_each_rank_once_on_its_node(
    num_nodes: int, per_node: int, random: Random
) -> None:
    nodes = [10 * n for n in range(num_nodes)] * per_node
    random.shuffle(nodes)
    grid = NodeGrid.of(nodes)
    assert (grid.num_nodes, grid.ranks_per_node) == (num_nodes, per_node)
    assert sorted(grid.order) == list(range(grid.num_ranks))
    for rank, node in enumerate(nodes):
        row = grid.rows[grid.node_of(rank)]
        assert row[grid.index_of(rank)] == rank
        assert list(row) == [r for r, other in enumerate(nodes) if other == node]


def test_nodes_come_in_the_order_of_their_first_rank() -> None:
    assert NodeGrid.of([7, 2, 7, 2]).rows == ((0, 2), (1, 3))


def test_a_grid_of_one_node_has_every_rank_side_by_side() -> None:
    assert NodeGrid.one_node(3) == NodeGrid.of([0, 0, 0]) == NodeGrid(((0, 1, 2),))


def test_nodes_of_unequal_size_are_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"2 on node 0, 1 on node 1.*'dedup'"):
        NodeGrid.of([0, 0, 1])


@pytest.mark.parametrize("rows", [(), ((),), ((0, 1), (2,)), ((0, 1), (1, 2)), ((1, 2),)])
def test_rows_that_are_no_grid_are_refused(rows: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="each ep rank once"):
        NodeGrid(rows)


def test_a_rank_outside_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ep rank 4 is not in the grid's 0\.\.3"):
        NodeGrid.of([0, 0, 1, 1]).index_of(4)
