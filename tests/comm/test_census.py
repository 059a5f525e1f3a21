"""What ranks say of themselves, and what all of them then refuse together."""

from __future__ import annotations

import pytest
import torch

from counterflow.comm.dispatch.census import (
    LENGTH,
    UNKNOWN,
    Census,
    Declared,
    check_census,
    take_census,
)
from counterflow.comm.dispatch.grid import NodeGrid
from counterflow.comm.dispatch.layout import ExpertLayout
from counterflow.comm.dispatch.route import SlotTables

CPU = torch.device("cpu")
X = torch.zeros(4, 6, dtype=torch.bfloat16, requires_grad=True)
KNOWN = Declared.of(X, torch.zeros(4, 2))
FINE = Census(4, 2, KNOWN, -1, 7, 2)


def test_a_census_survives_its_line() -> None:
    grid = NodeGrid.of([0, 0, 1, 1])
    tables = SlotTables(ExpertLayout.contiguous(8, 4), grid, [0, 0, 1, 1], CPU)
    experts_TK = torch.tensor([[0, 1], [-1, 5], [2, 6], [-1, -1]])
    slots_TK = tables.slots(experts_TK, 0)
    for declared in (KNOWN, UNKNOWN, Declared(refused=1)):
        line = take_census(experts_TK, slots_TK, declared, tables.node_P1, 2)
        assert line.shape == (LENGTH,)
        assert Census.read(line.tolist()) == Census(4, 2, declared, -1, 6, 2)
    unasked = take_census(experts_TK, slots_TK, UNKNOWN, None, 2)
    assert Census.read(unasked.tolist()) == Census(4, 2, UNKNOWN, -1, 6, 0)
    empty = torch.zeros(0, 2, dtype=torch.int64)
    line = take_census(empty, empty, UNKNOWN, tables.node_P1, 2)
    assert Census.read(line.tolist()) == Census(0, 2, UNKNOWN, 0, -1, 0)


def test_what_fits_is_not_refused() -> None:
    check_census([FINE, Census(0, 2, KNOWN, 0, -1, 0)], [4, 5], 8, 2)
    check_census([FINE._replace(most_nodes=3)], [4], 8, None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"low": 0, "high": 8}, r"experts_TK of rank 5 holds experts 0\.\.8.* has 8: 0\.\.7"),
        ({"low": -2}, r"experts_TK of rank 5 holds experts -2\.\.7"),
        ({"most_nodes": 3}, "a token of rank 5 goes to 3 nodes, but node_limit is 2"),
        ({"top_k": 3}, r"ranks differ in the experts a token \(K\): 2 on rank 4, 3 on rank 5"),
        ({"declared": KNOWN._replace(refused=1)}, "rank 5 refused the tensors"),
        (
            {"declared": KNOWN._replace(hidden=5)},
            r"columns of x_TD \(D\): 6 on rank 4, 5 on rank 5",
        ),
        (
            {"declared": Declared.of(X.float(), torch.zeros(4, 2))},
            "dtype of x_TD: torch.bfloat16 on rank 4, torch.float32 on rank 5",
        ),
        (
            {"declared": Declared.of(X, torch.zeros(4, 2).double())},
            "dtype of weights_TK: torch.float32 on rank 4, torch.float64 on rank 5",
        ),
        (
            {"declared": Declared.of(X.detach(), torch.zeros(4, 2))},
            "tensors that need a gradient: x_TD on rank 4, none on rank 5",
        ),
    ],
    ids=str,
)
def test_what_a_rank_has_wrong_is_refused_with_its_global_rank(
    change: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        check_census([FINE, FINE._replace(**change)], [4, 5], 8, 2)  # pyright: ignore[reportArgumentType]


def test_nothing_needs_a_gradient_where_none_are_made() -> None:
    with torch.no_grad():
        assert Declared.of(X, torch.zeros(4, 2)).learns == Declared.of(X.detach(), X).learns == 1
