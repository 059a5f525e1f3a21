"""From records to rows and back, against loops."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.comm.dispatch.expand import Expansion, places


class Received(NamedTuple):
    """Records that reached a rank: local slots of their choices, `num_slots` for elsewhere."""

    num_slots: int
    top_k: int
    local: list[list[int]]
    place: list[int] | None
    alignment: int


@st.composite
def received(draw: st.DrawFn) -> Received:
    num_slots, top_k = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    record = st.lists(st.integers(0, num_slots), min_size=top_k, max_size=top_k)
    local = draw(st.lists(record, max_size=9))
    order = draw(st.none() | st.permutations(range(len(local))))
    alignment = draw(st.sampled_from([1, 2, 4, 128]))
    return Received(num_slots, top_k, local, order, alignment)


def rows_by_loop(r: Received) -> list[tuple[int, int] | None]:
    """(record, choice) of each row; None for padding."""
    place = r.place or list(range(len(r.local)))
    rows: list[tuple[int, int] | None] = []
    for slot in range(r.num_slots):
        found = [
            (m, k)
            for m in sorted(range(len(r.local)), key=place.__getitem__)
            for k in range(r.top_k)
            if r.local[m][k] == slot
        ]
        rows += [*found, *[None] * (-len(found) % r.alignment)]
    return rows


def expansion_of(r: Received) -> Expansion:
    entries = [sum(row.count(slot) for row in r.local) for slot in range(r.num_slots)]
    local_MK = torch.tensor(r.local, dtype=torch.int64).view(len(r.local), r.top_k)
    place_M = None if r.place is None else torch.tensor(r.place, dtype=torch.int64)
    return Expansion.of(local_MK, entries, place_M, r.alignment)


@settings(deadline=None)
@given(received())
def test_rows_are_grouped_by_slot_then_by_place_then_by_choice(r: Received) -> None:
    expansion, rows = expansion_of(r), rows_by_loop(r)
    assert len(expansion.record_N) == len(rows)
    values = 1.0 + torch.arange(float(len(r.local) * r.top_k)).view(len(r.local), r.top_k)
    expected = [0.0 if row is None else float(values[row]) for row in rows]
    assert expansion.choices(values).tolist() == expected
    of_record = values[:, :1].contiguous()
    expected = [[0.0] if row is None else of_record[row[0]].tolist() for row in rows]
    assert expansion.rows(of_record).tolist() == expected


@settings(deadline=None)
@given(received())
def test_a_records_rows_are_added_by_choice_and_padding_is_not(r: Received) -> None:
    expansion, rows = expansion_of(r), rows_by_loop(r)
    random = torch.Generator().manual_seed(0)
    values = torch.randn(len(rows), 3, generator=random)
    for n, row in enumerate(rows):
        if row is None:
            values[n] = torch.nan
    expected = torch.zeros(len(r.local), 3)
    for m in range(len(r.local)):
        for k in range(r.top_k):
            if (m, k) in rows:
                expected[m] += values[rows.index((m, k))]
    assert torch.equal(expansion.sum(values, torch.float32), expected)


@settings(deadline=None)
@given(received())
def test_values_of_rows_go_back_to_their_choices(r: Received) -> None:
    expansion, rows = expansion_of(r), rows_by_loop(r)
    values = torch.arange(1.0, len(rows) + 1)
    expected = torch.zeros(len(r.local), r.top_k)
    for n, row in enumerate(rows):
        if row is not None:
            expected[row] = values[n]
    assert torch.equal(expansion.unchoose(values, r.top_k), expected)


@settings(deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda sources: st.tuples(
            st.permutations(range(sources)),
            st.lists(
                st.lists(st.integers(0, 3), min_size=sources, max_size=sources),
                min_size=1,
                max_size=4,
            ),
        )
    )
)
def test_records_take_the_places_of_their_sources(
    case: tuple[list[int], list[list[int]]],
) -> None:
    arrival, sizes = case
    arrived = [
        (source, piece, i)
        for piece, of_source in enumerate(sizes)
        for source in arrival
        for i in range(of_source[source])
    ]
    found = places(sizes, arrival, torch.device("cpu")).tolist()
    assert found == [sorted(arrived).index(record) for record in arrived]
