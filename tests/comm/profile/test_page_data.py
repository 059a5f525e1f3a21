"""The timeline of the page: what ran, where it ran; merged only where there is no room."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.comm.profile import page
from counterflow.comm.profile.analyse import analyse
from counterflow.comm.profile.page import to_html
from counterflow.comm.profile.page_data import MOST_LANES, Lane, Timeline, timeline
from counterflow.comm.profile.page_ran import Ran, ran_on
from counterflow.comm.profile.report import Report
from counterflow.comm.profile.trace import Activity, Annotation, Trace
from tests.comm.profile.constructed import DISPATCH, GEMM, MAIN

COPY = "Memcpy DtoD (Device -> Device)"
NAMES = {"compute": GEMM, "communication": DISPATCH, "copy": COPY}

activities = st.lists(
    st.tuples(st.integers(0, 500), st.integers(1, 80), st.sampled_from(sorted(NAMES))),
    min_size=1,
    max_size=60,
)


def trace_of(ran: list[tuple[int, int, str]]) -> Trace:
    """A trace of kernels (start, duration, group), each of a marked phase."""
    kernels = [
        Activity(NAMES[group], start, start + time, launched=start, launcher=MAIN, grid=(4, 5, 1))
        for start, time, group in sorted(ran)
    ]
    marks = [
        Annotation(f"{name} layer {layer}", start, start + 100, MAIN)
        for layer, start in enumerate(range(0, 500, 100))
        for name in [("dispatch(F)", "combine(B)")[layer % 2]]
    ]
    return Trace("ranks.json", tuple(kernels), tuple(marks), rank=0)


def drawn(trace: Trace, report: Report, most_bars: int = 10**6) -> Timeline:
    return timeline([report], [ran_on(trace, report)], ["rank 0"], [0], most_bars=most_bars)


def spans(lane: Lane) -> list[tuple[int, int]]:
    times = list(
        accumulate(t for pair in zip(lane["gap"], lane["time"], strict=True) for t in pair)
    )
    return list(zip(times[::2], times[1::2], strict=True))


@given(activities)
@settings(max_examples=60, deadline=None)
def test_without_merging_every_kernel_is_drawn_where_it_ran(
    ran: list[tuple[int, int, str]],
) -> None:
    trace = trace_of(ran)
    report = analyse(trace)
    data = drawn(trace, report)
    zero = report.window[0]
    (rank,) = data["ranks"]
    expected: dict[str, list[tuple[int, int]]] = {}
    for start, time, group in ran:
        expected.setdefault(group, []).append((start - zero, start + time - zero))
    left_out = 0
    for group, kernels in expected.items():
        lanes = rank["rows"][group]
        assert len(lanes) <= MOST_LANES
        found = sorted(span for lane in lanes for span in spans(lane))
        left_out += len(kernels) - len(found)
        if len(lanes) < MOST_LANES:
            assert found == sorted(kernels)
    assert rank["deeper"] == left_out
    assert rank["resolution"] == 0
    for lanes in rank["rows"].values():
        for lane in lanes:
            assert all(gap >= 0 for gap in lane["gap"])
            assert not lane["count"]


@given(activities)
@settings(max_examples=60, deadline=None)
def test_what_is_marked_as_exposed_is_what_the_report_says(ran: list[tuple[int, int, str]]) -> None:
    trace = trace_of(ran)
    report = analyse(trace)
    lanes = drawn(trace, report)["ranks"][0]["rows"]["exposed"]
    zero = report.window[0]
    marked = [span for lane in lanes for span in spans(lane)]
    assert sum(end - start for start, end in marked) == report.totals.exposed
    for start, end in marked:
        assert any(a - zero <= start and end <= b - zero for a, b in report.exposed_intervals)


@given(activities, st.integers(4, 20))
@settings(max_examples=60, deadline=None)
def test_bars_are_merged_until_they_are_few_and_none_is_longer_than_the_resolution(
    ran: list[tuple[int, int, str]], most: int
) -> None:
    trace = trace_of(ran)
    report = analyse(trace)
    fine = drawn(trace, report)["ranks"][0]
    (rank,) = drawn(trace, report, most)["ranks"]
    lanes = [lane for row in rank["rows"].values() for lane in row]
    bars = sum(len(lane["time"]) for lane in lanes)
    assert bars <= max(most, len(lanes))
    for group, row in rank["rows"].items():
        for lane, before in zip(row, fine["rows"][group], strict=True):
            merged = {int(bar): count for bar, count in lane["count"].items()}
            things = sum(merged.get(bar, 1) for bar in range(len(lane["time"])))
            assert things == len(before["time"])
            assert all(lane["time"][bar] <= rank["resolution"] for bar in merged)
            found, exact = spans(lane), spans(before)
            assert found[0][0] == exact[0][0]
            assert found[-1][1] == exact[-1][1]
            assert all(a[1] <= b[0] for a, b in pairwise(found))
            assert all(any(a <= start and end <= b for a, b in found) for start, end in exact)


def test_neighbours_of_two_phases_stay_apart_while_a_pixel_is_wider_than_both() -> None:
    # Two kernels of a phase within 2,500 ns, then two of the other; a pixel is 10,000 ns.
    ran = [
        Ran(start, start + 1000, "compute", (f"p{pair % 2}(F)", None), "k")
        for pair in range(2000)
        for start in (pair * 10_000, pair * 10_000 + 1500)
    ]
    report = replace(analyse(trace_of([(0, 20_000_000, "compute")])), exposed=())
    data = timeline([report], [ran], ["rank 0"], [0], most_bars=3000)
    (rank,) = data["ranks"]
    (lane,) = rank["rows"]["compute"]
    assert len(lane["time"]) == 2000
    assert set(lane["count"].values()) == {2}
    assert 2500 <= rank["resolution"] < 10_000
    labels = [data["labels"][label] for label in lane["label"]]
    assert all(a != b for a, b in pairwise(labels))


def test_a_merged_bar_has_the_name_of_the_longest_in_it() -> None:
    names = ["short", "long", "short"]
    times = [(0, 10), (20, 50), (60, 70)]
    ran = [
        Ran(*span, "compute", ("attn(F)", 0), name) for span, name in zip(times, names, strict=True)
    ]
    report = replace(analyse(trace_of([(0, 100, "compute")])), exposed=())
    data = timeline([report], [ran], ["rank 0"], [0], most_bars=1)
    (lane,) = data["ranks"][0]["rows"]["compute"]
    assert lane["time"] == [70]
    kernel = data["kernels"][lane["kernel"][0]]
    assert isinstance(kernel, tuple)
    assert kernel[0] == "long"


def test_70_000_kernels_make_a_page_far_below_ten_megabytes() -> None:
    count = 70_000
    kernels = tuple(
        Activity(
            DISPATCH if n % 7 == 0 else GEMM,
            n * 1000,
            n * 1000 + (900 if n % 3 else 1300),
            lane=f"stream {n % 2}",
            launched=n * 1000,
            launcher=MAIN,
            grid=(20 + n % 90, 1, 1),
        )
        for n in range(count)
    )
    trace = Trace("large.json", kernels, (), rank=0)
    # The names are those of a part, whose report takes less time.
    part = analyse(replace(trace, activities=kernels[:1000]))
    report = replace(part, window=(0, kernels[-1].end))
    html = to_html([trace], [report], title="large")
    assert len(html) < 6_000_000


def test_the_page_says_what_was_merged_and_what_was_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trace = trace_of([(10 * n, 5, "compute") for n in range(40)])
    assert "are drawn as one" not in to_html([trace], [analyse(trace)], title="all")
    monkeypatch.setattr(page, "timeline", partial(timeline, most_bars=10))
    assert "shorter than 0.256 µs are drawn as one" in to_html([trace], [analyse(trace)], title="")
    trace = trace_of([(0, 5, "compute")] * (MOST_LANES + 3))
    assert "3 activities that run beside many" in to_html([trace], [analyse(trace)], title="deep")
