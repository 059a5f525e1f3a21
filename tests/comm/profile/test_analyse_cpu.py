"""Reports of CPU runs: what operators and marked moves show, thread by thread."""

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.comm.profile.analyse import analyse
from counterflow.comm.profile.read import read
from counterflow.comm.profile.trace import Activity, Annotation, Thread, Trace
from tests.comm.profile.bitmaps import MAIN, MOVES, PHASES, Bitmap, check_phase, lengths


def operator(name: str, start: int, end: int, thread: Thread = MAIN) -> Activity:
    lane = f"thread {thread[1]} (python)"
    return Activity(name, start, end, "operator", lane, -1, None, thread)


def test_on_a_cpu_a_marked_move_communicates_even_while_it_sleeps() -> None:
    """The main thread computes to 40, then waits; the other thread's move lasts from 10 to 70."""
    trace = Trace(
        "t",
        (operator("aten::mm", 0, 40), operator("gloo:all_to_all", 20, 30, MOVES)),
        (
            Annotation("mlp(B) layer 1", 0, 100, MAIN),
            Annotation("dispatch(F) layer 3", 10, 70, MOVES),
            Annotation("wait dispatch(F) layer 3", 40, 70, MAIN),
        ),
        on_gpu=False,
    )
    report = analyse(trace)
    assert report.window == (0, 70)
    assert (report.totals.compute, report.totals.comm, report.totals.exposed) == (40, 60, 30)
    move = next(phase for phase in report.phases if phase.name == "dispatch(F)")
    assert (move.comm, move.exposed, move.behind) == (60, 30, {"mlp(B)": 30})
    (stretch,) = report.exposed
    assert (stretch.phase, stretch.layer, stretch.interval) == ("dispatch(F)", 3, (40, 70))
    assert not report.on_gpu
    assert report.sm_split is None
    assert any("Operators of a CPU nest" in line for line in report.missing)


@st.composite
def cpu_thread(draw: st.DrawFn, thread: Thread) -> tuple[list[Activity], list[Annotation]]:
    """Operators that overlap in any way, disjoint phases, and a wait."""
    names = st.sampled_from(["aten::mm", "gloo:all_to_all", "gloo:barrier", "zorp"])
    places = lengths.map(lambda one: (one[0], sum(one)))
    operators = draw(st.lists(st.tuples(names, places), min_size=1, max_size=6))
    cuts = sorted(draw(st.sets(st.integers(0, 80), max_size=6)))
    phases = draw(st.lists(st.sampled_from(PHASES), min_size=3, max_size=3))
    marks = [
        Annotation(name, start, end, thread)
        for name, start, end in zip(phases, cuts[::2], cuts[1::2], strict=False)
    ]
    for start, end in draw(st.lists(places, max_size=1)):
        marks.append(Annotation("wait mlp(F)", start, end, thread))
    return [operator(name, *place, thread) for name, place in operators], marks


@settings(deadline=None)
@given(cpu_thread(MAIN), cpu_thread(MOVES))
def test_every_number_of_a_cpus_threads_is_exact(
    main: tuple[list[Activity], list[Annotation]], moves: tuple[list[Activity], list[Annotation]]
) -> None:
    everything, by_phase = Bitmap(), {"": Bitmap()}
    exchanges = {"dispatch(F)", "combine(B)"}
    marked = [{mark.name for mark in marks} & set(PHASES) for _, marks in (main, moves)]
    for place, (operators, marks) in enumerate((main, moves)):
        here, there = marked[place], marked[1 - place]
        # Of a thread that computes: moved by the other, if that one does nothing else.
        started = there if here - exchanges and not there - exchanges else set[str]()
        ops = Bitmap()
        kinds = {"gloo:all_to_all": ops.transfer, "gloo:barrier": ops.wait}
        for one in operators:
            kinds.get(one.name, ops.compute).update(range(one.start, one.end))
        phase = {at: mark.name for mark in marks for at in range(mark.start, mark.end)}
        pauses = {at for at in phase if phase[at].startswith("wait ")}
        phase |= {
            at: mark.name
            for mark in marks
            for at in range(mark.start, mark.end)
            if mark.name in PHASES
        }
        waiting = ops.wait - ops.transfer
        moving = {at for at, name in phase.items() if name in exchanges - started}
        transfer = ops.transfer | (moving - pauses - waiting)
        computing = ops.compute | {at for at, name in phase.items() if name in PHASES}
        done = Bitmap(computing - transfer - waiting - pauses, transfer, waiting)
        for at in range(100):
            name = phase.get(at, "")
            of_phase = by_phase.setdefault("" if name.startswith("wait ") else name, Bitmap())
            for bitmap in (everything, of_phase):
                for kind in ("compute", "transfer", "wait"):
                    if at in getattr(done, kind):
                        getattr(bitmap, kind).add(at)
    activities = sorted(main[0] + moves[0], key=lambda one: (one.start, -one.end))
    marks = sorted(main[1] + moves[1], key=lambda one: (one.start, -one.end))
    trace = Trace("t", tuple(activities), tuple(marks), on_gpu=False)
    report = analyse(trace, window=(0, 100))
    totals = report.totals
    assert (totals.compute, totals.comm) == (len(everything.compute), len(everything.comm))
    assert totals.waiting == len(everything.wait - everything.transfer)
    assert totals.exposed == len(everything.comm - everything.compute)
    assert totals.idle == 100 - len(everything.comm | everything.compute)
    for one in report.phases:
        check_phase(one, by_phase.get(one.name, Bitmap()), by_phase, everything)
    ran = {name for name, own in by_phase.items() if own.comm | own.compute}
    assert ran - {""} <= {one.name for one in report.phases}


