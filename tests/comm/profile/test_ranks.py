"""Transfer, waiting, stragglers and missing ranks, of traces made from the answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.comm.profile.analyse import analyse
from counterflow.comm.profile.ranks import RanksReport, compare_ranks
from counterflow.comm.profile.trace import Exchange, TraceError
from tests.comm.profile.constructed import MAIN, Step, compared, traces_of, waits_of

PHASES = ("dispatch(F) layer 0", "combine(F) layer 0", "dispatch(F) layer 1", "combine(B) layer 1")
NAMES = ("dispatch(F)", "combine(F)", "combine(B)")


def steps_of(ranks: int) -> st.SearchStrategy[list[Step]]:
    step = st.builds(
        Step,
        work=st.lists(st.integers(1, 10**6), min_size=ranks, max_size=ranks),
        transfer=st.integers(1, 10**6),
        phase=st.sampled_from(PHASES),
    )
    return st.lists(step, min_size=1, max_size=12)


many_steps = st.integers(2, 5).flatmap(steps_of)


@given(steps=many_steps, on_gpu=st.booleans(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_transfer_and_waiting_come_out_exactly_whatever_the_clocks(
    steps: list[Step], on_gpu: bool, data: st.DataObject
) -> None:
    ranks = len(steps[0].work)
    offset = st.integers(-(10**15), 10**15)
    offsets = data.draw(st.lists(offset, min_size=ranks, max_size=ranks))
    found = compared(traces_of(steps, offsets=offsets, on_gpu=on_gpu))
    transfer = sum(step.transfer for step in steps)
    assert found.matched == len(steps)
    assert found.unmatched == ()
    for place, rank in enumerate(found.ranks):
        assert rank.compute == sum(step.work[place] for step in steps)
        assert rank.share.count == len(steps)
        assert rank.share.transfer == transfer
        assert rank.share.skew == sum(waits_of(step)[place] for step in steps)
        came_last = [step for step in steps if waits_of(step)[place] == 0]
        alone = sum(sum(waits_of(step)) for step in came_last if waits_of(step).count(0) == 1)
        assert alone <= rank.share.held_up <= sum(sum(waits_of(step)) for step in came_last)
        assert rank.share.last == sum(any(waits_of(step)) for step in came_last)
    assert sum(rank.share.held_up for rank in found.ranks) == found.skew
    assert (found.transfer, found.skew) == (
        transfer * ranks,
        sum(sum(waits_of(step)) for step in steps),
    )


@given(steps=many_steps)
@settings(max_examples=40, deadline=None)
def test_phases_add_up_to_the_whole(steps: list[Step]) -> None:
    found = compared(traces_of(steps))
    for phase in found.phases:
        own = [step for step in steps if step.phase.split(" layer")[0] == phase.name]
        assert phase.count == len(own)
        assert phase.transfer == sum(step.transfer for step in own)
        assert phase.skew == sum(sum(waits_of(step)) for step in own)
    assert {phase.name for phase in found.phases} == {step.phase.split(" ")[0] for step in steps}
    assert sum(phase.skew for phase in found.phases) == found.skew
    for rank in found.ranks:
        own = [part for p in found.phases for part in p.shares if part.rank == rank.rank]
        assert sum(part.held_up for part in own) == rank.share.held_up


@given(
    late=st.integers(0, 4),
    ranks=st.integers(2, 5),
    delay=st.integers(50_000, 10**6),
    slow_phase=st.sampled_from(("mlp(F) layer 0", "attn(F) layer 0")),
)
@settings(max_examples=40, deadline=None)
def test_the_straggler_is_named_with_the_phase_that_makes_it_late(
    late: int, ranks: int, delay: int, slow_phase: str
) -> None:
    late %= ranks
    slow = [1000 + (delay if rank == late else 0) for rank in range(ranks)]
    told = [Exchange("all_to_allv", group="ep", group_ranks=tuple(range(ranks)))] * ranks
    steps = [
        Step([1000] * ranks, 500, "combine(B) layer 0", "shared(F) layer 0", told),
        Step(slow, 500, "dispatch(F) layer 0", slow_phase, told),
    ]
    found = compared(traces_of(steps))
    (straggler,) = found.stragglers
    assert (straggler.rank, straggler.phase) == (late, "dispatch(F)")
    assert straggler.held_up == straggler.phase_held_up == delay * (ranks - 1)
    # Of two ranks the lower median is the quicker one's, so the excess is the delay for any number.
    assert straggler.compute_excess == delay
    assert straggler.compute_phase == slow_phase.removesuffix(" layer 0")
    assert f"Rank {late} arrives last" in straggler.sentence
    assert "dispatch(F)" in straggler.sentence


def test_ranks_that_come_last_together_share_what_it_costs() -> None:
    found = compared(traces_of([Step([10, 30, 30, 30], 5), Step([30, 30, 30, 23], 5)]))
    # 20 ns among three and 7 ns among three others; what is left over is the first one's.
    assert [rank.share.held_up for rank in found.ranks] == [3, 8 + 2, 6 + 2, 6]
    assert [rank.share.last for rank in found.ranks] == [1, 2, 2, 1]


@pytest.mark.parametrize("ranks", [3, 4])
def test_no_straggler_is_named_among_ranks_that_may_be_of_several_groups(ranks: int) -> None:
    """DeepEP's kernels tell no group: ranks 2 and 3 may wait for none but each other."""
    steps = [Step([1000] * (ranks - 1) + [90_000], 500)]
    found = compared(traces_of(steps))
    assert [late.rank for late in found.stragglers] == ([2] if ranks == 3 else [])
    assert any("No rank is called a straggler" in note for note in found.notes) == (ranks == 4)
    assert found.ranks[-1].share.held_up == 89_000 * (ranks - 1)
    only = [
        replace(trace, groups=(tuple(range(ranks)), (trace.rank or 0,)))
        for trace in traces_of(steps)
    ]
    assert [late.rank for late in compared(only).stragglers] == [ranks - 1]
    unknown = [replace(trace, world_size=None) for trace in traces_of(steps)]
    assert compared(unknown).stragglers == ()


