"""The search's two kinds of change against plain loops, which try every single one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from counterflow.comm.dispatch.packing_search import (
    COPY_GAIN,
    SWAP_GAIN,
    Packings,
    improve,
    reassign_best,
    swap_best,
)

Packing = list[list[int]]  # the experts of each rank


def loads_of(load: list[float], packing: Packing) -> list[float]:
    every = [expert for rank in packing for expert in rank]
    return [sum(load[e] / every.count(e) for e in rank) for rank in packing]


def heaviest_of(load: list[float], packing: Packing) -> int:
    found = loads_of(load, packing)
    return found.index(max(found))


def heaviest_alone(load: list[float], packing: Packing) -> float:
    """The heaviest load. Of two ranks that have it but for rounding, each way may take another one,
    so such a packing is left out."""
    found = loads_of(load, packing)
    assume(sum(one > max(found) * (1 - 1e-9) for one in found) == 1)
    return max(found)


def changed(packing: Packing, *changes: tuple[int, int, int]) -> Packing:
    """With other experts at some (rank, slot)."""
    copy = [list(rank) for rank in packing]
    for rank, slot, expert in changes:
        copy[rank][slot] = expert
    return copy


def swaps(load: list[float], packing: Packing) -> Iterator[tuple[Packing, float]]:
    """Every swap of a copy of the heaviest rank, and the heavier of its two ranks then."""
    heavy = heaviest_of(load, packing)
    for mine, expert in enumerate(packing[heavy]):
        for rank, others in enumerate(packing):
            for slot, other in enumerate(others):
                if expert not in others and other not in packing[heavy]:
                    after = changed(packing, (heavy, mine, other), (rank, slot, expert))
                    found = loads_of(load, after)
                    yield after, max(found[heavy], found[rank])


def reassignments(load: list[float], packing: Packing) -> Iterator[tuple[Packing, float]]:
    """Every copy of the heaviest rank's experts in place of another expert's, and the heaviest of
    the ranks that it touches then."""
    heavy = heaviest_of(load, packing)
    every = [expert for rank in packing for expert in rank]
    for new in packing[heavy]:
        for rank, experts in enumerate(packing):
            for slot, old in enumerate(experts):
                if every.count(old) > 1 and new not in experts:
                    after = changed(packing, (rank, slot, new))
                    found = loads_of(load, after)
                    yield (
                        after,
                        max(
                            found[r]
                            for r, has in enumerate(packing)
                            if r == rank or {old, new} & {*has}
                        ),
                    )


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[float], Packing]:
    num_ranks, per_rank = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    num_slots = num_ranks * per_rank
    num_experts = draw(st.integers(1, num_slots))
    more = st.integers(0, num_experts - 1)
    rest = draw(st.lists(more, min_size=num_slots - num_experts, max_size=num_slots - num_experts))
    slots = draw(st.permutations([*range(num_experts), *rest]))
    load = draw(st.lists(st.integers(0, 50), min_size=num_experts, max_size=num_experts))
    rows = [list(slots[r * per_rank : (r + 1) * per_rank]) for r in range(num_ranks)]
    return [float(one) for one in load], rows


def together(cases: list[tuple[list[float], Packing]]) -> Packings:
    load, slots = ([case[i] for case in cases] for i in (0, 1))
    return Packings.of(np.array(load, dtype=np.float64), np.array(slots))


@settings(max_examples=200, deadline=None)
@given(packings())
@pytest.mark.parametrize(
    ("step", "candidates", "gain"),
    [(swap_best, swaps, SWAP_GAIN), (reassign_best, reassignments, COPY_GAIN)],
)
def test_each_step_is_the_best_that_trying_all_of_them_finds(
    step: Any, candidates: Any, gain: float, case: tuple[list[float], Packing]
) -> None:
    load, packing = case
    peak = heaviest_alone(load, packing)
    every = list(candidates(load, packing))
    best = min((value for _, value in every), default=float("inf"))
    enough = peak * (1 - gain)
    assume(abs(best - enough) > 1e-9 * peak)
    state = together([case])
    (done,) = step(state)
    assert done == (best < enough)
    after = state.slots_XRP[0].tolist()
    if done:
        values = [value for other, value in every if other == after]
        assert values
        assert min(values) == pytest.approx(best, rel=1e-9, abs=1e-12)
    else:
        assert after == packing


@settings(max_examples=50, deadline=None)
@given(packings())
def test_the_search_ends_where_no_single_change_helps(case: tuple[list[float], Packing]) -> None:
    load, packing = case
    slots_XRP = improve(np.array([load]), np.array([packing]))
    after = slots_XRP[0].tolist()
    assert max(loads_of(load, after)) <= max(loads_of(load, packing)) * (1 + 1e-12)
    peak = heaviest_alone(load, after)
    for candidates, gain in ((swaps, SWAP_GAIN), (reassignments, COPY_GAIN)):
        for _, value in candidates(load, after):
            assert value >= peak * (1 - gain) * (1 - 1e-9)


def test_a_step_changes_only_the_packings_that_it_can_better() -> None:
    good, bad = [[0, 1], [2, 3]], [[0, 1], [2, 3]]
    cases = [([2.0, 2.0, 2.0, 2.0], good), ([4.0, 3.0, 1.0, 2.0], bad)]
    state = together(cases)
    assert swap_best(state).tolist() == [False, True]
    assert state.slots_XRP[0].tolist() == good
    assert sorted(loads_of(cases[1][0], state.slots_XRP[1].tolist())) == [5.0, 5.0]