def test_on_a_cpu_communication_and_waits_within_an_operator_do_not_compute() -> None:
    trace = Trace(
        "t",
        (
            operator("autograd::engine::evaluate_function: Exchange", 0, 100),
            operator("c10d::allreduce_", 10, 30),
            operator("aten::empty", 12, 14),
            operator("gloo:barrier", 40, 50),
        ),
        (Annotation("wait F of stage 2, micro-batch 5", 60, 75, MAIN),),
        on_gpu=False,
    )
    totals = analyse(trace).totals
    assert (totals.compute, totals.comm, totals.waiting, totals.exposed) == (55, 30, 10, 30)
    assert totals.idle == 15


def test_on_a_cpu_time_belongs_to_the_innermost_phase_at_that_time() -> None:
    """An operator that lasts over two phases is cut between them."""
    trace = Trace(
        "t",
        (operator("aten::mm", 0, 100), operator("aten::add", 100, 120, MOVES)),
        (Annotation("attn(B)", 10, 40, MAIN), Annotation("attn(W)", 40, 90, MAIN)),
        on_gpu=False,
    )
    report = analyse(trace)
    assert [(one.name, one.compute) for one in report.phases] == [("attn(B)", 30), ("attn(W)", 50)]
    assert report.totals.compute == 120


def test_on_a_cpu_a_computing_phase_computes_between_its_operators() -> None:
    trace = Trace(
        "t",
        (operator("aten::mm", 0, 40), operator("aten::mm", 60, 100)),
        (
            Annotation("attn(F) layer 0", 0, 100, MAIN),
            Annotation("dispatch(F) layer 1", 10, 90, MOVES),
            Annotation("wait combine(F) layer 1", 45, 50, MAIN),
        ),
        on_gpu=False,
    )
    report = analyse(trace)
    assert (report.totals.compute, report.totals.comm, report.totals.exposed) == (95, 80, 5)
    assert [stretch.interval for stretch in report.exposed] == [(45, 50)]


def test_on_a_cpu_starting_a_move_that_another_thread_carries_computes() -> None:
    marks = (
        Annotation("attn(F) layer 1", 0, 40, MAIN),
        Annotation("dispatch(F) layer 1", 40, 50, MAIN),
        Annotation("dispatch(F) layer 1", 50, 90, MOVES),
    )
    ran = (operator("aten::mm", 0, 40),)
    report = analyse(Trace("t", ran, marks, on_gpu=False))
    assert (report.totals.compute, report.totals.comm) == (50, 40)
    dispatch = next(phase for phase in report.phases if phase.name == "dispatch(F)")
    assert (dispatch.compute, dispatch.comm) == (10, 40)
    assert any("Computation of dispatch(F) is the host's" in line for line in report.missing)
    # Nobody else moves it: the thread itself does, and waits meanwhile.
    alone = analyse(Trace("t", ran, marks[:2], on_gpu=False))
    assert (alone.totals.compute, alone.totals.comm, alone.totals.exposed) == (40, 10, 10)
    assert not any("is the host's" in line for line in alone.missing)


def test_on_a_cpu_a_thread_computes_on_while_a_message_that_it_posted_is_under_way(
    tmp_path: Path,
) -> None:
    """Gloo marks a message on the thread that posts it, until it is done."""

    def ran(category: str, name: str, start: int, length: int, tid: int = 1) -> dict[str, object]:
        place = {"ph": "X", "pid": 1, "tid": tid}
        return {**place, "cat": category, "name": name, "ts": start, "dur": length}

    events = [
        ran("user_annotation", "gloo:recv", 0, 90),
        ran("user_annotation", "gloo:send", 5, 80),
        ran("user_annotation", "attn(F) layer 1", 10, 30),
        ran("cpu_op", "aten::mm", 10, 20),
        ran("user_annotation", "mlp(F) layer 1", 40, 30),
        ran("user_annotation", "wait F of stage 2, micro-batch 5", 75, 10),
        ran("user_annotation", "dispatch(F) layer 1", 30, 30, tid=2),
        ran("user_annotation", "gloo:recv", 32, 26, tid=2),
        ran("user_annotation", "gloo:all_reduce", 70, 8, tid=3),
    ]
    path = tmp_path / "rank0.json"
    path.write_text(json.dumps({"deviceProperties": [], "traceEvents": events}))
    report = analyse(read(path))
    assert {one.name: (one.compute, one.comm) for one in report.phases} == {
        "attn(F)": (30_000, 0),
        "mlp(F)": (30_000, 0),
        "dispatch(F)": (0, 30_000),
    }
    totals = report.totals
    assert (totals.compute, totals.comm, totals.exposed) == (60_000, 38_000, 8_000)