def test_no_rank_is_blamed_where_all_wait_equally_or_hardly() -> None:
    in_turn = [Step([1000 + 9000 * (rank == late) for rank in range(4)], 500) for late in range(4)]
    assert compared(traces_of(in_turn)).stragglers == ()
    hardly = [Step([10_000, 10_000, 10_001], 500)] * 4
    assert compared(traces_of(hardly)).stragglers == ()


def test_a_late_rank_that_does_not_compute_longer_is_said_to_be_late_for_another_reason() -> None:
    steps = [Step([1000, 1000, 1000], 500, "combine(F) layer 0")]
    traces = traces_of([*steps, Step([50_000, 1000, 1000], 500)])
    # Rank 0 idles instead of computing: its long kernel is shortened to what the others have.
    idle = [
        one._replace(end=one.start + 1000) if one.end - one.start == 50_000 else one
        for one in traces[0].activities
    ]
    traces[0] = replace(traces[0], activities=tuple(idle))
    (straggler,) = compared(traces).stragglers
    assert (straggler.rank, straggler.compute_excess, straggler.compute_phase) == (0, 0, "")
    assert "does not compute longer" in straggler.sentence


def numbered(group: str, sequence: int, size: int, members: tuple[int, ...] = ()) -> Exchange:
    return Exchange(
        "all_to_allv", group=group, group_size=size, sequence=sequence, group_ranks=members
    )


def test_sequence_numbers_match_collectives_of_traces_that_begin_at_different_moments() -> None:
    steps = [
        Step([100 * (n + 1), 70], 10 + n, exchanges=[numbered("ep", n, 2)] * 2) for n in range(6)
    ]
    first, second = traces_of(steps)
    cut = replace(second, activities=second.activities[4:])
    found = compared([first, cut])
    assert (found.matched, found.by_sequence) == (4, 4)
    assert found.transfer == 2 * sum(step.transfer for step in steps[2:])
    assert found.skew == sum(sum(waits_of(step)) for step in steps[2:])
    (left,) = found.unmatched
    assert left.counts == ((0, 2),)
    assert any("2 collectives" in note for note in found.notes)


