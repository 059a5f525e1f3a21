"""Which measured actions are laid beside which simulated ones, and what cannot be compared."""

from dataclasses import replace

import pytest

from counterflow.comm.profile.against import against
from counterflow.comm.profile.analyse import analyse
from counterflow.comm.profile.comparison import BETWEEN, COMPUTING, STANDING, TRANSFER, WAITING
from counterflow.comm.profile.trace import Activity, Annotation, Thread, Trace
from tests.comm.profile.staged import (
    MAIN,
    MOVES,
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


@pytest.mark.parametrize("around", ["1F1B", "ProfilerStep#3", ""])
def test_layers_named_in_any_order_make_the_same_pairs(around: str) -> None:
    """A backward passes its layers from the last to the first, and they may be other layers."""
    simulated = simulated_of(ranks=2, microbatches=4)
    pair = next(did for did in as_simulated(simulated, 0) if did.name.startswith("("))

    def named(ran: Ran, begin: int) -> Ran:
        phase, _, layer = ran.phase.partition(" layer ")
        layer = int(layer) if phase.endswith("(F)") else 7 - int(layer)
        return Ran(f"{phase} layer {layer}", ran.lane, ran.start + begin, ran.end + begin)

    did = [Did(around, [named(ran, begin) for ran in pair.ran]) for begin in (0, 10**8)]
    if around == "ProfilerStep#3":
        did = [Did(around, [ran for one in did for ran in one.ran])]
    found = compared(simulated, [gpu_trace([did])])
    length = max(ran.end for ran in pair.ran) - min(ran.start for ran in pair.ran)
    assert found.pair == (length // 2, length // 2)
    (rank,) = found.ranks
    assert (rank.measured, rank.simulated) == (length, length)
    assert all(part.difference == 0 for part in rank.parts)


def test_a_stretch_of_one_direction_or_without_layers_is_no_pair() -> None:
    simulated = simulated_of(ranks=2, microbatches=4)
    pair = next(did for did in as_simulated(simulated, 0) if did.name.startswith("("))
    for half in ("(F)", "(B)"):
        only = [ran for ran in pair.ran if half in ran.phase]
        found = compared(simulated, [gpu_trace([[Did("1F1B", only)]])])
        assert (found.pair, found.ranks) == (None, ())
        assert "no stretch has phases of both a forward and a backward" in found.missing[-1]
    marked = gpu_trace([[Did("1F1B", pair.ran)]])
    device = [
        Annotation(ran.phase.partition(" layer")[0], ran.start, ran.end, None, "stream 9")
        for ran in pair.ran
        if ran.lane != "compute"
    ]
    found = compared(simulated, [replace(marked, annotations=tuple(device))])
    assert (found.pair, found.ranks) == (None, ())
    assert "mark no phases with layers" in found.missing[-1]


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


def test_another_number_of_pipeline_ranks_than_simulated_is_the_first_thing_said() -> None:
    ran = simulated_of("1f1b", ranks=2, microbatches=4)
    pipeline = ran_as_simulated(ran)
    copies = [replace(pipeline[rank // 2], rank=rank, world_size=4) for rank in range(4)]
    assert compared(ran, copies).missing == ()  # two pipelines of two ranks, as simulated
    other = simulated_of("1f1b", ranks=4, microbatches=4)
    assert (
        compared(other, copies)
        .missing[0]
        .startswith("the run had 2 pipeline ranks, simulated were 4, so that rows are compared")
    )
    one = simulated_of("1f1b", ranks=1, microbatches=4)
    assert "had at least 2 pipeline ranks, simulated were 1" in compared(one, copies[1:]).missing[0]
    assert "pipeline ranks" not in compared(other, copies[:2]).missing[0], "half cannot tell"
