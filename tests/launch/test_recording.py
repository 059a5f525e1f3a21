"""Traces that training records: there whole or not at all, and of use to `counterflow profile`."""

from __future__ import annotations

import gzip
import json
import logging
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterflow.comm.profile.analyse import analyse
from counterflow.comm.profile.intervals import length, union
from counterflow.comm.profile.read import read, read_all
from counterflow.comm.profile.trace import Annotation, Trace
from counterflow.launch.ranges import Range, parse_ranges
from counterflow.launch.recording import Recorder, remove_traces
from counterflow.launch.recording_config import ProfileConfig
from counterflow.parallel.mesh import Mesh, MeshShape

pytestmark = pytest.mark.alone

# Two ranks that share the experts, and a schedule with pairs. Shared experts stand behind the
# routed ones, which is not the default, so that the trace shows whose order was taken.
_RUN = """
[run]
device = "cpu"
[mesh]
pp = 1
dp = 2
ep = 2
[schedule]
name = "dualpipev"
microbatches = 2
[overlap]
forward = ["attn(F)", "dispatch(F)", "mlp(F)", "shared(F)", "combine(F)"]
[model]
hidden_size = 64
num_hidden_layers = 3
num_nextn_predict_layers = 0
[data]
kind = "text"
path = "text"
sequence_length = 32
[train]
steps = 3
warmup_steps = 1
constant_steps = 1
eval_batches = 1
"""
_MOVES = ("dispatch(F)", "combine(F)", "dispatch(B)", "combine(B)")


@dataclass(frozen=True)
class Run:
    """A run that recorded.

    Attributes:
        folder: of its results.
        output: what it printed.
    """

    folder: Path
    output: str


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("recorded")
    letters = random.Random(0)
    (folder / "text").mkdir()
    for number in range(20):
        text = "".join(letters.choices("etaoin shrdlu", k=2000))
        (folder / "text" / f"{number}.txt").write_text(text)
    (folder / "two.toml").write_text(_RUN)
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "OMP_NUM_THREADS")}
    arguments = ["two.toml", "--profile", "1,3"]
    done = subprocess.run(
        [sys.executable, "-m", "counterflow", "train", *arguments],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Run(folder / "runs" / "small", done.stdout + done.stderr)


def traces_of(run: Run, stretch: str) -> tuple[Trace, ...]:
    found = read_all([run.folder / "traces" / stretch])
    assert not [each for each in found.missing if "rank" in each]
    return found.traces


def named(trace: Trace, name: str) -> list[Annotation]:
    return [each for each in trace.annotations if each.name == name and each.thread is not None]


def test_each_stretch_of_steps_has_a_whole_trace_of_each_rank_and_no_leftovers(run: Run) -> None:
    traces = run.folder / "traces"
    found = sorted(str(p.relative_to(traces)) for p in traces.rglob("*") if p.is_file())
    assert found == [f"step{n}/rank{rank}.json.gz" for n in (1, 3) for rank in (0, 1)]
    for step in (1, 3):
        for rank, trace in enumerate(traces_of(run, f"step{step}")):
            assert (trace.rank, trace.world_size) == (rank, 2)
            assert trace.expert_ranks == (0, 1)
            assert len(named(trace, f"ProfilerStep#{step}")) == 1


def test_the_run_says_how_to_read_them_and_its_other_results_are_as_ever(run: Run) -> None:
    for step in (1, 3):
        assert f"counterflow profile runs/small/traces/step{step}" in run.output
    assert "USDT" not in run.output  # the profiler's own chatter
    result = json.loads((run.folder / "result.json").read_text())
    assert result["traces"] == ["traces/step1", "traces/step3"]
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3]
    assert (run.folder / "timeline.json").exists()