def test_without_numbers_a_different_count_leaves_that_phase_out_and_keeps_the_others() -> None:
    steps = [Step([100, 70], 10, PHASES[n % 2]) for n in range(6)]
    first, second = traces_of(steps)
    found = compared([first, replace(second, activities=second.activities[2:])])
    assert [phase.name for phase in found.phases] == ["combine(F)"]
    (left,) = found.unmatched
    assert (left.name, left.counts) == ("dispatch(F) layer 0", ((0, 3), (1, 2)))


def test_layers_that_ranks_run_in_different_orders_are_matched_by_their_number() -> None:
    there = [Step([100, 300], 10, f"dispatch(F) layer {n}") for n in (0, 1)]
    back = [Step([100, 30], 10, f"dispatch(F) layer {n}") for n in (1, 0)]
    first, second = traces_of(there)[0], traces_of(back)[1]
    found = compared([first, second])
    assert found.matched == 2
    of_layer_0 = replace(first, activities=first.activities[:2])
    alone = compared([of_layer_0, second])
    assert alone.matched == 1
    assert [(one.name, one.counts) for one in alone.unmatched] == [
        ("dispatch(F) layer 1", ((1, 1),))
    ]


def test_groups_that_share_a_name_are_told_apart_by_their_ranks_or_left_out() -> None:
    def traces(told: bool) -> list[Step]:
        groups = [(0, 1), (0, 1), (2, 3), (2, 3)]
        parts = [numbered("3", 0, 2, members if told else ()) for members in groups]
        return [Step([100, 40, 70, 90], 10, exchanges=parts)]

    found = compared(traces_of(traces(told=True)))
    assert found.matched == 2
    # Within its pair, the later rank's kernel is the shortest.
    assert [rank.share.skew for rank in found.ranks] == [0, 60, 20, 0]
    found = compared(traces_of(traces(told=False)))
    assert found.matched == 0
    assert "share the name" in found.unmatched[0].reason


def test_groups_told_without_numbers_are_compared_within_themselves() -> None:
    groups = [(0, 1), (0, 1), (2, 3), (2, 3)]

    def traces(told: bool) -> RanksReport:
        parts = [Exchange("all_to_allv", group="3", group_size=2, group_ranks=g) for g in groups]
        if not told:
            parts = [part._replace(group_ranks=()) for part in parts]
        return compared(traces_of([Step([100, 40, 70, 90], 10, exchanges=parts)]))

    assert traces(told=True).by_sequence == 0
    assert [rank.share.skew for rank in traces(told=True).ranks] == [0, 60, 20, 0]
    assert traces(told=False).matched == 0
    assert "share the name" in traces(told=False).unmatched[0].reason


