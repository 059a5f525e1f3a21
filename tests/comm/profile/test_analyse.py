"""Reports of traces whose answers are counted nanosecond by nanosecond."""

import time
from dataclasses import dataclass, replace
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.comm.profile.analyse import analyse
from counterflow.comm.profile.classify import RULES, Rule
from counterflow.comm.profile.report import Exposed, Report
from counterflow.comm.profile.trace import (
    Activity,
    Annotation,
    Exchange,
    Interval,
    Trace,
    TraceError,
)
from tests.comm.profile.bitmaps import (
    BASE,
    COMPUTE,
    COPY,
    MAIN,
    PHASES,
    TRANSFER,
    UNKNOWN,
    WAIT,
    Bitmap,
    check_phase,
    lengths,
)


@dataclass(frozen=True)
class Kernel:
    """A kernel of a constructed trace: what it does, when, on which stream, in whose run."""

    name: str
    start: int
    end: int
    stream: int
    run: int  # of the constructed trace's phases; -1 for none


def trace_of(kernels: list[Kernel], phases: list[str]) -> Trace:
    """Run i of the phases is marked from 10 i to 10 i + 8 on the host, and launches within."""
    activities = [
        Activity(
            kernel.name,
            BASE + kernel.start,
            BASE + kernel.end,
            lane=f"stream {kernel.stream}",
            launched=BASE + (10 * kernel.run + 3 if kernel.run >= 0 else 9),
            launcher=MAIN,
        )
        for kernel in sorted(kernels, key=lambda one: one.start)
    ]
    marks = [
        Annotation(f"{name} layer {place % 2}", BASE + 10 * place, BASE + 10 * place + 8, MAIN)
        for place, name in enumerate(phases)
    ]
    return Trace("t", tuple(activities), tuple(marks))


def kernels_of(num_runs: int) -> st.SearchStrategy[Kernel]:
    return st.builds(
        lambda name, place, stream, run: Kernel(name, place[0], sum(place), stream, run),
        st.sampled_from([COMPUTE, TRANSFER, WAIT, COPY, UNKNOWN]),
        lengths,
        st.integers(1, 3),
        st.integers(-1, num_runs - 1),
    )


@st.composite
def constructed(draw: st.DrawFn) -> tuple[list[Kernel], list[str]]:
    phases: list[str] = draw(st.lists(st.sampled_from(PHASES), min_size=1, max_size=6))
    kernels = draw(st.lists(kernels_of(len(phases)), min_size=1, max_size=15))
    return kernels, phases


def phase_of(kernel: Kernel, phases: list[str]) -> str:
    """The phase that launched it, or else, of communication, what it does and whose it is."""
    alone = {TRANSFER: "dispatch [DeepEP]", WAIT: "wait [DeepEP]"}
    return phases[kernel.run] if kernel.run >= 0 else alone.get(kernel.name, "")


def bits(interval: Interval) -> set[int]:
    return set(range(interval[0] - BASE, interval[1] - BASE))


def check_totals(report: Report, everything: Bitmap, window: set[int]) -> None:
    compute, comm, copy = (
        one & window for one in (everything.compute, everything.comm, everything.copy)
    )
    assert report.totals._asdict() == {
        "span": len(window),
        "compute": len(compute),
        "comm": len(comm),
        "overlapped": len(comm & compute),
        "exposed": len(comm - compute),
        "idle": len(window - compute - comm - copy),
        "copy": len(copy),
        "waiting": len((everything.wait - everything.transfer) & window),
    }
    drawn = ((report.compute_intervals, compute), (report.comm_intervals, comm))
    for intervals, expected in (*drawn, (report.exposed_intervals, comm - compute)):
        covered = [bits(interval) for interval in intervals]
        assert set().union(*covered) == expected
        assert sum(map(len, covered)) == len(expected)


