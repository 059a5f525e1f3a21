"""One hop's pieces: what is sent, in which order, and how what comes back belongs to rows."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.comm.dispatch.pieces import Piece, Splits, inverse, wanted


@st.composite
def destinations(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """A number of ranks, and each row's destinations; that number itself is none."""
    ranks, top_k = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    row = st.lists(st.integers(0, ranks), min_size=top_k, max_size=top_k)
    return ranks, draw(st.lists(row, max_size=12))


@settings(deadline=None)
@given(destinations())
def test_a_row_is_wanted_once_however_many_slots_a_rank_has(
    routing: tuple[int, list[list[int]]],
) -> None:
    ranks, rows = routing
    top_k = len(rows[0]) if rows else 2
    found = wanted(torch.tensor(rows, dtype=torch.int64).view(len(rows), top_k), ranks)
    assert found.tolist() == [[rank in row for rank in range(ranks)] for row in rows]


@settings(deadline=None)
@given(destinations(), st.integers(0, 7))
def test_rows_go_once_to_each_rank_that_wants_them_in_order(
    routing: tuple[int, list[list[int]]], start: int
) -> None:
    ranks, rows = routing
    sent = [[b for b, row in enumerate(rows) if rank in row] for rank in range(ranks)]
    mask = torch.tensor([[rank in row for rank in range(ranks)] for row in rows], dtype=torch.bool)
    splits = Splits([len(to) for to in sent], [0] * ranks)
    piece = Piece.once_each(mask.view(len(rows), ranks), start, splits)
    flat = [start + b for to in sent for b in to]
    assert piece.rows_M.tolist() == flat
    check_bags(piece, [len({r for r in row if r < ranks}) for row in rows], start)


@settings(deadline=None)
@given(destinations())
def test_rows_that_have_one_rank_go_there_and_those_without_stay(
    routing: tuple[int, list[list[int]]],
) -> None:
    ranks, rows = routing
    rank_of = [row[0] for row in rows]
    sent = [[b for b, to in enumerate(rank_of) if to == rank] for rank in range(ranks)]
    splits = Splits([len(to) for to in sent], [0] * ranks)
    piece = Piece.as_they_are(torch.tensor(rank_of, dtype=torch.int64), ranks, splits)
    assert piece.rows_M.tolist() == [b for to in sent for b in to]
    check_bags(piece, [int(to < ranks) for to in rank_of], 0)


def check_bags(piece: Piece, sizes: list[int], start: int) -> None:
    """Each row's bag has its own records, by destination."""
    at = 0
    for row, size in enumerate(sizes):
        assert piece.bags.offsets_B[row] == at
        records = piece.bags.index_M[at : at + size].tolist()
        assert [int(piece.rows_M[m]) for m in records] == [start + row] * size
        assert records == sorted(records)  # records lie by destination
        at += size
    assert sorted(piece.bags.index_M.tolist()) == list(range(at))


@settings(deadline=None)
@given(st.permutations(range(9)))
def test_a_permutation_and_its_inverse_cancel(order: list[int]) -> None:
    given_order = torch.tensor(order)
    assert given_order[inverse(given_order)].tolist() == list(range(9))


def test_splits_add_up() -> None:
    splits = Splits([3, 0, 4], [1, 2, 0])
    assert (splits.num_sent, splits.num_received) == (7, 3)