def test_a_straggler_within_its_group_is_found_beside_groups_that_wait_elsewhere() -> None:
    groups = [(rank // 2 * 2, rank // 2 * 2 + 1) for rank in range(8)]
    steps: list[Step] = []
    for n in range(6):
        # Rank 3 always keeps rank 2; ranks 0 and 1 keep each other by turns.
        work = [1000] * 8
        work[3] += 500
        work[n % 2] += 300
        parts = [numbered("ep", n, 2, members) for members in groups]
        steps.append(Step(work, 100, exchanges=parts))
    found = compared(traces_of(steps))
    assert [straggler.rank for straggler in found.stragglers] == [3]


@pytest.mark.parametrize("kinds", [("send", "recv"), ("send", "send"), ("coalesced",) * 2])
def test_sends_and_receives_are_not_taken_for_collectives(kinds: tuple[str, str]) -> None:
    parts = [Exchange(kind, group="pp", sequence=1) for kind in kinds]
    steps = [Step([100, 70], 10, phase="", before="", exchanges=parts), Step([100, 70], 10)]
    found = compared(traces_of(steps))
    assert (found.matched, found.unmatched) == (1, ())
    assert [phase.name for phase in found.phases] == ["dispatch(F)"]


def test_all_to_alls_beneath_a_marked_move_are_not_counted_besides_it() -> None:
    steps = [Step([100, 70], 10, phase) for phase in PHASES]
    traces = [
        replace(
            trace,
            # A library's own thread runs the operator, where nothing is marked.
            activities=tuple(
                one._replace(launcher=(1, 9), lane="thread 9") if "gloo" in one.name else one
                for one in trace.activities
            ),
        )
        for trace in traces_of(steps, on_gpu=False)
    ]
    assert {one.launcher for one in traces[0].activities} == {MAIN, (1, 9)}
    assert compared(traces).matched == len(steps)


def test_missing_ranks_are_listed_and_the_rest_is_compared() -> None:
    traces = traces_of([Step([100, 70, 30, 20, 10], 10)])
    found = compared([traces[0], traces[3]])
    assert (found.world_size, found.missing_ranks) == (5, (1, 2, 4))
    assert [rank.rank for rank in found.ranks] == [0, 3]
    assert any("among the ranks without a trace" in note for note in found.notes)
    untold = compared([replace(traces[0], world_size=None), replace(traces[3], world_size=None)])
    assert (untold.world_size, untold.missing_ranks) == (None, (1, 2))


def test_ranks_out_of_order_are_put_in_order_and_nameless_ones_numbered() -> None:
    traces = traces_of([Step([100, 70, 30], 10)])
    found = compared([traces[2], replace(traces[1], rank=None), traces[0]])
    assert [rank.source for rank in found.ranks] == ["rank0.json", "rank1.json", "rank2.json"]
    assert any("do not tell their rank" in note for note in found.notes)


def test_two_traces_of_one_rank_are_said_and_the_first_taken() -> None:
    traces = traces_of([Step([100, 70], 10)])
    again = replace(traces[1], source="again.json")
    found = compared([*traces, again])
    assert [rank.source for rank in found.ranks] == ["rank0.json", "rank1.json"]
    assert any("again.json are both of rank 1" in note for note in found.notes)


def test_one_rank_cannot_be_compared() -> None:
    traces = traces_of([Step([100, 70], 10)])
    with pytest.raises(TraceError, match="two ranks or more"):
        compared(traces[:1])
    with pytest.raises(TraceError, match="here is none"):
        compared([])
    with pytest.raises(ValueError, match="each trace has one"):
        compare_ranks(traces, [analyse(traces[0])])


def test_only_collectives_within_the_reports_windows_count() -> None:
    steps = [Step([100, 70], 10), Step([100, 100], 20, "combine(F) layer 0")]
    traces = traces_of(steps)
    reports = [analyse(trace, window=(trace.activities[2].start + 1, 10**9)) for trace in traces]
    found = compare_ranks(traces, reports)
    assert [phase.name for phase in found.phases] == ["combine(F)"]
    assert (found.matched, found.transfer, found.skew) == (1, 40, 0)


@pytest.mark.parametrize("told", [True, False])
def test_sends_and_receives_of_an_all_to_all_are_one_collective_where_metadata_or_phase_tells(
    told: bool,
) -> None:
    parts = [numbered("ep", 0, 2)] * 2 if told else [Exchange(group="ep", group_size=2)] * 2
    marked = compared(traces_of([Step([100, 70], 10, exchanges=parts)]))
    assert (marked.matched, marked.by_sequence) == (1, int(told))
    elsewhere = compared(traces_of([Step([100, 70], 10, "send(F)", exchanges=parts)]))
    assert elsewhere.matched == int(told)


def test_traces_of_different_world_sizes_or_kinds_are_said() -> None:
    first, second = traces_of([Step([100, 70], 10)])
    found = compared([first, replace(second, world_size=8)])
    assert found.world_size == 8
    assert any("different world sizes, 2, 8" in note for note in found.notes)
    on_cpu = traces_of([Step([100, 70], 10)], on_gpu=False)[1]
    assert any("only operators" in note for note in compared([first, on_cpu]).notes)
