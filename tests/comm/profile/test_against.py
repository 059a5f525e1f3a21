"""A measured run beside its simulation: actions, phases, and what the difference consists of."""

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.comm.profile.against import against
from counterflow.comm.profile.analyse import analyse
from counterflow.comm.profile.comparison import (
    AFTER,
    BEFORE,
    BETWEEN,
    COMPUTING,
    STANDING,
    TRANSFER,
    WAITING,
    Comparison,
    Part,
)
from counterflow.comm.profile.simulated import Simulated, SimulatedAction, SimulatedPhase
from counterflow.comm.profile.trace import Activity, Annotation, Thread, Trace
from tests.comm.profile.staged import (
    MAIN,
    MOVES,
    Did,
    Ran,
    as_simulated,
    gpu_trace,
    simulated_of,
)


def compared(
    simulated: Simulated, traces: Sequence[Trace], offsets: Sequence[int] | None = None
) -> Comparison:
    return against(simulated, traces, [analyse(trace) for trace in traces], offsets=offsets)


def ran_as_simulated(simulated: Simulated, *, dp: int = 1, delay: int = 5_000_000) -> list[Trace]:
    ranks = simulated.num_ranks * dp
    return [
        gpu_trace([as_simulated(simulated, rank // dp, delay=delay)], rank=rank, world_size=ranks)
        for rank in range(ranks)
    ]


def adds_up(found: Comparison) -> None:
    for rank in found.ranks:
        assert sum(part.difference for part in rank.parts) == rank.difference
        assert sum(part.measured for part in rank.parts) == rank.measured
        assert sum(part.simulated for part in rank.parts) == rank.simulated


# What must add up


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev", "zb-h1", "1f1b", "interleaved"])
@pytest.mark.parametrize("dp", [1, 2])
def test_a_run_just_as_simulated_differs_in_nothing(schedule: str, dp: int) -> None:
    simulated = simulated_of(schedule, ranks=4, microbatches=8)
    found = compared(simulated, ran_as_simulated(simulated, dp=dp), [0] * 4 * dp)
    assert (found.missing, found.steps, found.together, found.fitted) == ((), 1, True, False)
    assert len(found.ranks) == 4 * dp
    assert [rank.pipeline_rank for rank in found.ranks] == [r for r in range(4) for _ in range(dp)]
    for rank in found.ranks:
        assert all(part.difference == 0 for part in rank.parts)
        assert rank.measured == rank.simulated == max(row[-1].end for row in simulated.rows)
    assert len(found.actions) == dp * sum(map(len, simulated.rows))
    assert all(a.measured == a.simulated and a.starts[0] == a.starts[1] for a in found.actions)
    assert all(kind.ratio == 1 for kind in found.kinds)
    assert all(phase.ratio == 1 for phase in found.phases)
    assert all(phase.exposed == phase.simulated_exposed for phase in found.phases)
    assert len(found.findings) == 1, "only that it took as long as simulated"


@st.composite
def runs(draw: st.DrawFn) -> list[list[list[Did]]]:
    """Per rank, per training step: actions with phases that run at any times, also over others."""
    names = ["0F0", "0F1", "(0F2;1B0)", "1B1", "0W2", "9F9"]
    phase = st.sampled_from(["attn(F) layer 0", "dispatch(F) layer 0", "mlp(B) layer 1", ""])
    lane = st.sampled_from(["compute", "communication", "waiting", "copy"])
    num_steps = draw(st.integers(1, 3))
    found: list[list[list[Did]]] = []
    for _ in range(2):
        steps: list[list[Did]] = []
        for number in range(num_steps):
            now = 10_000 * (number + 1)
            step: list[Did] = []
            for name in ["0F0", *draw(st.permutations(names[1:]))[: draw(st.integers(0, 5))]]:
                ran = [
                    Ran(draw(phase), draw(lane), now + start, now + start + length)
                    for start, length in draw(
                        st.lists(
                            st.tuples(st.integers(0, 60), st.integers(1, 40)),
                            min_size=1,
                            max_size=4,
                        )
                    )
                ]
                step.append(Did(name, ran))
                now += draw(st.integers(20, 90))
            steps.append(step)
        found.append(steps)
    return found


_SMALL = Simulated(
    "small.json",
    "mine",
    "ns",
    300.0,
    (
        (
            SimulatedAction(
                "0F0",
                0.0,
                60.0,
                (
                    SimulatedPhase("attn(F)", 0, "compute", 0.0, 25.0),
                    SimulatedPhase("dispatch(F)", 0, "communication", 20.0, 45.5),
                ),
            ),
            SimulatedAction("0F1", 60.4, 99.5),
            SimulatedAction("(0F2;1B0)", 120.0, 180.0),
        ),
        (SimulatedAction("0F0", 33.0, 60.0), SimulatedAction("1B1", 60.0, 300.0)),
    ),
)


@settings(max_examples=60, deadline=None)
@given(runs(), st.booleans(), st.booleans(), st.integers(0, 900), st.sampled_from(["ns", "us", ""]))
def test_the_parts_of_every_rank_add_up_to_its_difference(
    run: list[list[list[Did]]], marks_steps: bool, together: bool, offset: int, unit: str
) -> None:
    traces = [
        gpu_trace(steps, rank=rank, world_size=2, marks_steps=marks_steps, offset=rank * offset)
        for rank, steps in enumerate(run)
    ]
    simulated = replace(_SMALL, unit=unit)
    found = compared(simulated, traces, [0, -offset] if together else None)
    assert len(found.ranks) == 2
    adds_up(found)
    for rank in found.ranks:
        assert rank.measured > 0
        assert all(part.measured >= 0 and part.simulated >= 0 for part in rank.parts)
        assert list(rank.parts) == sorted(rank.parts, key=lambda part: -abs(part.difference))
    if found.together:
        assert len({(rank.measured, rank.simulated, rank.step) for rank in found.ranks}) == 1
    # Whatever a rank's clock counts from.
    moved = compared(simulated, traces, [7, 7 - offset] if together else None)
    assert moved.ranks == found.ranks


# What the difference is put down to


def part_of(found: Comparison, kind: str, part: str, phase: str, rank: int = 0) -> Part:
    (of,) = (one for one in found.ranks if one.rank == rank)
    (one,) = (p for p in of.parts if (p.kind, p.part, p.phase) == (kind, part, phase))
    return one


def simple(phases: bool = True, unit: str = "us") -> Simulated:
    """One rank: F of 10 attention, 6 dispatch, 4 MLP; idle 5; W of 10."""
    spans = (
        SimulatedPhase("attn(F)", 0, "compute", 0.0, 10.0),
        SimulatedPhase("dispatch(F)", 0, "communication", 10.0, 16.0),
        SimulatedPhase("mlp(F)", 0, "compute", 16.0, 20.0),
    )
    weights = (SimulatedPhase("mlp(W)", 0, "compute", 25.0, 35.0),)
    row = (
        SimulatedAction("0F0", 0.0, 20.0, spans if phases else ()),
        SimulatedAction("0W0", 25.0, 35.0, weights if phases else ()),
    )
    return Simulated("simple.json", "mine", unit, 35.0, (row,))


def forward(start: int = 0, dispatch: int = 6000, notify: int = 0, gap: int = 0) -> Did:
    """The forward of `simple`, with a dispatch of other length, and something before it."""
    sent = start + 10_000 + gap
    ran = [Ran("attn(F) layer 0", "compute", start, start + 10_000)]
    if notify:
        ran.append(Ran("dispatch(F) layer 0", "waiting", sent, sent + notify))
    arrived = sent + notify + dispatch
    ran.append(Ran("dispatch(F) layer 0", "communication", sent + notify, arrived))
    return Did("0F0", [*ran, Ran("mlp(F) layer 0", "compute", arrived, arrived + 4000)])


def weights(start: int) -> Did:
    return Did("0W0", [Ran("mlp(W) layer 0", "compute", start, start + 10_000)])


def test_a_slow_phase_is_the_first_thing_said() -> None:
    trace = gpu_trace([[forward(dispatch=12_000), weights(31_000)]])
    found = compared(simple(), [trace])
    assert (found.ranks[0].measured, found.ranks[0].simulated) == (41_000, 35_000)
    assert [tuple(p) for p in found.ranks[0].parts if p.difference] == [
        ("F", TRANSFER, "dispatch(F)", 12_000, 6000)
    ]
    assert found.findings == (
        "The longest row, that of rank 0, took 0.041 ms where 0.035 ms were simulated: 0.006 ms "
        "more (17.1%). Of this, on rank 0:",
        "0.006 ms more: dispatch(F) in F, with no computation behind (0.012 ms, simulated "
        "0.006 ms); one run took 2.00x its simulated time.",
    )
    (dispatch,) = (phase for phase in found.phases if phase.name == "dispatch(F)")
    assert (dispatch.lane, dispatch.kind, dispatch.count) == ("communication", "F", 1)
    assert (dispatch.measured, dispatch.simulated, dispatch.ratio) == (12_000, 6000, 2)
    assert (dispatch.exposed, dispatch.simulated_exposed) == (12_000, 6000)


def test_waiting_and_gaps_are_told_apart_from_transfer() -> None:
    trace = gpu_trace([[forward(notify=3000, gap=500), weights(23_500 + 9000)]])
    found = compared(simple(), [trace])
    assert part_of(found, "F", WAITING, "dispatch(F)").difference == 3000
    assert part_of(found, "F", STANDING, "").difference == 500
    assert part_of(found, "F", TRANSFER, "dispatch(F)").difference == 0
    assert part_of(found, BETWEEN, STANDING, "").difference == 4000
    adds_up(found)
    assert [line.split(" (")[0] for line in found.findings[1:]] == [
        "0.004 ms more: nothing running between its actions",
        "0.003 ms more: waiting for dispatch(F) in F",
        "0.0005 ms more: nothing running in F",
    ]
    (dispatch,) = (phase for phase in found.phases if phase.name == "dispatch(F)")
    assert (dispatch.measured, dispatch.waiting, dispatch.exposed) == (6000, 3000, 9000)


def test_messages_between_stages_belong_to_no_action() -> None:
    did = forward(start=4000)
    received = Ran("", "communication", 0, 4000)
    sent = Ran("", "communication", 24_000, 26_000)
    trace = gpu_trace([[Did("0F0", [received, *did.ran, sent]), weights(29_000)]])
    found = compared(simple(), [trace])
    assert [(a.name, a.measured, a.simulated) for a in found.actions] == [
        ("0F0", 20_000, 20_000),
        ("0W0", 10_000, 10_000),
    ]
    assert found.ranks[0].difference == 0
    assert part_of(found, BETWEEN, TRANSFER, "").difference == 2000
    assert part_of(found, BETWEEN, STANDING, "").difference == -2000


def test_what_is_hidden_costs_nothing() -> None:
    hidden = Ran("dispatch(B) layer 0", "communication", 25_000, 35_000)
    trace = gpu_trace([[forward(), Did("0W0", [*weights(25_000).ran, hidden])]])
    assert compared(simple(), [trace]).ranks[0].difference == 0
    assert all(part.difference == 0 for part in compared(simple(), [trace]).ranks[0].parts)


def test_without_simulated_phases_an_action_counts_as_computing() -> None:
    trace = gpu_trace([[forward(dispatch=12_000), weights(31_000)]])
    found = compared(simple(phases=False), [trace])
    assert "has no phases, so all of a simulated action counts as computing" in found.missing[0]
    assert part_of(found, "F", COMPUTING, "").difference == -20_000
    assert part_of(found, "F", COMPUTING, "attn(F)").difference == 10_000
    assert found.ranks[0].difference == 6000
    adds_up(found)
    assert {phase.simulated for phase in found.phases} == {None}
    assert {phase.ratio for phase in found.phases} == {None}


def test_one_clock_for_all_ranks_makes_the_makespan_and_tells_who_waited() -> None:
    simulated = simulated_of("1f1b", ranks=2, microbatches=2)
    late = [
        gpu_trace([as_simulated(simulated, rank, delay=delay)], rank=rank, world_size=2)
        for rank, delay in enumerate((1_000_000, 3_000_000))
    ]
    found = compared(simulated, late, [0, 0])
    ends = [row[-1].end for row in simulated.rows]
    assert found.together
    for rank in found.ranks:
        assert rank.simulated == max(ends)
        assert rank.measured == ends[1] + 2_000_000
    assert part_of(found, BEFORE, STANDING, "", rank=1).difference == 2_000_000
    assert part_of(found, AFTER, STANDING, "", rank=0).difference == found.ranks[0].difference
    # Without a common clock each row stands for itself, and none of them took longer.
    alone = compared(simulated, late)
    assert not alone.together
    assert all(rank.difference == 0 for rank in alone.ranks)
    # Clocks that are known to differ are laid on each other.
    assert all(rank.difference == 0 for rank in compared(simulated, late, [0, -2_000_000]).ranks)


def test_the_rank_that_waited_most_is_named() -> None:
    simulated = simulated_of("1f1b", ranks=3, microbatches=3)
    traces = ran_as_simulated(simulated)
    rows = [as_simulated(simulated, rank) for rank in range(3)]
    for rank, gap in ((1, 3_000_000), (2, 9_000_000)):
        last = rows[rank][-1]
        late = [ran._replace(start=ran.start + gap, end=ran.end + gap) for ran in last.ran]
        traces[rank] = gpu_trace(
            [[*rows[rank][:-1], Did(last.name, late)]], rank=rank, world_size=3
        )
    first = as_simulated(simulated, 0)
    last = first[-1]
    slow = [*last.ran[:-1], last.ran[-1]._replace(end=last.ran[-1].end + 20_000_000)]
    traces[0] = gpu_trace([[*first[:-1], Did(last.name, slow)]], rank=0, world_size=3)
    found = compared(simulated, traces)
    assert found.longest is found.ranks[0]
    assert found.findings[-1] == (
        "Rank 2 waited outside of its actions 9 ms longer than simulated, the most of the other "
        "ranks."
    )


def test_the_sentences_of_a_row_add_up_to_its_difference() -> None:
    simulated = simulated_of("dualpipe", ranks=2, microbatches=6)
    rows = as_simulated(simulated, 0)
    stretched = [
        Did(
            did.name,
            [ran._replace(start=7 * ran.start // 5, end=7 * ran.end // 5) for ran in did.ran],
        )
        for did in rows
    ]
    found = compared(simulated, [gpu_trace([stretched], rank=0, world_size=2)])
    sums: list[float] = []
    for line in found.findings[1:]:
        told = re.match(r"([\d.]+) ms (more|less): ", line)
        assert told is not None
        sums.append(float(told[1]) * (1 if told[2] == "more" else -1))
    assert len(sums) == 9, "eight parts and the rest"
    assert "each of them smaller" in found.findings[-1]
    assert sum(sums) * 1e6 == pytest.approx(found.ranks[0].difference, rel=0.002)  # 4 digits each


# Lining up


def test_training_steps_are_told_apart_by_marks_or_by_their_actions() -> None:
    steps = [
        [forward(at, dispatch=dispatch), weights(at + 50_000)]
        for at, dispatch in ((0, 6000), (100_000, 9000), (200_000, 30_000))
    ]
    for marks_steps in (True, False):
        found = compared(simple(), [gpu_trace(steps, marks_steps=marks_steps)])
        assert (found.steps, found.missing) == (3, ())
        assert (found.actions[0].measured, found.actions[0].starts) == (23_000, (0, 0))
        (dispatch,) = (phase for phase in found.phases if phase.name == "dispatch(F)")
        assert (dispatch.measured, dispatch.count) == (9000, 3)
        assert found.ranks[0].measured == 60_000
        adds_up(found)


@pytest.mark.parametrize(("marks_steps", "named"), [(True, "ProfilerStep#5"), (False, "2")])
def test_the_step_of_median_length_is_taken_apart(marks_steps: bool, named: str) -> None:
    steps = [
        [forward(at), weights(at + gap)] for at, gap in ((0, 30), (10**6, 90_000), (10**7, 60_000))
    ]
    found = compared(simple(), [gpu_trace(steps, marks_steps=marks_steps)])
    assert (found.ranks[0].step, found.ranks[0].measured) == (named, 70_000)


def test_only_what_lies_in_the_window_counts() -> None:
    steps = [[forward(at), weights(at + 25_000)] for at in (0, 100_000)]
    trace = gpu_trace(steps)
    found = against(simple(), [trace], [analyse(trace, window=(90_000, 200_000))])
    assert found.steps == 1
    assert found.ranks[0].measured == 35_000


def test_what_is_on_one_side_only_is_listed_and_the_rest_compared() -> None:
    trace = gpu_trace([[forward(), Did("0F1", [Ran("", "compute", 20_000, 22_000)])]])
    found = compared(simple(), [trace])
    assert found.missing == (
        "rank 0: 1 simulated actions are not in the trace: 0W0",
        "rank 0: 1 actions of the trace were not simulated: 0F1",
    )
    assert (found.ranks[0].measured, found.ranks[0].simulated) == (20_000, 20_000)


def test_a_step_that_broke_off_is_left_out() -> None:
    whole = [[forward(at), weights(at + 25_000)] for at in (0, 100_000)]
    found = compared(simple(), [gpu_trace([*whole, [forward(200_000)]])])
    assert found.steps == 2
    assert found.missing == ("rank 0: training step 2 lacks 1 actions and is left out",)


def test_another_order_is_told() -> None:
    found = compared(simple(), [gpu_trace([[weights(0), forward(15_000)]])])
    assert found.missing == ("rank 0: it ran 0W0 where 0F0 was simulated: another order",)
    adds_up(found)


def test_a_simulation_without_unit_is_fitted_to_the_median_action() -> None:
    trace = gpu_trace([[forward(), weights(25_000)]])
    found = compared(simple(unit=""), [trace])
    assert (found.fitted, found.ns_per_unit) == (True, 1000)
    assert found.ranks[0].difference == 0


def test_pipeline_ranks_without_a_trace_and_traces_without_actions_are_told() -> None:
    simulated = simulated_of("1f1b", ranks=4, microbatches=4)
    traces = ran_as_simulated(simulated)
    bare = replace(traces[3], annotations=())
    found = compared(simulated, [traces[0], bare])
    assert found.missing == (
        "1 of 2 traces mark no actions such as 0F3 and are left out",
        "pipeline rank 1, 2, 3: simulated, but no trace of it is compared",
    )
    untold = [replace(trace, world_size=None) for trace in traces]
    assert "rank 2: the trace does not say how many ranks" in compared(simulated, untold).missing[2]


def test_what_cannot_be_compared_is_refused_with_the_reason() -> None:
    simulated = simulated_of("1f1b", ranks=4, microbatches=4)
    traces = ran_as_simulated(simulated)
    with pytest.raises(ValueError, match="4 pipeline ranks were simulated, and the run had 6"):
        compared(simulated, [replace(traces[0], world_size=6)])
    with pytest.raises(ValueError, match=r"rank3\.json"):
        compared(simulated, [replace(traces[0], rank=None)])
    with pytest.raises(ValueError, match="of rank 5 and does not say how many"):
        compared(simulated, [replace(traces[0], rank=5, world_size=None)])
    with pytest.raises(ValueError, match=r"no simulated action is in the trace, .* 7F7; simulate"):
        compared(simple(), [gpu_trace([[Did("7F7", weights(0).ran)]])])
    with pytest.raises(ValueError, match="there is no trace"):
        compared(simple(), [])
    with pytest.raises(ValueError, match="neither actions such as 0F3 nor phases"):
        compared(simple(), [gpu_trace([[Did("", [Ran("", "compute", 0, 5)])]])])
    bare = gpu_trace([[Did("", forward().ran)]])
    with pytest.raises(ValueError, match=r"only phases, and the simulation has none; .*\[phases\]"):
        compared(simple(phases=False), [bare])
    other = gpu_trace([[Did("", [Ran("shared(F) layer 0", "compute", 0, 5)])]])
    with pytest.raises(ValueError, match=r"none of the traces' phases .*: shared\(F\)"):
        compared(simple(), [other])


# Other traces


def test_a_trace_of_phases_alone_is_compared_with_simulated_pairs() -> None:
    simulated = simulated_of(ranks=2, microbatches=4)
    pair = next(did for did in as_simulated(simulated, 0) if did.name.startswith("("))
    length = max(ran.end for ran in pair.ran) - min(ran.start for ran in pair.ran)
    bare = [Ran(ran.phase.partition(" layer")[0], *ran[1:]) for ran in pair.ran]
    trace = gpu_trace(
        [
            [Did("1F1B", bare)],
            [Did("1F1B", [r._replace(start=r.start + 10**8, end=r.end + 10**8) for r in bare])],
        ]
    )
    found = compared(simulated, [trace])
    assert found.missing == (
        "the traces mark no actions such as 0F3, so phases alone are compared",
    )
    assert (found.actions, found.kinds, found.steps) == ((), (), 0)
    assert (found.ranks[0].measured, found.ranks[0].simulated) == (length, length)
    assert all(part.difference == 0 for part in found.ranks[0].parts)
    assert len(found.phases) == 10
    assert all(phase.ratio == 1 and phase.count == 4 for phase in found.phases)
    assert found.pair == (length // 2, length // 2)
    unknown = compared(replace(simulated, unit=""), [trace])
    assert (unknown.fitted, unknown.ns_per_unit) == (True, pytest.approx(1))
    slow = [
        ran._replace(end=ran.end + 50_000) if ran.phase == "combine(F)" else ran for ran in bare
    ]
    found = compared(simulated, [gpu_trace([[Did("1F1B", slow)]])])
    (told,) = (line for line in found.findings if line.startswith("combine(F) took"))
    assert told.startswith("combine(F) took 1.54x its simulated time: 0.143 ms a layer")
    adds_up(found)
    assert found.ranks[0].measured > length


def test_pairs_of_other_depth_are_compared_by_the_layer_and_the_remedy_told() -> None:
    simulated = simulated_of(ranks=2, microbatches=4)
    pair = next(did for did in as_simulated(simulated, 0) if did.name.startswith("("))
    first = [
        Ran(ran.phase.removesuffix(" layer 0"), *ran[1:])
        for ran in pair.ran
        if ran.phase.endswith(" 0")
    ]
    found = compared(simulated, [gpu_trace([[Did("1F1B", first)]])])
    assert found.ranks == ()
    assert found.pair is not None
    assert found.pair[0] == max(ran.end for ran in first) - min(ran.start for ran in first)
    assert found.missing[1].startswith("pairs of 1 layers were measured and none of as many")


def test_on_a_cpu_a_marked_action_lasts_from_its_first_work_to_its_end() -> None:
    def mark(name: str, start: int, end: int, thread: Thread = MAIN) -> Annotation:
        return Annotation(name, start, end, thread)

    def operator(name: str, start: int, end: int, thread: Thread = MAIN) -> Activity:
        lane = f"thread {thread[1]}"
        return Activity(name, start, end, "operator", lane, -1, None, thread)

    trace = Trace(
        source="cpu.json",
        activities=(
            operator("aten::mm", 5100, 15_000),
            operator("gloo:all_to_all", 15_000, 21_000, MOVES),
            operator("aten::mm", 22_000, 26_000),
            operator("aten::mm", 30_000, 40_000),
        ),
        annotations=(
            mark("0F0", 0, 26_000),
            mark("wait F of stage 2, micro-batch 0", 100, 5000),
            mark("attn(F) layer 0", 5100, 15_000),
            mark("dispatch(F) layer 0", 15_000, 21_000, MOVES),
            mark("wait dispatch(F) layer 0", 15_000, 22_000),
            mark("mlp(F) layer 0", 22_000, 26_000),
            mark("0W0", 30_000, 40_000),
            mark("mlp(W) layer 0", 30_000, 40_000),
        ),
        on_gpu=False,
        rank=0,
        world_size=1,
    )
    found = compared(simple(), [trace])
    assert [(a.name, a.measured) for a in found.actions] == [("0F0", 21_000), ("0W0", 10_000)]
    assert {(p.kind, p.part, p.phase): p.measured for p in found.ranks[0].parts} == {
        ("F", COMPUTING, "attn(F)"): 9900,
        ("F", TRANSFER, "dispatch(F)"): 6000,
        ("F", WAITING, "dispatch(F)"): 1000,
        ("F", COMPUTING, "mlp(F)"): 4000,
        ("F", STANDING, ""): 100,
        (BETWEEN, STANDING, ""): 4000,
        ("W", COMPUTING, "mlp(W)"): 10_000,
    }
    adds_up(found)
    (dispatch,) = (phase for phase in found.phases if phase.name == "dispatch(F)")
    assert (dispatch.measured, dispatch.waiting, dispatch.count) == (6000, 0, 1)


def test_ranges_on_the_device_serve_where_launches_are_not_told() -> None:
    marked = gpu_trace([[forward(), weights(25_000)]])
    trace = replace(
        marked,
        activities=tuple(a._replace(launched=None, launcher=None) for a in marked.activities),
        annotations=(
            Annotation("0F0", 0, 16_000, None, "stream 7"),
            Annotation("0F0", 10_000, 20_000, None, "stream 9"),
            Annotation("0W0", 25_000, 35_000, None, "stream 7"),
        ),
    )
    found = compared(simple(phases=False), [trace])
    assert [(a.name, a.measured) for a in found.actions] == [("0F0", 20_000), ("0W0", 10_000)]
