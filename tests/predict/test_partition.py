"""Cuts of uneven models over ranks that hold one stage or several."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.parallel.schedule import Placement, build
from counterflow.predict.partition import Cut, LayerCosts, best_cut, even_cut, rank_loads

PLACEMENTS = {
    "one stage a rank": build("1f1b", ranks=4, microbatches=8).placement,
    "bidirectional": build("dualpipe", ranks=4, microbatches=8).placement,
    "there and back": build("dualpipev", ranks=2, microbatches=8).placement,
    "interleaved": build("interleaved", ranks=2, microbatches=8).placement,
}


def every_cut(layers: int, stages: int) -> list[Cut]:
    return [
        tuple(end - start for start, end in itertools.pairwise((0, *ends, layers)))
        for ends in itertools.combinations(range(1, layers), stages - 1)
    ]


def busiest(costs: LayerCosts, cut: Cut, placement: Placement) -> float:
    return max(rank_loads(costs, cut, placement))


@pytest.mark.parametrize("kind", PLACEMENTS)
@settings(max_examples=25, deadline=None)
@given(
    layers=st.integers(4, 11),
    dense=st.integers(0, 3),
    cheap=st.floats(0.3, 1.0),
    embedding=st.sampled_from((0.0, 0.05, 0.5)),
    head=st.floats(0.1, 2.5),
)
def test_no_cut_has_a_less_busy_busiest_rank(
    kind: str, layers: int, dense: int, cheap: float, embedding: float, head: float
) -> None:
    placement = PLACEMENTS[kind]
    costs = LayerCosts((cheap,) * dense + (1.0,) * (layers - dense), embedding, head)
    cut = even_cut(costs, placement)
    assert sum(cut) == layers
    assert min(cut) >= 1
    least = min(busiest(costs, one, placement) for one in every_cut(layers, 4))
    assert busiest(costs, cut, placement) == pytest.approx(least, rel=1e-9)


def test_a_rank_of_dualpipe_is_as_busy_as_both_its_stages() -> None:
    costs = LayerCosts((1.0,) * 8, 0.5, 2.0)
    loads = rank_loads(costs, (2, 3, 2, 1), PLACEMENTS["bidirectional"])
    # Half of the 8 micro-batches pass each of a rank's two stages.
    assert loads == [4 * (2.5 + 3.0), 4 * (3 + 2), 4 * (3 + 2), 4 * (2.5 + 3.0)]


def test_v3s_last_stage_is_spared_and_its_mirrors_even_that_out() -> None:
    placement = build("dualpipe", ranks=16, microbatches=120).placement
    costs = LayerCosts((0.7,) * 3 + (1.0,) * 58, 0.0, 2.2)
    cut = even_cut(costs, placement)
    assert cut[-1] < 4
    equal = (4,) * 15 + (1,)
    assert busiest(costs, cut, placement) <= busiest(costs, equal, placement)
    assert max(cut) == 4, "all of the even cuts have ranks of 8 layers at best"


def test_the_fastest_of_nearly_even_cuts_is_taken() -> None:
    placement = PLACEMENTS["one stage a rank"]
    costs = LayerCosts((1.0,) * 10, 0.0, 0.0)
    # By load (3, 3, 2, 2) in any order are as good as can be; the clock prefers one.
    wanted = (3, 2, 3, 2)
    asked: list[Cut] = []

    def makespans(cuts: Sequence[Cut]) -> list[float]:
        asked.extend(cuts)
        return [
            sum(abs(size - other) for size, other in zip(cut, wanted, strict=True)) for cut in cuts
        ]

    assert best_cut(costs, placement, makespans, [even_cut(costs, placement)]) == wanted
    assert len(asked) == len(set(asked)), "each is simulated once"
    assert all(max(cut) <= 3 for cut in asked), "only those near the even one"