@settings(deadline=None)
@given(constructed(), st.one_of(st.none(), lengths))
def test_every_number_of_a_constructed_trace_is_exact(
    made: tuple[list[Kernel], list[str]], place: tuple[int, int] | None
) -> None:
    kernels, phases = made
    trace = trace_of(kernels, phases)
    if place is None:
        first, last = min(one.start for one in kernels), max(one.end for one in kernels)
        report = analyse(trace)
    else:
        first, last = place[0], sum(place) + 1
        report = analyse(trace, window=(BASE + first, BASE + last))
    window = set(range(first, last))
    everything = Bitmap()
    by_phase: dict[str, Bitmap] = {"": Bitmap()}
    by_layer: dict[tuple[str, int], Bitmap] = {}
    for kernel in kernels:
        times = set(range(kernel.start, kernel.end)) & window
        everything.add(kernel.name, times)
        name = phase_of(kernel, phases)
        by_phase.setdefault(name, Bitmap()).add(kernel.name, times)
        if kernel.run >= 0:
            by_layer.setdefault((name, kernel.run % 2), Bitmap()).add(kernel.name, times)
    check_totals(report, everything, window)
    for phase in report.phases:
        check_phase(phase, by_phase.get(phase.name, Bitmap()), by_phase, everything)
    for phase in report.layers:
        assert phase.layer is not None
        own = by_layer.get((phase.name, phase.layer), Bitmap())
        check_phase(phase, own, by_phase, everything)
    seen = {name for name, own in by_phase.items() if own.comm | own.compute | own.copy}
    assert seen - {""} <= {phase.name for phase in report.phases}
    check_stretches(report, kernels, phases)


def check_stretches(report: Report, kernels: list[Kernel], phases: list[str]) -> None:
    """The stretches cut up what is exposed, each within its own phase's communication."""
    assert [len(bits(one.interval)) for one in report.exposed] == sorted(
        (len(bits(one.interval)) for one in report.exposed), reverse=True
    )
    assert sum(one.interval[1] - one.interval[0] for one in report.exposed) == report.totals.exposed
    transfer = {at for one in kernels if one.name == TRANSFER for at in range(one.start, one.end)}
    for one in report.exposed:
        times = bits(one.interval)
        assert one.waiting == len(times - transfer)
        communicating = {
            at
            for kernel in kernels
            if kernel.name in (TRANSFER, WAIT)
            and phase_of(kernel, phases) == one.phase
            and (kernel.run % 2 if kernel.run >= 0 else None) == one.layer
            for at in range(kernel.start, kernel.end)
        }
        assert times <= communicating
        check_next(one, report, kernels, phases)


def check_next(one: Exposed, report: Report, kernels: list[Kernel], phases: list[str]) -> None:
    last = report.window[1] - BASE
    later = [
        kernel
        for kernel in kernels
        if kernel.name in (COMPUTE, UNKNOWN)
        and one.interval[1] - BASE <= kernel.start
        and kernel.start < kernel.end
        and kernel.start < last
    ]
    if later:
        first = min(kernel.start for kernel in later)
        names = {
            phases[kernel.run] if kernel.run >= 0 else ""
            for kernel in kernels
            if kernel.name in (COMPUTE, UNKNOWN) and one.interval[1] - BASE <= kernel.start <= first
        }
        assert one.next_phase in names


def test_of_nested_communication_the_outer_owns_what_is_exposed() -> None:
    kernels = [Kernel(TRANSFER, 0, 10, 1, 0), Kernel(WAIT, 2, 5, 2, 1), Kernel(WAIT, 6, 12, 3, 1)]
    report = analyse(trace_of(kernels, ["dispatch(F)", "combine(B)"]))
    assert [(one.interval, one.phase, one.waiting) for one in report.exposed] == [
        ((BASE, BASE + 10), "dispatch(F)", 0),
        ((BASE + 10, BASE + 12), "combine(B)", 2),
    ]


def test_waiting_before_a_stretch_counts_since_its_stream_could_have_caught_up() -> None:
    """Idle from 12 to 20, longer than the 6 that are exposed, and from 30 to 34, which is not."""
    kernels = [
        *(Kernel(WAIT, 0, 12, 1, 0), Kernel(WAIT, 20, 27, 1, 0), Kernel(TRANSFER, 27, 30, 1, 0)),
        *(Kernel(WAIT, 34, 38, 1, 0), Kernel(TRANSFER, 38, 60, 1, 1), Kernel(COMPUTE, 0, 54, 2, 2)),
    ]
    report = analyse(trace_of(kernels, ["dispatch(F)", "combine(B)", "mlp(F)"]))
    (stretch,) = report.exposed
    assert (stretch.phase, bits(stretch.interval)) == ("combine(B)", set(range(54, 60)))
    assert (stretch.waiting, stretch.waited_before) == (0, 7 + 4)


