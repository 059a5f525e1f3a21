"""A measured run beside its simulation: actions, phases, and what the difference consists of."""

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    PhaseTime,
    RankDifference,
)
from counterflow.comm.profile.findings import findings_of, not_simulated, parts_told
from counterflow.comm.profile.simulated import Simulated, SimulatedAction, SimulatedPhase
from tests.comm.profile.staged import (
    Did,
    Ran,
    adds_up,
    as_simulated,
    compared,
    forward,
    gpu_trace,
    ran_as_simulated,
    simple,
    simulated_of,
    weights,
)

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


def test_without_simulated_phases_the_difference_is_told_by_kinds_of_actions() -> None:
    trace = gpu_trace([[forward(dispatch=12_000), weights(31_000)]])
    found = compared(simple(phases=False), [trace])
    assert found.findings[1:] == (
        "0.006 ms more: forwards (F) in all (0.026 ms, simulated 0.02 ms).",
    )
    (rank,) = found.ranks
    told = parts_told(found, rank)
    assert sum(part.difference for part in told) == rank.difference
    assert {(part.part, part.phase) for part in told} == {("", "")}
    assert not_simulated(found) == ()


def test_a_phase_that_no_simulation_has_is_said_to_be_not_simulated() -> None:
    did = forward()
    shared = Ran("shared(F)", "compute", did.ran[-1].end, did.ran[-1].end + 4000)
    trace = gpu_trace([[Did(did.name, [*did.ran, shared]), weights(29_000)]])
    found = compared(simple(), [trace])
    assert not_simulated(found) == ("shared(F)",)
    assert "0.004 ms more: shared(F) computing in F (0.004 ms, not simulated)." in found.findings


def test_a_runs_ratio_is_told_only_where_it_explains_the_difference() -> None:
    part = Part("F", TRANSFER, "dispatch(F)", 9000, 4000)
    rank = RankDifference(0, 0, "1", 9000, 4000, (part,))

    def told(measured: int) -> str:
        phase = PhaseTime("dispatch(F)", "F", "communication", 4, measured, 0, 0, 6000, 4000)
        value = compared(simple(), [gpu_trace([[forward(), weights(25_000)]])])
        return findings_of(replace(value, ranks=(rank,), phases=(phase,)))[1]

    assert told(12_000).endswith("; one run took 2.00x its simulated time.")
    assert told(3000).endswith("simulated 0.004 ms).")