def test_moves_stand_on_a_thread_of_their_own_beside_what_computes(run: Run) -> None:
    for trace in traces_of(run, "step3"):
        (step,) = named(trace, "ProfilerStep#3")
        main = step.thread
        for layer in (1, 2):
            for move in _MOVES:
                marks = named(trace, f"{move} layer {layer}")
                beside = [each for each in marks if each.thread != main]
                assert len(beside) == 2  # a micro-batch each
                assert all(each.end > each.start for each in beside)
                assert any(each.thread == main for each in marks)  # where it was started
                waits = named(trace, f"wait {move} layer {layer}")
                assert {each.thread for each in waits} == {main}
        threads = {each.thread for move in _MOVES for each in named(trace, f"{move} layer 1")}
        assert len(threads) == 2


def test_phases_run_in_the_order_that_the_configuration_gives(run: Run) -> None:
    for trace in traces_of(run, "step3"):
        alone = [each for each in trace.annotations if each.name in ("0F0", "1F0")]
        assert alone
        for step in alone:
            within = [
                each.name
                for each in trace.annotations
                if each.thread == step.thread and step.start <= each.start < step.end
            ]
            for layer in (1, 2):
                if f"shared(F) layer {layer}" in within:
                    routed = within.index(f"mlp(F) layer {layer}")
                    assert routed < within.index(f"shared(F) layer {layer}")


def test_nothing_long_of_a_step_is_without_a_name(run: Run) -> None:
    shares: list[float] = []
    for number, trace in ((n, trace) for n in (1, 3) for trace in traces_of(run, f"step{n}")):
        (step,) = named(trace, f"ProfilerStep#{number}")
        labelled = length(
            union(
                (each.start, each.end)
                for each in trace.annotations
                if each.thread == step.thread and step.start < each.start and each.end < step.end
            )
        )
        shares.append(labelled / (step.end - step.start))
        names = {each.name for each in trace.annotations}
        assert names >= {"data", "optimizer", "mean of gradients", "gradient norm"}
        assert names >= {"wait a sum of gradients", "wait the losses", "wait the experts' loads"}
    assert max(shares) > 0.9  # of the best: a pause may fall anywhere, but does not hit all


def test_the_profiler_finds_every_phase_and_hidden_communication(run: Run) -> None:
    for trace in traces_of(run, "step3"):
        report = analyse(trace)
        assert not trace.on_gpu
        totals = report.totals
        assert 0 < totals.overlapped < totals.comm < totals.span
        assert totals.overlapped + totals.exposed == totals.comm
        phases = {phase.name: phase for phase in report.phases if phase.layer is None}
        for move in _MOVES:
            assert 0 < phases[move].comm < totals.comm
            assert 0 <= phases[move].exposed <= phases[move].comm
        for phase in ("attn(F)", "mlp(F)", "shared(F)", "mlp(B)", "mlp(W)", "attn(B)", "attn(W)"):
            assert phases[phase].compute > 0
            assert phases[phase].comm == 0
        layers = {layer.layer for layer in report.layers if layer.name == "dispatch(F)"}
        assert layers == {1, 2}


_KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from counterflow.launch import recording
from counterflow.launch.recording_config import ProfileConfig
from counterflow.parallel.mesh import Mesh, MeshShape

def half(profiler, path):
    path.write_bytes(b"half of a trace")
    os.kill(os.getpid(), signal.SIGKILL)

recording._export = half
device = torch.device("cpu")
config = ProfileConfig("2")
mesh = Mesh(MeshShape(dp=4), 3)
recorder = recording.Recorder(config, mesh, device, Path(sys.argv[1]), lambda what: None)
recorder.before(2)
with recorder.step(2):
    torch.ones(3).sum()
