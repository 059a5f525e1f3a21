"""One file for Perfetto: measured and simulated tracks, one below the other."""

import gzip
import json
from collections import defaultdict
from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.comm.profile.analyse import analyse
from counterflow.comm.profile.intervals import length, union
from counterflow.comm.profile.perfetto import write_perfetto
from counterflow.comm.profile.simulated import Simulated
from counterflow.comm.profile.trace import Trace
from tests.comm.profile.staged import Did, Ran, as_simulated, gpu_trace, simulated_of

# From the top; what is simulated stands right below what was measured.
TRACKS = [
    f"{track}, {what}"
    for track in ("actions", "compute", "communication", "exposed communication", "copies", "waits")
    for what in ("measured", "simulated")
]


class Shown(NamedTuple):
    """A bar of the file; times on the clock of the traces, ns."""

    process: str
    track: str
    start: int
    end: int
    name: str


class File(NamedTuple):
    """What a file shows; `threads` has the bars of each, and `order` their tracks from the top."""

    bars: list[Shown]
    threads: list[list[Shown]]
    order: dict[str, list[str]]


def written(
    path: Path,
    traces: Sequence[Trace],
    simulated: Simulated | None = None,
    offsets: Sequence[int] | None = None,
) -> File:
    write_perfetto(path, traces, [analyse(trace) for trace in traces], simulated, offsets=offsets)
    data = path.read_bytes()
    top = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data, parse_float=Decimal)
    first, events = top["otherData"]["first_ns"], top["traceEvents"]

    def named(what: str, key: str) -> dict[int, Any]:
        return {e[key]: next(iter(e["args"].values())) for e in events if e["name"] == what}

    processes, tracks = named("process_name", "pid"), named("thread_name", "tid")
    places = named("thread_sort_index", "tid")
    threads: defaultdict[int, list[Shown]] = defaultdict(list)
    of_process: dict[int, str] = {}
    for event in events:
        if event["ph"] == "X":
            start, lasts = event["ts"] * 1000, event["dur"] * 1000
            assert start == int(start) >= 0, "times are whole nanoseconds"
            assert lasts == int(lasts) >= 0
            process, tid = processes[event["pid"]], event["tid"]
            begin = first + int(start)
            of_process[tid] = process
            threads[tid].append(
                Shown(process, tracks[tid], begin, begin + int(lasts), event["name"])
            )
    assert threads.keys() == tracks.keys() == places.keys()
    order: dict[str, list[str]] = {process: [] for process in processes.values()}
    for tid in sorted(threads, key=lambda tid: places[tid]):
        order[of_process[tid]].append(tracks[tid])
    return File([bar for of in threads.values() for bar in of], list(threads.values()), order)


def in_track(file: File, track: str, process: str = "rank 0") -> list[tuple[int, int, str]]:
    return sorted(
        (bar.start, bar.end, bar.name)
        for bar in file.bars
        if (bar.track, bar.process) == (track, process)
    )


def run_of(simulated: Simulated, rank: int, *delays: int, offset: int = 0) -> Trace:
    steps = [as_simulated(simulated, rank, delay=delay) for delay in delays]
    return gpu_trace(steps, rank=rank, world_size=simulated.num_ranks, offset=offset)


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_a_run_as_simulated_shows_the_same_bars_on_neighbouring_tracks(
    tmp_path: Path, suffix: str
) -> None:
    simulated = simulated_of("dualpipe", ranks=4, microbatches=8)
    # A time of day in ns, of which microseconds in a double would lose the last digits.
    traces = [run_of(simulated, rank, 10**18 + 1, 10**18 + 10**9 + 3) for rank in range(4)]
    file = written(tmp_path / f"x{suffix}", traces, simulated, [0] * 4)
    assert list(file.order) == ["rank 0", "rank 1", "rank 2", "rank 3"]
    for process, tracks in file.order.items():
        assert tracks == [track for track in TRACKS if track in tracks]
        assert len(tracks) == 8
        for measured, below in zip(tracks[::2], tracks[1::2], strict=True):
            assert in_track(file, measured, process) == in_track(file, below, process) != []
    actions = in_track(file, "actions, measured", "rank 2")
    assert [name for _, _, name in actions] == 2 * [action.name for action in simulated.rows[2]]
    assert actions[0][0] == 10**18 + 1 + int(simulated.rows[2][0].start)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["attn(F) layer 0", "dispatch(F) layer 0", "mlp(B)", ""]),
            st.sampled_from(["compute", "communication", "waiting", "copy"]),
            st.integers(0, 100),
            st.integers(1, 60),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_bars_of_a_thread_never_overlap_and_the_time_they_cover_is_exact(
    ran: list[tuple[str, str, int, int]],
) -> None:
    runs = [Ran(phase, lane, start, start + lasts) for phase, lane, start, lasts in ran]
    trace = gpu_trace([[Did("0F0", runs)]])
    report = analyse(trace)
    with TemporaryDirectory() as folder:
        file = written(Path(folder) / "x.json", [trace])
    for thread in file.threads:
        assert all(one.end <= other.start for one, other in pairwise(thread))

    def covered(track: str) -> list[tuple[int, int]]:
        return union((start, end) for start, end, _ in in_track(file, f"{track}, measured"))

    assert covered("compute") == list(report.compute_intervals)
    assert covered("communication") == list(report.comm_intervals)
    assert covered("exposed communication") == list(report.exposed_intervals)
    assert length(covered("copies")) == report.totals.copy
    assert not any("simulated" in bar.track for bar in file.bars)


