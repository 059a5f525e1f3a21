"""The search for the best order of a pair's phases."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.parallel.schedule.interleaving import PUBLISHED_ORDER, Interleaving, PhaseOutline
from counterflow.parallel.simulate.orders import best_order, pair_time
from counterflow.parallel.simulate.phases import NAMES, Phases, duration

times = st.fixed_dictionaries({name: st.integers(0, 9).map(float) for name in NAMES})


@settings(max_examples=60, deadline=None)
@given(times, st.integers(1, 3))
def test_a_pair_takes_as_long_as_the_simulation_says(given_times: dict[str, float], n: int) -> None:
    phases = Phases(given_times)
    assert pair_time(PUBLISHED_ORDER, given_times, n) == duration(phases.pair(n, n))


@settings(max_examples=8, deadline=None)
@given(times)
def test_no_order_is_faster_than_the_one_found(given_times: dict[str, float]) -> None:
    found = best_order(given_times, layers=2)
    phases = Phases(given_times, order=found.order)
    assert found.time == duration(phases.pair(2, 2)) <= found.published
    assert found.bound <= found.time
    compute = [n for n in NAMES if not n.startswith(("dispatch", "combine"))]
    # Each lane in any order, by brute force: those that the constructor accepts.
    for one in itertools.islice(itertools.permutations(compute), 0, 720, 7):
        merged = [*one]
        for name in ("combine(B)", "dispatch(F)", "dispatch(B)", "combine(F)"):
            after = {"combine(B)": None, "dispatch(F)": "attn(F)", "dispatch(B)": "mlp(B)"}
            need = after.get(name, "mlp(F)")
            merged.insert(0 if need is None else merged.index(need) + 1, name)
        try:
            other = Phases(given_times, order=merged)
        except ValueError:
            continue
        assert duration(other.pair(2, 2)) >= found.time


def test_where_the_published_order_is_perfect_it_is_kept() -> None:
    found = best_order(dict.fromkeys(NAMES, 1.0))
    assert found.order == PUBLISHED_ORDER
    assert found.time == found.published == found.bound == 24


def test_a_better_order_is_found_and_can_be_executed() -> None:
    slow = dict.fromkeys(NAMES, 1.0) | {"combine(F)": 4.0}
    found = best_order(slow)
    assert found.time < found.published
    phases = ("attn", "dispatch", "mlp", "combine")
    layer = [PhaseOutline(name, name in ("dispatch", "combine")) for name in phases]
    assert len(Interleaving(pair=found.order).arrange([layer], [layer])) == len(NAMES)


def test_shared_experts_apart_may_hide_what_they_could_not_before() -> None:
    together = dict.fromkeys(NAMES, 1.0) | {"mlp(F)": 3.0, "dispatch(F)": 4.0, "combine(B)": 4.0}
    apart = together | {"mlp(F)": 1.0, "shared(F)": 2.0}
    one, other = best_order(together, layers=1), best_order(apart, layers=1)
    assert other.time < one.time


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"mlp(G)": 1.0}, "mlp"),
        ({"mlp(F)": -1.0}, r"mlp\(F\)"),
    ],
)
def test_times_that_cannot_be_are_refused(changed: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        best_order(dict.fromkeys(NAMES, 1.0) | changed)


def test_a_phase_without_a_time_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"no time for 'attn\(B\)'"):
        best_order({name: 1.0 for name in NAMES if name != "attn(B)"})