@settings(deadline=None)
@given(constructed())
def test_streams_and_names_add_up(made: tuple[list[Kernel], list[str]]) -> None:
    kernels, phases = made
    report = analyse(trace_of(kernels, phases))
    for lane, compute, comm in report.streams:
        own = Bitmap()
        for kernel in kernels:
            if lane == f"stream {kernel.stream}":
                own.add(kernel.name, set(range(kernel.start, kernel.end)))
        assert (compute, comm) == (len(own.compute), len(own.comm))
    expected = {
        name: (len(same), sum(one.end - one.start for one in same))
        for name, group in groupby(sorted(kernels, key=lambda one: one.name), lambda one: one.name)
        for same in [list(group)]
    }
    assert {one.name: (one.count, one.busy) for one in report.kernels} == expected
    assert [one.name for one in report.unknown] == [UNKNOWN] * (UNKNOWN in expected)
    busy = [one.busy for one in report.kernels]
    assert busy == sorted(busy, reverse=True)


def test_a_range_marked_on_the_host_stands_for_what_it_launched() -> None:
    kernels = [Kernel(COMPUTE, 30, 40, 1, 0), Kernel(TRANSFER, 35, 50, 2, 1)]
    trace = trace_of(kernels, ["mlp(F)", "dispatch(F)"])
    steps = tuple(
        Annotation(f"ProfilerStep#{step}", BASE + 10 * step, BASE + 10 * step + 9, MAIN)
        for step in (0, 1)
    )
    trace = replace(
        trace, annotations=tuple(sorted((*trace.annotations, *steps), key=lambda a: a[1]))
    )
    report = analyse(trace, window="ProfilerStep#1")
    assert report.window == (BASE + 35, BASE + 50)
    assert (report.totals.compute, report.totals.comm, report.totals.exposed) == (5, 15, 10)
    assert analyse(trace, window="ProfilerStep#0").window == (BASE + 30, BASE + 40)
    with pytest.raises(ValueError, match=r"no range is called 'step 3'; .* ProfilerStep#0, Prof"):
        analyse(trace, window="step 3")


def test_a_name_of_several_ranges_and_an_empty_window_are_refused() -> None:
    trace = trace_of([Kernel(COMPUTE, 0, 5, 1, 0)], ["mlp(F)", "mlp(F)", "mlp(F)", "attn(B)"])
    with pytest.raises(ValueError, match="2 ranges are called 'mlp\\(F\\) layer 0'"):
        analyse(trace, window="mlp(F) layer 0")
    with pytest.raises(ValueError, match="nothing that ran on the GPU was launched within"):
        analyse(trace, window="attn(B) layer 1")
    with pytest.raises(ValueError, match="the end must be after the start"):
        analyse(trace, window=(5, 5))


def test_a_trace_in_which_nothing_ran_is_refused() -> None:
    with pytest.raises(TraceError, match=r"t\.json: no kernels and no operators"):
        analyse(Trace("t.json", ()))


def test_marked_phases_without_kernels_appear_with_zeros() -> None:
    trace = trace_of([Kernel(COMPUTE, 0, 60, 1, 0)], ["mlp(F)", "attn(B)", "mlp(F)"])
    counts = {
        phase.name: (phase.count, phase.comm, phase.compute) for phase in analyse(trace).phases
    }
    assert counts == {"mlp(F)": (2, 0, 60), "attn(B)": (1, 0, 0)}


def test_what_no_rule_names_is_told_with_its_share() -> None:
    kernels = [Kernel(UNKNOWN, 0, 10, 1, -1), Kernel(COMPUTE, 0, 30, 2, -1)]
    report = analyse(trace_of(kernels, ["mlp(F)"]))
    assert any(
        "25.00 % of the time of what ran has names that are in no rule, 1 of 2" in line
        for line in report.missing
    )
    mine = (Rule("^zorp$", "communication", "dispatch"), *RULES)
    report = analyse(trace_of(kernels, ["mlp(F)"]), mine)
    assert report.unknown == ()
    assert report.totals.comm == 10


