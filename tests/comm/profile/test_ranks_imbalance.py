"""How unevenly routing loads the ranks, by what traces tell of it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.comm.profile.trace import Exchange
from tests.comm.profile.constructed import Step, compared, traces_of

Rows = list[list[int]]  # rows[sender][receiver]

rows_of_three = st.lists(
    st.lists(st.integers(0, 4096), min_size=3, max_size=3), min_size=3, max_size=3
)


def all_to_all(rows: Rows, sequence: int, element_bytes: int | None) -> list[Exchange]:
    ranks = range(len(rows))
    sent = [tuple(rows[rank]) for rank in ranks]
    received = [tuple(rows[other][rank] for other in ranks) for rank in ranks]
    return [
        Exchange(
            "all_to_allv",
            sent_bytes=sum(sent[rank]) * element_bytes if element_bytes else None,
            received_bytes=sum(received[rank]) * element_bytes if element_bytes else None,
            group="ep",
            group_size=len(rows),
            sequence=sequence,
            sent_splits=sent[rank],
            received_splits=received[rank],
        )
        for rank in ranks
    ]


@given(
    batches=st.lists(st.tuples(st.integers(0, 2), rows_of_three), min_size=1, max_size=6),
    element_bytes=st.sampled_from((None, 1, 2)),
)
@settings(max_examples=50, deadline=None)
def test_loads_are_what_each_rank_received_in_dispatch(
    batches: list[tuple[int, Rows]], element_bytes: int | None
) -> None:
    steps: list[Step] = []
    loads: dict[int, list[int]] = {}
    for number, (layer, rows) in enumerate(batches):
        there = all_to_all(rows, 2 * number, element_bytes)
        back = all_to_all([list(column) for column in zip(*rows, strict=True)], 2 * number + 1, 2)
        steps.append(Step([10, 20, 30], 5, f"dispatch(F) layer {layer}", "", there))
        # What comes back is as uneven as what the ranks sent, which is not the experts' load.
        steps.append(Step([10, 20, 30], 5, f"combine(F) layer {layer}", "", back))
        mine = loads.setdefault(layer, [0, 0, 0])
        for receiver in range(3):
            mine[receiver] += sum(row[receiver] for row in rows) * (element_bytes or 1)
    found = compared(traces_of(steps)).imbalance
    uneven = {layer: mine for layer, mine in sorted(loads.items()) if sum(mine)}
    if not uneven:
        assert found is None
        return
    assert found is not None
    assert found.measure == ("bytes received" if element_bytes else "elements received")
    assert found.phase == "dispatch(F)"
    assert {one.layer: list(one.loads) for one in found.layers} == uneven
    for one in found.layers:
        assert one.ranks == (0, 1, 2)
        assert one.ratio == max(one.loads) * 3 / sum(one.loads)
    assert found.worst.ratio == max(one.ratio for one in found.layers)
    # The layers run one after the other, each as long as its busiest rank.
    assert found.overall * sum(map(sum, uneven.values())) / 3 == sum(map(max, uneven.values())) or (
        abs(found.overall * sum(map(sum, uneven.values())) / 3 - sum(map(max, uneven.values())))
        < 1e-9 * sum(map(max, uneven.values()))  # two roundings of a quotient
    )


def test_an_inferred_dispatch_will_do_and_so_will_all_to_alls_in_no_phase() -> None:
    parts = all_to_all([[1, 3], [2, 2]], 0, None)
    unmarked = compared(traces_of([Step([10, 20], 5, "", "", parts)])).imbalance
    assert unmarked is not None
    assert (unmarked.phase, unmarked.layers[0].loads) == ("dispatch", (3, 5))
    outside = compared(traces_of([Step([10, 20], 5, "", "mlp(F)", parts)])).imbalance
    assert outside is not None
    assert (outside.phase, outside.layers[0].loads) == ("", (3, 5))


def test_where_nothing_tells_what_was_received_the_experts_time_stands_in_and_is_named() -> None:
    steps = [
        Step([100, 300], 5, "combine(F) layer 0", "mlp(F) layer 0"),
        Step([200, 200], 5, "combine(F) layer 1", "mlp(F) layer 1"),
        Step([999, 1], 5, "dispatch(F) layer 1", "attn(F) layer 1"),
    ]
    found = compared(traces_of(steps)).imbalance
    assert found is not None
    assert (found.measure, found.phase) == ("ns of computation", "mlp(F)")
    assert [(one.layer, one.loads, one.ratio) for one in found.layers] == [
        (0, (100, 300), 1.5),
        (1, (200, 200), 1.0),
    ]
    assert found.overall == 500 / 400


def test_nothing_is_said_of_imbalance_where_nothing_tells_it() -> None:
    found = compared(traces_of([Step([100, 300], 5, "dispatch(F) layer 0", "attn(F) layer 0")]))
    assert found.imbalance is None
