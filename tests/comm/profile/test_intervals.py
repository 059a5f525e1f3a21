"""Sets of intervals, against a bitmap."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.comm.profile.intervals import (
    clip,
    intersection,
    length,
    lengths_within,
    subtract,
    union,
)
from counterflow.comm.profile.trace import Interval

LIMIT = 60

any_intervals = st.lists(
    st.tuples(st.integers(0, LIMIT), st.integers(0, 12)).map(lambda one: (one[0], sum(one))),
    max_size=25,
)
# Few intervals against many take another way through `intersection`.
few_intervals = st.lists(
    st.tuples(st.integers(0, LIMIT), st.integers(0, 60)).map(lambda one: (one[0], sum(one))),
    max_size=2,
)


def bits(intervals: list[Interval]) -> set[int]:
    return {time for start, end in intervals for time in range(start, end)}


def as_intervals(covered: set[int]) -> list[Interval]:
    """The one list that stands for a set."""
    starts = sorted(time for time in covered if time - 1 not in covered)
    ends = sorted(time + 1 for time in covered if time + 1 not in covered)
    return list(zip(starts, ends, strict=True))


@given(any_intervals)
def test_union_covers_what_any_interval_covers(intervals: list[Interval]) -> None:
    assert union(intervals) == as_intervals(bits(intervals))


@given(any_intervals, st.one_of(any_intervals, few_intervals))
def test_intersection_is_what_both_cover(a: list[Interval], b: list[Interval]) -> None:
    expected = as_intervals(bits(a) & bits(b))
    assert intersection(union(a), union(b)) == expected
    assert intersection(union(b), union(a)) == expected


@given(st.one_of(any_intervals, few_intervals), any_intervals)
def test_subtraction_leaves_what_only_the_first_covers(
    a: list[Interval], b: list[Interval]
) -> None:
    assert subtract(union(a), union(b)) == as_intervals(bits(a) - bits(b))


@given(any_intervals, st.tuples(st.integers(0, 80), st.integers(0, 80)))
def test_clipping_keeps_what_lies_in_the_window(a: list[Interval], window: Interval) -> None:
    assert clip(union(a), window) == as_intervals(bits(a) & set(range(*window)))


@given(any_intervals, any_intervals)
def test_lengths_within_windows_are_those_of_the_parts(
    a: list[Interval], windows: list[Interval]
) -> None:
    sets, places = union(a), union(windows)
    assert lengths_within(sets, places) == [length(clip(sets, place)) for place in places]
    assert length(sets) == len(bits(a))


def test_an_hour_in_nanoseconds_stays_exact() -> None:
    start = 1_740_461_679_470_813_001  # more digits than a float holds
    assert length(union([(start, start + 3), (start + 2, start + 5)])) == 5


@pytest.mark.alone
def test_a_hundred_thousand_intervals_take_seconds_at_most() -> None:
    numbers = random.Random(6)
    starts = [numbers.randrange(10**9) for _ in range(100_000)]
    a = [(start, start + numbers.randrange(20_000)) for start in starts]
    b = union((start + 7_000, start + 9_000) for start in starts[:60_000])
    begin = time.process_time()
    merged = union(a)
    shared, left = intersection(merged, b), subtract(merged, b)
    # About 0.3 s of one core; work that grows with the square would take minutes.
    assert time.process_time() - begin < 3
    assert length(shared) + length(left) == length(merged)