def test_bytes_are_told_where_every_transfer_tells_them() -> None:
    told = Exchange("all_to_allv", sent_bytes=700)
    nccl = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"
    kernels = [Kernel(nccl, 0, 5, 1, 0), Kernel(nccl, 5, 9, 1, 0), Kernel(nccl, 9, 12, 1, 1)]
    trace = trace_of(kernels, ["dispatch(F)", "combine(F)"])
    first, second, third = trace.activities
    told_twice = (first._replace(exchange=told), second._replace(exchange=told), third)
    report = analyse(replace(trace, activities=told_twice))
    assert [phase.sent_bytes for phase in report.phases] == [1400, None]
    (kernel,) = report.kernels
    assert (kernel.role, kernel.sent_bytes) == ("all_to_allv", 1400)


def test_grids_tell_how_the_multiprocessors_are_split() -> None:
    def kernel(name: str, blocks: int, time: int) -> Activity:
        return Activity(name, BASE, BASE + time, grid=(2, blocks // 2, 1), launcher=MAIN)

    activities = [
        kernel(COMPUTE, 112, 500),
        kernel(COMPUTE, 130, 20),  # a small product that happens to have more blocks
        kernel(COMPUTE, 4096, 300),  # not persistent
        kernel("void layer_norm::ln_bwd_kernel<int>(int)", 132, 900),
        kernel(TRANSFER, 20, 300),
        kernel(WAIT, 20, 100),
        kernel(WAIT, 8, 700),
    ]
    trace = Trace("t", tuple(activities), num_sms=132)
    assert analyse(trace).sm_split == (132, 20, 112, 400)
    split = analyse(replace(trace, num_sms=None)).sm_split
    assert split is not None
    assert (split.comm, split.compute) == (20, None)


@pytest.mark.alone
def test_a_long_trace_takes_seconds_at_most() -> None:
    """20,000 kernels and 1,000 marks take half a second of one core; four are refused."""
    kernels = [
        Activity(
            (COMPUTE, WAIT, COMPUTE, TRANSFER)[place % 4],
            BASE + 100 * place,
            BASE + 100 * place + 90 + 60 * (place % 4 == 3),
            lane=f"stream {place % 2}",
            launched=BASE + 100 * place - 40,
            launcher=MAIN,
        )
        for place in range(20_000)
    ]
    marks = [
        Annotation(f"{PHASES[place % 4]} layer {place % 61}", start, start + 1900, MAIN)
        for place in range(1_000)
        for start in [BASE - 60 + 2000 * place]
    ]
    begin = time.process_time()
    report = analyse(Trace("t", tuple(kernels), tuple(marks)))
    assert time.process_time() - begin < 4
    assert report.totals.span == 2_000_050
    assert [phase.name for phase in report.phases if "[" not in phase.name] == list(PHASES)


def test_a_trace_that_breaks_off_is_looked_at_up_to_the_first_busy_streams_end() -> None:
    """The computation of 100 to 200 comes later in the file; its stream seems to stand idle."""
    move = Activity(TRANSFER, 0, 200, lane="stream 9")
    work = [Activity(COMPUTE, at, at + 100, lane="stream 7") for at in (0, 100)]
    small = Activity(COPY, 10, 11, "memcpy", lane="stream 11")
    whole = Trace("t", (move, work[0], small, work[1]))
    assert analyse(whole).totals.exposed == 0
    cut = Trace("t", (move, work[0], small), broken="its text ends in the middle")
    report = analyse(cut)
    assert (report.window, report.totals) == ((0, 100), analyse(whole, window=(0, 100)).totals)
    assert any("stream 7 ends" in line and "later in the file" in line for line in report.missing)
    asked = analyse(cut, window=(0, 150))
    assert (asked.window, asked.totals.exposed) == ((0, 150), 50)
    assert any("the window reaches beyond" in line for line in asked.missing)
    assert not any("BREAKS OFF" in line for line in analyse(cut, window=(0, 90)).missing)
