"""The reference itself, on an example small enough to follow by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from counterflow.comm.dispatch import ExpertLayout
from counterflow.comm.dispatch.grid import NodeGrid
from counterflow.comm.dispatch.reference import Origin, Reference

# Four ranks on two nodes, two experts each: expert e is on rank e // 2, rank r on node r // 2.
LAYOUT = ExpertLayout.contiguous(8, 4)
GRID = NodeGrid.of([0, 0, 1, 1])
# Rank 0 has two tokens, rank 1 none, rank 2 one, rank 3 one without expert.
EXPERTS = [[[7, 4, 6, 1], [0, -1, 1, 0]], [], [[5, 0, 3, 2]], [[-1, -1, -1, -1]]]


def reference(name: Any, **options: Any) -> Reference:
    experts = [torch.tensor(rows, dtype=torch.int64).view(len(rows), 4) for rows in EXPERTS]
    return Reference(name, LAYOUT, GRID, experts, **options)


@pytest.mark.parametrize("name", ["flat", "dedup", "two_hop"])
def test_rows_are_ordered_by_slot_source_token_and_choice(name: str) -> None:
    r = reference(name)
    assert r.origins == [
        [Origin(0, 1, 0), Origin(0, 1, 3), Origin(2, 0, 1), Origin(0, 0, 3), Origin(0, 1, 2)],
        [Origin(2, 0, 3), Origin(2, 0, 2)],
        [Origin(0, 0, 1), Origin(2, 0, 0)],
        [Origin(0, 0, 2), Origin(0, 0, 0)],
    ]
    assert r.counts == [[3, 2], [1, 1], [1, 1], [1, 1]]


def test_padding_ends_each_slot_and_is_zero() -> None:
    r = reference("dedup", alignment=2)
    assert r.counts == [[4, 2], [2, 2], [2, 2], [2, 2]]
    x = [torch.full((len(rows), 1), 1.0 + rank) for rank, rows in enumerate(EXPERTS)]
    assert [rows.flatten().tolist() for rows in r.spread(x)] == [
        [1, 1, 3, 0, 1, 1],
        [3, 0, 3, 0],
        [1, 0, 3, 0],
        [1, 0, 1, 0],
    ]
    weights = [torch.arange(4.0).expand(len(rows), 4) for rows in EXPERTS]
    assert r.spread_weights(weights)[0].tolist() == [0, 3, 1, 0, 3, 2]
    back = r.gather_weights(r.spread_weights(weights))
    assert back[0].tolist() == [[0, 1, 2, 3], [0, 0, 2, 3]]


def test_records_follow_the_hops() -> None:
    # Token (0, 0): ranks 3, 2, 3, 0. Token (0, 1): rank 0 three times. Token (2, 0): 2, 0, 1, 1.
    assert reference("flat").records() == [
        [0, 0, 1, 2],
        [0, 0, 0, 0],
        [1, 2, 0, 0],
        [0, 0, 0, 0],
    ]
    assert reference("dedup").records() == [
        [0, 0, 1, 1],
        [0, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 0, 0],
    ]
    # (0, 0) crosses to rank 2, which hands it on to 3; (2, 0) crosses to rank 0, which serves 1.
    assert reference("two_hop").records() == [
        [0, 1, 1, 0],
        [0, 0, 0, 0],
        [1, 0, 0, 1],
        [0, 0, 0, 0],
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # In bfloat16 256 + 1 is 256, and 258 is there. The rows of token (0, 0) are 256 (rank 3),
        # 1 (rank 2), 1 (rank 3), -256 (rank 0).
        ("flat", 2.0),  # ((256 + 1) + 1) - 256, and one rounding at the end
        ("dedup", 1.0),  # rank 3's 256 + 1 is rounded to 256; then -256 + 1 + 256
        ("two_hop", 0.0),  # and node 1's 1 + 256 too; then -256 + 256
    ],
)
def test_sums_are_rounded_where_rows_meet(name: str, expected: float) -> None:
    r = reference(name)
    value = {Origin(0, 0, 0): 256.0, Origin(0, 0, 1): 1.0, Origin(0, 0, 2): 1.0}
    value[Origin(0, 0, 3)] = -256.0
    rows = [
        torch.tensor([[0.0 if o is None else value.get(o, 0.0)] for o in origins]).bfloat16()
        for origins in r.origins
    ]
    found = r.gather(rows)
    assert found[0].dtype == torch.bfloat16
    assert found[0].tolist() == [[expected], [0.0]]
    assert found[1].shape == (0, 1)
    assert found[3].tolist() == [[0.0]]


def test_copies_of_an_expert_take_tokens_in_turn_by_token_and_source() -> None:
    layout = ExpertLayout(2, 2, (0, 1, 0, 1))
    experts = [torch.tensor([[0], [0], [1]]), torch.tensor([[0], [0], [1]])]
    r = Reference("dedup", layout, NodeGrid.one_node(2), experts)
    assert [[r.slot(Origin(s, t, 0)) for t in range(3)] for s in range(2)] == [[0, 2, 1], [2, 0, 3]]