def test_phases_are_named_with_their_layer_and_waiting_apart(tmp_path: Path) -> None:
    ran = [
        Ran("attn(F) layer 3", "compute", 100, 200),
        Ran("dispatch(F) layer 3", "waiting", 150, 230),
        Ran("dispatch(F) layer 3", "communication", 230, 300),
        Ran("", "communication", 300, 310),
    ]
    file = written(tmp_path / "x.json", [gpu_trace([[Did("0F0", ran)]], rank=5, world_size=8)])
    assert in_track(file, "actions, measured", "rank 5") == [(100, 300, "0F0")]
    assert in_track(file, "compute, measured", "rank 5") == [(100, 200, "attn(F) layer 3")]
    assert in_track(file, "communication, measured", "rank 5") == [
        (150, 230, "dispatch(F) layer 3 waiting"),
        (230, 300, "dispatch(F) layer 3"),
        (300, 310, "transfer"),
    ]
    assert in_track(file, "exposed communication, measured", "rank 5") == [
        (200, 230, "dispatch(F) layer 3 waiting"),
        (230, 300, "dispatch(F) layer 3"),
        (300, 310, "transfer"),
    ]


def test_simulated_rows_begin_where_measured_ones_do(tmp_path: Path) -> None:
    simulated = simulated_of("1f1b", ranks=2, microbatches=2)
    lead = int(simulated.rows[1][0].start)
    late = [run_of(simulated, 0, 0), run_of(simulated, 1, 5000, offset=70_000)]
    apart = written(tmp_path / "x.json", late, simulated)
    for process, begin in (("rank 0", 0), ("rank 1", 75_000 + lead)):
        assert in_track(apart, "actions, measured", process)[0][0] == begin
        assert in_track(apart, "actions, simulated", process)[0][0] == begin
    # On one clock the ranks lie as simulated, and rank 1 shows as 5 us late.
    together = written(tmp_path / "x.json", late, simulated, [0, -70_000])
    assert in_track(together, "actions, measured", "rank 1")[0][0] == 5000 + lead
    assert in_track(together, "actions, simulated", "rank 1")[0][0] == lead


def test_below_a_pair_without_marked_actions_lies_a_simulated_one(tmp_path: Path) -> None:
    simulated = simulated_of("dualpipe", ranks=2, microbatches=4)
    pair = next(did for did in as_simulated(simulated, 0) if did.name.startswith("("))
    moved = [
        [ran._replace(start=ran.start + by, end=ran.end + by) for ran in pair.ran]
        for by in (0, 10**8)
    ]
    trace = gpu_trace([[Did("1F1B", ran)] for ran in moved])
    file = written(tmp_path / "x.json", [trace], simulated)
    assert in_track(file, "compute, measured") == in_track(file, "compute, simulated")
    assert len(in_track(file, "actions, simulated")) == 2
    assert in_track(file, "actions, measured") == []


def test_without_phases_the_simulation_shows_its_actions(tmp_path: Path) -> None:
    simulated = simulated_of("1f1b", ranks=2, microbatches=2)
    bare = Simulated(
        simulated.source,
        simulated.schedule,
        simulated.unit,
        simulated.makespan,
        tuple(tuple(a._replace(phases=()) for a in row) for row in simulated.rows),
    )
    file = written(tmp_path / "x.json", [run_of(simulated, 0, 0)], bare)
    assert in_track(file, "actions, measured") == in_track(file, "actions, simulated")
    assert {bar.track for bar in file.bars if "simulated" in bar.track} == {"actions, simulated"}


def test_a_trace_that_does_not_fit_the_simulation_is_refused(tmp_path: Path) -> None:
    simulated = simulated_of("1f1b", ranks=2, microbatches=2)
    trace = gpu_trace([[Did("9F9", [Ran("", "compute", 0, 5)])]], rank=0, world_size=2)
    with pytest.raises(ValueError, match="no simulated action is in the trace"):
        written(tmp_path / "x.json", [trace], simulated)
    assert not (tmp_path / "x.json").exists()