recorder.after(2)
"""


def test_a_run_that_is_killed_while_it_writes_leaves_no_broken_trace(tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    command = [sys.executable, "-c", _KILLED, str(folder)]
    assert subprocess.run(command, check=False, timeout=60).returncode < 0
    (left,) = [path for path in folder.rglob("*") if path.is_file()]
    assert left.read_bytes() == b"half of a trace"
    assert not left.name.endswith((".json", ".json.gz"))  # so that no reader takes it for one
    remove_traces(folder)
    assert not folder.exists()


def recorder(config: ProfileConfig, folder: Path, rank: int = 0) -> tuple[Recorder, list[str]]:
    waits: list[str] = []
    mesh = Mesh(MeshShape(dp=8), rank)
    return Recorder(config, mesh, torch.device("cpu"), folder, waits.append), waits


def test_ranks_that_do_not_record_wait_for_those_that_do(tmp_path: Path) -> None:
    made, waits = recorder(ProfileConfig("2-3", ranks="0,4-5"), tmp_path / "traces", rank=3)
    folders = []
    for step in (1, 2, 3, 4):
        made.before(step)
        with made.step(step):
            assert not torch.autograd.profiler._is_profiler_enabled
        folders.append(made.after(step))
    assert waits == ["the ranks' profilers", "the ranks' traces"]
    assert folders == [None, None, tmp_path / "traces" / "steps2-3", None]
    assert not (tmp_path / "traces").exists()


def test_a_trace_that_cannot_be_written_is_told_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "traces").write_text("in the way")
    made, _ = recorder(ProfileConfig("1"), tmp_path / "traces", rank=0)
    made.before(1)
    with made.step(1):
        torch.ones(3).sum()
    with caplog.at_level(logging.WARNING):
        made.after(1)
    assert "rank 0: no trace in" in caplog.text


def test_an_error_within_a_recorded_step_ends_the_profiler(tmp_path: Path) -> None:
    made, _ = recorder(ProfileConfig("1-2"), tmp_path / "traces")
    made.before(1)
    made.close()
    assert not torch.autograd.profiler._is_profiler_enabled
    assert not (tmp_path / "traces").exists()


def test_a_trace_tells_its_ranks_place_among_all(tmp_path: Path) -> None:
    mesh = Mesh(MeshShape(pp=2, dp=4, ep=2), 7)
    made = Recorder(ProfileConfig("1"), mesh, torch.device("cpu"), tmp_path, lambda what: None)
    made.before(1)
    with made.step(1):
        torch.ones(3).sum()
    made.after(1)
    path = tmp_path / "step1" / "rank7.json.gz"
    with gzip.open(path) as file:
        told = json.load(file)["counterflow"]
    ranks = {"expert_ranks": [6, 7], "pipeline_ranks": [3, 7]}
    assert told == {"pp_rank": 1, "dp_rank": 3, "ep_rank": 1, **ranks}
    assert read(path).expert_ranks == (6, 7)


def test_steps_of_a_stretch_are_in_one_trace(tmp_path: Path) -> None:
    made, _ = recorder(ProfileConfig("2-3"), tmp_path / "traces")
    for step in (1, 2, 3, 4):
        made.before(step)
        with made.step(step):
            torch.ones(3).sum()
        made.after(step)
    trace = read(tmp_path / "traces" / "steps2-3" / "rank0.json.gz")
    steps = [each.name for each in trace.annotations if each.name.startswith("ProfilerStep")]
    assert steps == ["ProfilerStep#2", "ProfilerStep#3"]


def test_other_files_in_the_folder_of_traces_are_not_removed(tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    (folder / "step1").mkdir(parents=True)
    (folder / "step1" / "rank0.json.gz").write_bytes(b"")
    (folder / "mine.txt").write_text("notes")
    remove_traces(folder)
    assert [path.name for path in folder.rglob("*")] == ["mine.txt"]
    remove_traces(tmp_path / "nowhere")


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), min_size=1, max_size=6))
def test_ranges_hold_the_numbers_listed_in_disjoint_runs(listed: list[tuple[int, int]]) -> None:
    text = ", ".join(str(Range(first, first + more)) for first, more in listed)
    found = parse_ranges(text)
    numbers = {n for first, more in listed for n in range(first, first + more + 1)}
    assert [n for each in found for n in range(each.first, each.last + 1)] == sorted(numbers)
    assert all(a.last + 1 < b.first for a, b in pairwise(found))
    assert parse_ranges(",".join(map(str, found))) == found


@pytest.mark.parametrize("text", ["", "x", "3-", "-3", "1,,2", "2.5", "5-3", "1-2-3", "٣"])
def test_what_is_no_list_of_ranges_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no number or range|runs backwards"):
        parse_ranges(text)
