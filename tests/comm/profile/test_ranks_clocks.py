"""Clocks that are off, jump, or have nothing in common."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.comm.profile.trace import Exchange, Trace
from tests.comm.profile.constructed import DISPATCH, START, Step, compared, traces_of

works = st.lists(st.integers(1, 10**6), min_size=3, max_size=3)
steps = st.lists(
    st.builds(Step, work=works, transfer=st.integers(1, 10**6)), min_size=1, max_size=20
)
clock_offsets = st.lists(st.integers(-(10**17), 10**17), min_size=3, max_size=3)


def moved(trace: Trace, after: int, by: int) -> Trace:
    """The trace with its clock set by so much once, after an activity began at this time."""
    return replace(
        trace,
        activities=tuple(
            one._replace(start=one.start + by, end=one.end + by) if one.start >= after else one
            for one in trace.activities
        ),
    )


@given(steps=steps, offsets=clock_offsets, on_gpu=st.booleans())
@settings(max_examples=60, deadline=None)
def test_offsets_are_recovered_exactly_where_ends_coincide(
    steps: list[Step], offsets: list[int], on_gpu: bool
) -> None:
    found = compared(traces_of(steps, offsets=offsets, on_gpu=on_gpu))
    for clock, ahead in zip(found.clocks, offsets, strict=True):
        assert clock.offset == offsets[0] - ahead
        assert clock.uncertainty == 0
        assert clock.collectives == len(steps)
        assert clock.jumps == ()
        assert clock.bounds is not None
        assert clock.bounds[0] <= clock.offset <= clock.bounds[1]


@given(
    steps=steps,
    ahead=st.integers(-(10**9), 10**9),
    scatter=st.lists(st.integers(0, 500), min_size=20, max_size=20),
)
@settings(max_examples=60, deadline=None)
def test_an_offset_is_within_its_bounds_and_nine_in_ten_ends_within_its_uncertainty(
    steps: list[Step], ahead: int, scatter: list[int]
) -> None:
    first, second, _ = traces_of(steps, offsets=[0, ahead, 0])
    later = iter(scatter)
    ragged = tuple(
        one._replace(end=one.end + next(later)) if one.lane == "stream 9" else one
        for one in second.activities
    )
    clock = compared([first, replace(second, activities=ragged)]).clocks[1]
    assert clock.bounds is not None
    assert clock.bounds[0] <= clock.offset <= clock.bounds[1]
    assert clock.bounds[0] <= -ahead <= clock.bounds[1]
    assert clock.uncertainty is not None
    ends = scatter[: len(steps)]
    close = sum(abs(-ahead - end - clock.offset) <= clock.uncertainty for end in ends)
    assert 10 * close >= 9 * len(ends)


def test_one_late_end_among_three_moves_the_uncertainty_and_not_the_offset() -> None:
    first, second = traces_of([Step([1000, 1000], 9000)] * 3)
    late = iter((0, 10, 5000))
    ragged = tuple(
        one._replace(end=one.end + next(late)) if one.lane == "stream 9" else one
        for one in second.activities
    )
    clock = compared([first, replace(second, activities=ragged)]).clocks[1]
    assert (clock.offset, clock.uncertainty) == (-10, 4990)


def test_ranks_that_share_no_collective_with_the_first_are_reached_through_others() -> None:
    pairs = ((0, 1), (1, 2), (2, 3))
    plan = []
    for sequence, (a, b) in enumerate(pairs * 3):
        group = Exchange("allreduce", group=f"{a}{b}", group_size=2, sequence=sequence)
        parts = [group if rank in (a, b) else Exchange("send") for rank in range(4)]
        plan.append(Step([100, 300, 200, 50], 10, phase="", before="", exchanges=parts))
    offsets = [5, -700, 12_345, 10**12]
    found = compared(traces_of(plan, offsets=offsets))
    assert [clock.offset for clock in found.clocks] == [5 - ahead for ahead in offsets]
    assert [clock.uncertainty for clock in found.clocks] == [0, 0, 0, 0]


def test_a_clock_that_jumps_is_said_with_the_moment_and_leaves_durations_alone() -> None:
    plan = [Step([1000, 800], 500)] * 10
    first, second = traces_of(plan)
    whole = compared([first, second])
    after = second.activities[12].start
    for by in (10**7, -(10**7)):
        jumped = moved(second, after, by)
        jumped = replace(jumped, activities=tuple(sorted(jumped.activities, key=lambda a: a.start)))
        found = compared([first, jumped])
        assert len(found.clocks[1].jumps) == 1
        assert found.clocks[1].bounds is None
        assert any("Rank 1's clock jumped" in note for note in found.notes)
    found = compared([first, moved(second, after, 10**7)])
    assert found.clocks[1].jumps == (second.activities[13].start + 10**7,)
    assert (found.transfer, found.skew) == (whole.transfer, whole.skew)
    assert compared([first, second]).clocks[1].jumps == ()


def test_where_all_disagree_with_the_first_it_is_the_firsts_clock_that_is_doubted() -> None:
    first, *others = traces_of([Step([1000, 800, 900], 500)] * 10)
    found = compared([moved(first, first.activities[12].start, 10**7), *others])
    assert any(note.startswith("Rank 0's clock, or every other") for note in found.notes)


def test_a_backward_jump_within_one_trace_shows_in_its_streams() -> None:
    plan = [Step([10_000, 2_000 + 6_000 * (n % 2)], 5_000) for n in range(10)]
    first, second = traces_of(plan)
    assert not any("end before" in note for note in compared([first, second]).notes)
    back = moved(second, second.activities[10].start, -43_000)
    back = replace(back, activities=tuple(sorted(back.activities, key=lambda one: one.start)))
    assert any("Rank 1: " in n and "end before" in n for n in compared([first, back]).notes)


def test_times_of_day_that_collectives_rule_out_are_said_and_others_are_not() -> None:
    plan = [Step([1000, 800], 500)] * 5
    day = 1_700_000_000 * 10**9
    # Both traces count from their own start; the second's is 40 ns later, and its clock is right.
    right = compared(traces_of(plan, offsets=[0, -40], clocks_ns=[day, day + 40]))
    assert right.clocks[1].off_by == 0
    assert right.notes == compared(traces_of(plan)).notes
    wrong = compared(traces_of(plan, offsets=[0, -40], clocks_ns=[day, day + 40 - 3_000_000]))
    assert wrong.clocks[1].off_by == 3_000_000
    assert any("3.000 ms behind rank 0's" in note for note in wrong.notes)
    ahead = compared(traces_of(plan, clocks_ns=[day, day + 3_000_000]))
    assert any("3.000 ms ahead of rank 0's" in note for note in ahead.notes)


def test_ranks_without_a_common_collective_are_laid_by_the_time_of_day_or_as_they_are() -> None:
    plan = [Step([1000, 800], 500)] * 3
    day = 1_700_000_000 * 10**9
    first, second = traces_of(plan, clocks_ns=[day, day + 700])
    alone = replace(second, activities=tuple(a for a in second.activities if a.lane == "stream 7"))
    found = compared([first, alone])
    assert found.matched == 0
    assert (found.clocks[1].offset, found.clocks[1].uncertainty) == (700, None)
    assert any("by the times of day" in note for note in found.notes)
    untold = replace(alone, clock_ns=0)
    found = compared([first, untold])
    assert found.clocks[1].offset == 0
    assert any("as they are" in note for note in found.notes)


def test_traces_with_no_time_in_common_are_told_and_still_analysed() -> None:
    plan = [Step([1000, 800], 500)] * 3
    first, second = traces_of(plan, offsets=[0, 10 * START])
    alone = replace(second, activities=tuple(a for a in second.activities if a.lane == "stream 7"))
    found = compared([first, alone])
    assert any("no time in common" in note for note in found.notes)
    assert [rank.compute for rank in found.ranks] == [3000, 2400]


def test_what_does_not_wait_for_all_says_nothing_of_clocks() -> None:
    def told(trace: Trace, name: str, exchange: Exchange | None) -> Trace:
        """Each rank's part is over before the next one's begins, which an all-to-all cannot be."""
        assert trace.rank is not None
        later = 10**6 * trace.rank
        return replace(
            trace,
            activities=tuple(
                one._replace(
                    name=name, start=one.start + later, end=one.end + later, exchange=exchange
                )
                if one.lane == "stream 9"
                else one
                for one in trace.activities
            ),
        )

    traces = traces_of([Step([1000, 800], 500)] * 3)
    root = Exchange("broadcast", group="pp", group_size=2)
    for name, exchange in (
        ("ncclDevKernel_Broadcast_RING_LL(x)", root),
        ("void deep_ep::internode_ll::dispatch<true>(int4*)", None),
    ):
        found = compared([told(trace, name, exchange) for trace in traces])
        assert found.matched == 3
        assert found.clocks[1].collectives == 0
    # The same kernels that wait for all are taken at their word.
    found = compared([told(trace, DISPATCH, None) for trace in traces])
    assert found.clocks[1].offset == -(10**6)


def two_expert_groups(told: bool) -> list[Trace]:
    """Ranks 0 and 1, and 2 and 3, each exchange tokens while the others are far from it; all clocks
    are right."""
    near = traces_of([Step([1000, 800], 500)] * 4, on_gpu=False, clocks_ns=[7, 7])
    far = traces_of([Step([9000, 20_000], 500)] * 4, on_gpu=False, clocks_ns=[7, 7])
    return [
        replace(
            trace,
            source=f"rank{rank}.json",
            rank=rank,
            world_size=4,
            expert_ranks=((0, 1), (2, 3))[rank // 2] if told else (),
        )
        for rank, trace in enumerate([*near, *far])
    ]


def test_moves_of_tokens_are_matched_within_the_expert_group_that_the_trace_tells() -> None:
    found = compared(two_expert_groups(told=True))
    assert found.matched == 8
    assert found.skew == 4 * 200 + 4 * 11_000
    assert [clock.collectives for clock in found.clocks] == [4, 4, 0, 0]
    assert [clock.offset for clock in found.clocks] == [0] * 4
    assert not any("jumped" in note for note in found.notes)


def test_no_clock_is_doubted_for_collectives_that_may_be_of_several_groups() -> None:
    traces = two_expert_groups(told=False)
    found = compared(traces)
    assert found.matched == 4
    assert not any("jumped" in note or "time of day is" in note for note in found.notes)
    assert [clock.offset for clock in found.clocks] == [0] * 4
    assert all(clock.jumps == () for clock in found.clocks)
    # They are all there is where no time of day is told.
    found = compared([replace(trace, clock_ns=0) for trace in traces])
    assert found.clocks[1].offset == 0
    assert found.clocks[2].offset != 0


def test_the_moment_of_a_jump_is_in_ms_from_the_traces_begin() -> None:
    first, second = traces_of([Step([1000, 800], 500)] * 10)
    jumped = moved(second, second.activities[12].start, 10**7)
    (note,) = (note for note in compared([first, jumped]).notes if "jumped" in note)
    moment = (jumped.activities[13].start - jumped.activities[0].start) / 1e6
    assert f"first at {moment:.3f} ms of its trace" in note
