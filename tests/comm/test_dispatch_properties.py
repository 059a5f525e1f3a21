"""Random dispatches: whatever the ranks, nodes, layout and routing, the reference's bits."""

from __future__ import annotations

import pytest

from tests import cases_dispatch_sweep as cases
from tests.cases_dispatch import Setting
from tests.ranks import RankPool

# (ep, node of each rank); two_hop is drawn only where the nodes allow it.
PLACES = {
    2: [(2, (0, 1)), (2, (0, 0)), (1, (0, 0))],
    3: [(3, (0, 0, 0)), (3, (0, 1, 2)), (3, (0, 1, 1))],
    4: [
        (4, (0, 0, 1, 1)),
        (4, (0, 1, 0, 1)),
        (4, (0, 1, 2, 3)),
        (4, (0, 0, 0, 1)),
        (2, (0, 0, 1, 1)),
        (2, (0, 1, 0, 1)),
    ],
    6: [(6, (0, 0, 0, 1, 1, 1)), (6, (2, 2, 1, 1, 0, 0)), (6, (0, 1, 0, 1, 1, 0))],
    8: [(8, (0, 1, 2, 3, 0, 1, 2, 3)), (8, (0, 0, 0, 0, 1, 1, 1, 1)), (4, (0, 1, 0, 1) * 2)],
}


@pytest.mark.parametrize(("world", "count"), [(2, 20), (3, 10), (4, 60), (6, 10), (8, 10)])
def test_random_dispatches_are_bit_for_bit_the_reference(
    ranks: RankPool, world: int, count: int
) -> None:
    """Rows, tiles, weights, counts, sums, gradients, bytes sent, and the node limit."""
    places = PLACES[world]
    found = ranks.run(cases.sweep, world=world, places=places, seeds=range(count))
    assert found == [[]] * world


@pytest.mark.parametrize("nodes", [(0, 0, 1, 1), (0, 1, 0, 1)])
def test_cutting_tokens_in_pieces_changes_no_bit(ranks: RankPool, nodes: tuple[int, ...]) -> None:
    # Four pieces of at least 256 tokens on the busiest rank; all ranks make as many.
    tokens = (1030, 700, 1, 0)
    setting = Setting("two_hop", nodes)
    for pieces, same in ranks.run(cases.in_pieces, world=4, setting=setting, tokens=tokens):
        assert pieces == [1, 2, 4]
        assert same


def test_few_tokens_make_one_piece(ranks: RankPool) -> None:
    setting = Setting("two_hop", (0, 0, 1, 1))
    for pieces, same in ranks.run(cases.in_pieces, world=4, setting=setting, tokens=(511,) * 4):
        assert pieces == [1, 1, 1]
        assert same
