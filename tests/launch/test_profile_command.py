"""`counterflow profile`: what it prints and writes, what fails, and what it refuses."""

import gzip
import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from counterflow.comm.profile.classify import RULES, load_rules
from counterflow.comm.profile.read import read_all
from counterflow.launch import profile_command, simulate_progress
from counterflow.launch.cli import main
from counterflow.launch.profile_conditions import parse_condition
from counterflow.launch.profile_json import NUMBERS, PHASE_NUMBERS
from tests.clocks import least_seconds
from tests.launch.commands import Command, processor_seconds


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine says nothing on stderr, which the tests look at."""
    monkeypatch.setattr(simulate_progress, "AFTER_S", 3600.0)


_STREAMS = {"compute": 7, "comm": 20}
_DISPATCH = "void deep_ep::internode::dispatch<false, 8, false, 8>(int4*, float*)"
_COMBINE = "void deep_ep::internode::combine<false, 8, __nv_bfloat16>(int4*)"
_NOTIFY = "void deep_ep::internode::notify_dispatch<false, 8>(int const*)"
_GEMM = "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64"
# Of a training step, in us of it: annotations of the host, and what runs on the device: name,
# start, end, when it is launched, stream, blocks.
_MARKED = (
    ("0F0", 0, 30),
    ("dispatch(F) layer 3", 0, 10),
    ("mlp(F) layer 3", 10, 20),
    ("combine(F) layer 3", 20, 30),
)
_RAN = (
    (_NOTIFY, 100, 110, 1, "comm", 20),
    (_DISPATCH, 110, 150, 2, "comm", 20),
    (_GEMM, 120, 200, 11, "compute", 112),
    (_COMBINE, 190, 230, 21, "comm", 20),
    ("mystery_kernel", 240, 250, 40, "compute", 8),
)
# What that makes, in us: of the window of one step, and of its phases.
_STEP = {
    "span_ms": 150,
    "compute_ms": 90,
    "comm_ms": 90,
    "overlapped_ms": 40,
    "exposed_comm_ms": 50,
    "idle_ms": 5,
    "copy_ms": 5,
    "waiting_ms": 10,
    "exposed_waiting_ms": 10,
}
_PHASES = {
    "dispatch(F)": {"comm": 50, "exposed_comm": 20, "waiting": 10, "transfer": 40, "compute": 0},
    "mlp(F)": {"comm": 0, "exposed_comm": 0, "waiting": 0, "transfer": 0, "compute": 80},
    "combine(F)": {"comm": 40, "exposed_comm": 30, "waiting": 0, "transfer": 40, "compute": 0},
}


def events(steps: int, late: int) -> Iterator[dict[str, Any]]:
    """Events of a trace; `late`: us by which each dispatch begins later than it could."""
    correlation = 0
    for step in range(steps):
        host, device = 100 * step, 200 * step
        marked = ((f"ProfilerStep#{step + 1}", 0, 100), *_MARKED)
        for name, start, end in marked:
            place = {"ts": host + start, "dur": end - start, "pid": 1, "tid": 1}
            yield {"ph": "X", "cat": "user_annotation", "name": name, **place}
        for name, start, end, launched, stream, blocks in _RAN:
            correlation += 1
            arguments = {"correlation": correlation}
            place = {"ts": host + launched, "dur": 1, "pid": 1, "tid": 1, "args": arguments}
            yield {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernelExC", **place}
            start += late if name == _DISPATCH else 0
            of = {"stream": _STREAMS[stream], "device": 0, "grid": [blocks, 1, 1], **arguments}
            place = {"ts": device + start, "dur": end - start, "pid": 0, "tid": of["stream"]}
            yield {"ph": "X", "cat": "kernel", "name": name, **place, "args": of}
        place = {"ts": device + 235, "dur": 5, "pid": 0, "tid": 7}
        of = {"stream": 7, "device": 0, "bytes": 4096, "correlation": correlation + 1000}
        name = "Memcpy DtoH (Device -> Pageable)"
        yield {"ph": "X", "cat": "gpu_memcpy", "name": name, **place, "args": of}


def written(path: Path, *, rank: int = 0, world: int = 1, steps: int = 2, late: int = 0) -> Path:
    """A trace's file, gzipped if its name says so."""
    trace = {
        "deviceProperties": [{"id": 0, "name": "NVIDIA H800", "numSms": 132}],
        "distributedInfo": {
            "backend": "nccl",
            "rank": rank,
            "world_size": world,
            "pg_config": [{"pg_name": "0", "pg_size": world, "ranks": []}],
        },
        "traceEvents": list(events(steps, late)),
    }
    text = json.dumps(trace).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture
def trace(tmp_path: Path) -> str:
    return str(written(tmp_path / "trace.json"))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Of four ranks, the last of which comes late to every dispatch."""
    path = tmp_path / "ranks"
    path.mkdir()
    for rank in range(4):
        written(path / f"rank{rank}.json.gz", rank=rank, world=4, late=30 * (rank == 3))
    return str(path)


_COMMAND = Command("profile")
shown, printed, error_of = _COMMAND.shown, _COMMAND.printed, _COMMAND.error_of


# What is printed


def test_the_numbers_of_a_step_are_those_of_its_construction(
    capsys: pytest.CaptureFixture[str], trace: str
) -> None:
    for step in (1, 2):
        found = printed(capsys, trace, "--window", f"ProfilerStep#{step}")
        assert {key: found[key] for key in _STEP} == {k: us / 1000 for k, us in _STEP.items()}
        assert found["exposed_comm_percent"] == pytest.approx(100 * 50 / 150)
        assert found["overlapped_percent"] == pytest.approx(100 * 40 / 90)
        assert found["unknown_percent"] == pytest.approx(100 * 10 / 185)
        phases = {phase["name"]: phase for phase in found["phases"]}
        assert list(phases) == list(_PHASES)
        for name, lengths in _PHASES.items():
            of_phase = {key: phases[name][f"{key}_ms"] for key in lengths}
            assert of_phase == {key: us / 1000 for key, us in lengths.items()}
        assert phases["dispatch(F)"]["behind_ms"] == {"mlp(F)": 0.03}
        assert phases["dispatch(F)"]["exposed_comm_percent"] == pytest.approx(100 * 20 / 150)
        assert phases["dispatch(F)"]["overlapped_percent"] == pytest.approx(60)
        assert found["window"]["start_ms"] == 0.2 * (step - 1)
        assert found["window"]["name"] == f"ProfilerStep#{step}"
        assert found["sm_split"]["comm_blocks"] == 20
        assert [kernel["name"] for kernel in found["unknown"]] == ["mystery_kernel"]


def test_the_whole_trace_is_the_window_without_one(
    capsys: pytest.CaptureFixture[str], trace: str
) -> None:
    found = printed(capsys, trace)
    assert found["window"] == {"name": None, "start_ms": 0.0, "end_ms": 0.35}
    assert (found["span_ms"], found["idle_ms"], found["exposed_comm_ms"]) == (0.35, 0.06, 0.1)
    assert [phase["count"] for phase in found["phases"]] == [2, 2, 2]
    assert [(phase["name"], phase["layer"]) for phase in found["layers"]] == [
        (name, 3) for name in _PHASES
    ]


def test_milliseconds_cut_what_runs_at_their_ends(
    capsys: pytest.CaptureFixture[str], trace: str
) -> None:
    found = printed(capsys, trace, "--window", "0.015:0.095")  # within the dispatch and combine
    lengths = (found["span_ms"], found["comm_ms"], found["exposed_comm_ms"], found["compute_ms"])
    assert lengths == (0.08, 0.04, 0.005, 0.075)


def test_several_ranks_are_shown_as_means_and_each_by_itself(
    capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    found = printed(capsys, folder, "--window", "ProfilerStep#1")
    assert found["num_ranks"] == 4
    each = found["ranks"]
    assert [rank["rank"] for rank in each] == [0, 1, 2, 3]
    assert [rank["comm_ms"] for rank in each] == [0.09, 0.09, 0.09, 0.06]
    assert found["comm_ms"] == pytest.approx(sum(rank["comm_ms"] for rank in each) / 4)
    assert found["exposed_comm_percent"] == pytest.approx(
        100 * sum(r["exposed_comm_ms"] for r in each) / sum(r["span_ms"] for r in each)
    )
    (dispatch,) = [phase for phase in found["phases"] if phase["name"] == "dispatch(F)"]
    assert dispatch["count"] == 4
    assert dispatch["comm_ms"] == pytest.approx((3 * 0.05 + 0.02) / 4)
    assert found["across"]["stragglers"][0]["rank"] == 3
    alone = printed(capsys, folder, "--window", "ProfilerStep#1", "--rank", "2")
    assert alone["across"] is None
    assert alone["ranks"] == [each[2]]
    assert {key: alone[key] for key in NUMBERS} == {key: each[2][key] for key in NUMBERS}
    parts = ("compute_ms", "exposed_comm_ms", "copies_alone_ms", "idle_ms")
    for numbers in (found, *each):
        assert sum(numbers[key] for key in parts) == pytest.approx(numbers["span_ms"])
    assert found["copies_alone_ms"] > 0


def test_what_a_folder_lacks_is_told_for_one_of_its_ranks_too(
    capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    (Path(folder) / "rank1.json.gz").write_bytes(b"{")
    (told,) = [line for line in printed(capsys, folder, "--rank", "2")["missing"] if "left" in line]
    assert "rank1.json.gz" in told


def test_a_window_beyond_the_trace_is_cut_to_it_and_said(
    capsys: pytest.CaptureFixture[str], trace: str
) -> None:
    whole = printed(capsys, trace)
    found = printed(capsys, trace, "--window=-50:129")
    assert {key: found[key] for key in NUMBERS} == {key: whole[key] for key in NUMBERS}
    assert any("--window -50:129 reaches beyond" in line for line in found["missing"])
    inside = printed(capsys, trace, "--window=0.05:0.1")
    assert not any("reaches beyond" in line for line in inside["missing"])


def test_no_condition_is_judged_by_a_trace_that_breaks_off(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = written(tmp_path / "rank0.json")
    path.write_bytes(path.read_bytes()[:-400])
    status = main(["profile", str(path), "--json", "--fail-if", "exposed_comm_percent>100"])
    captured = capsys.readouterr()
    assert status == 2
    assert "breaks off" in captured.err
    assert "nothing is judged" in captured.err
    assert any("THE TRACE BREAKS OFF" in line for line in json.loads(captured.out)["missing"])


def test_a_trace_that_breaks_off_is_said_in_the_header(
    capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    path = Path(folder) / "rank1.json.gz"
    path.write_bytes(path.read_bytes()[:-40])

    def header(*arguments: str) -> str:
        text = shown(capsys, folder, *arguments)
        return text[: text.index("where the time goes")]

    assert "INCOMPLETE: of 4 traces 1 break off (rank 1)" in header()
    assert "INCOMPLETE: the trace breaks off" in header("--rank", "1")
    assert "INCOMPLETE" not in header("--rank", "2")


def test_one_of_several_gpus_is_chosen(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = written(tmp_path / "rank0.json")
    of = json.loads(path.read_text())
    kernel = {"ph": "X", "cat": "kernel", "name": "nvjet_x", "pid": 1, "tid": 7}
    of["traceEvents"].append({**kernel, "ts": 0, "dur": 900, "args": {"device": 1, "stream": 7}})
    path.write_text(json.dumps(of))
    alone = printed(capsys, str(written(tmp_path / "other.json")))
    found = printed(capsys, str(path))
    assert {key: found[key] for key in NUMBERS} == {key: alone[key] for key in NUMBERS}
    assert "left out are GPU 1 (1 activities)" in found["missing"][0]
    assert printed(capsys, str(path), "--device", "1")["span_ms"] == 0.9
    assert "nothing ran on GPU 2" in error_of(capsys, str(path), "--device", "2")


def test_text_says_what_is_exposed_where_and_in_which_window(
    capsys: pytest.CaptureFixture[str], trace: str
) -> None:
    text = shown(capsys, trace, "--window", "ProfilerStep#1")
    lines = text.splitlines()
    assert "; rank 0 of 1; NVIDIA H800 with 132 SMs" in " ".join(lines[:3])
    joined = " ".join(text.split())
    assert "exposed: 0.050 ms, 33.3 % of the span; of it 60.0 % in combine(F), 40.0 %" in joined
    window = "ProfilerStep#1, 0.000 to 0.150 ms"
    assert joined.count(window) == 5  # totals, phases, stretches, kernels, the unknown one
    phases = next(i for i, line in enumerate(lines) if line.startswith("phases, ms"))
    dispatch = next(line for line in lines[phases:] if line.startswith("dispatch(F)"))
    assert dispatch.split()[-2:] == ["mlp(F)", "60%"]
    assert "communication launches 20 blocks" in joined
    assert "WARNING: what no rule names, 5.4 % of the time of all kernels" in joined
    assert "layer 3" not in text
    assert "combine(F) layer 3" in shown(capsys, trace, "--layers")


def test_what_no_rule_names_is_said_once_and_waiting_only_where_it_can_be_told(
    capsys: pytest.CaptureFixture[str], trace: str
) -> None:
    """dispatch(F) has a notification; combine(F) has no kernel that only waits."""
    text = shown(capsys, trace, "--window", "ProfilerStep#1")
    joined = " ".join(text.split())
    assert joined.count("no rule") == 1
    assert "How much of the communication of combine(F) is waiting for other ranks" in joined
    title = "exposed communication"
    rows = text[text.index(title) :].splitlines()
    assert {row.split()[0]: row.split()[-1] for row in rows[2:4]}["combine(F)"] == "-"
    found = printed(capsys, trace)
    known = {phase["name"]: phase["waiting_known"] for phase in found["phases"]}
    assert (known["dispatch(F)"], known["combine(F)"]) == (True, False)
    assert found["waiting_known"] is found["ranks"][0]["waiting_known"] is True


def test_collectives_without_phases_are_shown_with_their_bandwidths_and_without_waiting(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two all-gathers of 8 MB in 8 ranks, each in 40 us, the half of one behind a product."""
    monkeypatch.setenv("COLUMNS", "120")
    told = {
        "Collective name": "_allgather_base",
        "In msg nelems": 500_000,
        "Out msg nelems": 4_000_000,
        "dtype": "BFloat16",
        "Process Group Name": "1",
        "Group size": 8,
    }
    gather = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    kernels = [(gather, 0, 40, 20, told), (gather, 60, 100, 20, told), (_GEMM, 20, 60, 7, {})]
    ran = [
        {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": end - start, "pid": 0}
        | {"tid": stream, "args": {"stream": stream, "device": 0, **more}}
        for name, start, end, stream, more in kernels
    ]
    path = tmp_path / "gathers.json"
    path.write_text(json.dumps({"traceEvents": ran}), encoding="utf-8")
    text = shown(capsys, str(path))
    head, row = text[text.index("phases, ms") :].splitlines()[1:3]
    assert head.split()[-2:] == ["algbw", "busbw"]
    values = dict(
        zip(head.split()[1:5], row.removeprefix("all_gather [group 1]").split(), strict=False)
    )
    assert values == {"runs": "2", "comm": "0.080", "waiting": "-", "transfer": "0.080"}
    assert row.split()[-2:] == ["200", "175"]
    waiting = [
        line.split()
        for line in text.splitlines()
        if re.search("of it waiting|waiting in all", line)
    ]
    assert len(waiting) == 2
    assert all(words[-3:] == ["-", "-", "-"] for words in waiting)
    assert main(["profile", str(path), "--fail-if", "waiting_ms>5"]) == 2
    assert "waiting_ms>5: cannot be judged" in capsys.readouterr().err
    found = printed(capsys, str(path))
    assert found["waiting_known"] is False
    assert (found["phases"][0]["algorithm_gbps"], found["phases"][0]["bus_gbps"]) == (200, 175)
    assert [k["bus_gbps"] for k in found["kernels"]] == [175, None]


def test_a_late_stretch_names_the_waiting_before_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A notification waits for 90 us behind a product, and then 30 of 100 us are exposed."""
    kernels = [(_NOTIFY, 0, 90, 20), (_DISPATCH, 90, 190, 20), (_GEMM, 0, 160, 7)]
    ran = [
        {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": end - start, "pid": 0}
        | {"tid": stream, "args": {"stream": stream, "device": 0}}
        for name, start, end, stream in kernels
    ]
    path = tmp_path / "late.json"
    path.write_text(json.dumps({"traceEvents": ran}), encoding="utf-8")
    said = " ".join(shown(capsys, str(path)).split())
    assert "at 0.160 ms is probably late: before it its stream waited 0.090 ms for other" in said
    assert printed(capsys, str(path))["exposed"][0]["waited_before_ms"] == 0.09


def test_top_limits_what_is_listed_and_says_so(
    capsys: pytest.CaptureFixture[str], trace: str
) -> None:
    text = shown(capsys, trace, "--top", "1")
    assert "2 of 6 kernels" not in text
    assert "1 of 6 kernels, those with most time" in text
    assert "the longest 1 of" in text
    assert len(printed(capsys, trace, "--top", "1")["kernels"]) == 6


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_lines_keep_the_width_and_tables_are_not_cut(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    columns: int,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(folder)
    text = shown(capsys, ".", "--layers", "--window", "ProfilerStep#1")
    assert max(map(len, text.splitlines())) <= columns
    assert "…" not in text
    assert ("hides behind" in text, "transfer" in text) == (columns >= 80, True)


def test_a_terminal_gets_bold_heads_and_a_pipe_no_escapes(trace: str) -> None:
    command = [sys.executable, "-m", "counterflow", "profile", trace]
    piped = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    assert b"\x1b" not in piped
    reader, writer = pty.openpty()
    process = subprocess.Popen(command, stdout=writer, stderr=writer)
    os.close(writer)
    seen = b""
    try:
        while block := os.read(reader, 4096):
            seen += block
    except OSError:  # how a terminal ends
        pass
    os.close(reader)
    assert process.wait(timeout=60) == 0
    assert b"where the time goes" in seen
    assert b"\x1b[" in seen  # rich draws the heads of tables


def test_what_takes_long_says_so_where_no_terminal_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trace: str
) -> None:
    monkeypatch.setattr(simulate_progress, "AFTER_S", 0.0)
    told = threading.Event()
    say = profile_command._Reading._say

    def say_and_tell(progress: profile_command._Reading) -> None:
        say(progress)
        told.set()

    def wait_for_it(*arguments: Any, **more: Any) -> Any:
        assert told.wait(60)
        return read_all(*arguments, **more)

    monkeypatch.setattr(profile_command._Reading, "_say", say_and_tell)
    monkeypatch.setattr("counterflow.comm.profile.read.read_all", wait_for_it)
    assert main(["profile", trace, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["num_ranks"] == 1
    assert captured.err == "counterflow: reading traces; this takes a while\n"


# Where traces come from


def test_a_runs_folder_is_taken_by_its_traces(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "mine"
    (run / "traces" / "step5").mkdir(parents=True)
    (run / "result.json").write_text("{}", encoding="utf-8")
    for rank in (0, 1):
        written(run / "traces" / "step5" / f"rank{rank}.json.gz", rank=rank, world=2)
    assert printed(capsys, str(run))["num_ranks"] == 2
    assert printed(capsys, str(run / "traces"))["num_ranks"] == 2
    (run / "traces" / "steps12-13").mkdir()
    written(run / "traces" / "steps12-13" / "rank0.json.gz")
    for path in (run, run / "traces"):
        told = error_of(capsys, str(path))
        assert told.endswith(f"name one of {run}/traces/step5, {run}/traces/steps12-13")
    assert printed(capsys, str(run / "traces" / "step5"))["num_ranks"] == 2


def test_what_is_missing_is_told(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    (Path(folder) / "rank1.json.gz").unlink()
    (Path(folder) / "rank2.json.gz").write_bytes(b"{")
    found = printed(capsys, folder)
    assert [rank["rank"] for rank in found["ranks"]] == [0, 3]
    told = " ".join(found["missing"])
    assert "rank2.json.gz" in told
    assert "no trace of rank 1-2, of 4 ranks" in told
    text = shown(capsys, folder)
    assert "note: left out" in text
    assert "INCOMPLETE: there is no trace of ranks 1, 2" in text[: text.index("where the time")]


def test_a_users_rules_come_before_the_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, trace: str
) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text(
        '[[kernel]]\nmatch = "mystery"\ngroup = "communication"\nrole = "allreduce"\n',
        encoding="utf-8",
    )
    found = printed(capsys, trace, "--kernels", str(rules), "--window", "ProfilerStep#1")
    assert found["unknown"] == []
    assert (found["comm_ms"], found["exposed_comm_ms"]) == (0.1, 0.06)
    assert "WARNING" not in shown(capsys, trace, "--kernels", str(rules))


def test_phases_may_have_other_names(capsys: pytest.CaptureFixture[str], trace: str) -> None:
    found = printed(capsys, trace, "--phases", r"0F\d|dispatch\(F\)")
    assert [phase["name"] for phase in found["phases"]] == ["dispatch(F)", "0F0"]


# Files


def test_files_are_written_and_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: str
) -> None:
    page, tracks = tmp_path / "page.html", tmp_path / "both.json"
    text = shown(capsys, folder, "--html", str(page), "--perfetto", str(tracks))
    assert text.splitlines()[-2:] == [f"wrote {page}", f"wrote {tracks}"]
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    drawn = json.loads(tracks.read_text(encoding="utf-8"))["traceEvents"]
    assert sum(event.get("name") == "mlp(F) layer 3" for event in drawn) == 8


def test_a_file_is_not_written_over_a_trace(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, trace: str
) -> None:
    before = Path(trace).read_bytes()
    assert "is the same file as that of TRACE" in error_of(capsys, trace, "--perfetto", trace)
    assert Path(trace).read_bytes() == before
    assert list(tmp_path.iterdir()) == [Path(trace)]


# What fails


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("exposed_comm_percent>33.3", True),
        ("exposed_comm_percent > 33.4", False),
        ("span_ms>=0.15", True),
        ("span_ms>0.15", False),
        ("span_ms<=0.15", True),
        ("span_ms<0.15", False),
        ("unknown_percent>5", True),
        ("phases.dispatch(F).overlapped_percent<80", True),
        ("phases.dispatch(F).overlapped_percent<60", False),
        ("phases.combine(F).exposed_comm_ms>2e-2", True),
        ("phases.mlp(F).count<1", False),
    ],
)
def test_a_condition_that_holds_is_told_and_exit_status_1(
    capsys: pytest.CaptureFixture[str], trace: str, condition: str, holds: bool
) -> None:
    arguments = [trace, "--window", "ProfilerStep#1", "--json", "--fail-if", condition]
    assert main(["profile", *arguments]) == holds
    captured = capsys.readouterr()
    assert json.loads(captured.out)["span_ms"] == 0.15  # printed all the same
    assert captured.err.count("\n") == holds
    assert captured.err.startswith(f"counterflow: failed: {condition} (" if holds else "")


def test_every_condition_that_holds_has_its_line(
    capsys: pytest.CaptureFixture[str], trace: str
) -> None:
    conditions = ("span_ms>0", "span_ms>1e6", "idle_ms>0")
    flags = [part for condition in conditions for part in ("--fail-if", condition)]
    assert main(["profile", trace, *flags]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in lines] == ["span_ms>0", "idle_ms>0"]
    assert "(span_ms is 0.35)" in lines[0]


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("exposed_percent>5", "did you mean exposed_comm_percent?"),
        ("exposed_comm_percent", "must be KEY>NUMBER"),
        ("exposed_comm_percent=5", "must be KEY>NUMBER"),
        ("exposed_comm_percent=>5", "must be KEY>NUMBER"),
        ("exposed_comm_percent>", "must be KEY>NUMBER"),
        ("exposed_comm_percent>5%", "'5%' is no number"),
        ("exposed_comm_percent>nan", "'nan' is no number"),
        ("5<exposed_comm_percent<7", "must be KEY>NUMBER"),
        ("phases.dispatch(F)>5", "a phase and a key are needed"),
        ("phases.dispatch(F).exposed_ms>5", "did you mean exposed_comm_ms?"),
        ("phases>5", "unknown 'phases'"),
    ],
)
def test_a_condition_that_makes_no_sense_is_refused_before_reading(
    capsys: pytest.CaptureFixture[str], condition: str, words: str
) -> None:
    assert words in error_of(capsys, "/nowhere.json", "--fail-if", condition)


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("phases.dispatch(B).comm_ms>1", "unknown 'dispatch(B)'; did you mean dispatch(F)?"),
        ("phases.mlp(F).overlapped_percent<80", "cannot be told"),
        ("phases.combine(F).waiting_ms>1000", "cannot be judged"),
    ],
)
def test_a_condition_that_cannot_be_judged_is_an_error_and_no_success(
    capsys: pytest.CaptureFixture[str], trace: str, condition: str, words: str
) -> None:
    assert main(["profile", trace, "--fail-if", condition]) == 2
    assert words in capsys.readouterr().err


def test_every_documented_number_can_be_a_condition(
    capsys: pytest.CaptureFixture[str], trace: str
) -> None:
    found = printed(capsys, trace, "--window", "ProfilerStep#1")

    def numbers(of: dict[str, Any]) -> set[str]:
        return {k for k, v in of.items() if isinstance(v, int | float) and v is not True}

    assert numbers(found) - {"num_ranks"} == set(NUMBERS)
    phase = found["phases"][0]
    assert numbers(phase) - {"start_ms", "end_ms", "inferred"} == set(PHASE_NUMBERS)
    for key in NUMBERS:
        assert parse_condition(f"{key}>{found[key] - 1}").failure(found) is not None
    for key in PHASE_NUMBERS:
        condition = parse_condition(f"phases.dispatch(F).{key}>{phase[key]}")
        assert condition.failure(found) is None


# What is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("/nowhere.json",), "/nowhere.json cannot be read"),
        (("{empty}",), "holds no file that ends in .json or .json.gz"),
        (("{bad}",), "bad.json"),
        (("{trace}", "--rank", "7"), "--rank 7: there is no trace of it, but of rank 0"),
        (("{trace}", "--rank", "x"), "--rank must be a whole number from 0 up, got 'x'"),
        (("{trace}", "--top", "0"), "--top must be a whole number from 1 up, got '0'"),
        (("{trace}", "--window", "ProfilerStep#7"), "known: ProfilerStep#1, ProfilerStep#2, 0F0"),
        (("{trace}", "--window", "0F0"), "2 ranges are called '0F0'"),
        (("{trace}", "--window", "5:9"), "nothing runs then"),
        (("{trace}", "--window", "2:1"), "the start must be before the end"),
        (("{trace}", "--window", "0:inf"), "the start must be before the end"),
        (("{trace}", "--window", ""), "the name of an annotation or START:END"),
        (("{trace}", "--kernels", "/nowhere.toml"), "/nowhere.toml: cannot read the rules"),
        (("{trace}", "--kernels", "{bad}"), "not TOML"),
        (("{trace}", "--against", "/nowhere.json"), "/nowhere.json"),
        (("{trace}", "--against", "{trace}"), "simulate"),
        (("{trace}", "--html", "x.txt"), "--html x.txt: must end in .html"),
        (("{trace}", "--html", ""), "the name of a file is needed"),
        (("{trace}", "--perfetto", "/nowhere/x.json"), "there is no directory /nowhere"),
        (("{trace}", "--phases", "("), "is no regular expression"),
        ((), "TRACE"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    trace: str,
    arguments: Sequence[str],
    words: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("no json", encoding="utf-8")
    places = {"{trace}": trace, "{empty}": str(tmp_path / "empty"), "{bad}": f"{tmp_path}/bad.json"}
    told = error_of(capsys, *(places.get(argument, argument) for argument in arguments))
    assert words in told


@pytest.mark.alone
def test_it_runs_without_torch_and_numpy_and_its_help_takes_half_a_second_of_processor_time(
    tmp_path: Path, folder: str
) -> None:
    def seconds(*arguments: str) -> float:
        return processor_seconds(["profile", *arguments], without=["torch", "numpy"])

    seconds(folder, "--html", str(tmp_path / "x.html"), "--perfetto", str(tmp_path / "x.json"))
    seconds(folder, "--json")
    assert least_seconds(lambda: seconds("--help"), enough_s=0.5, tries=3) < 0.5


# What docs/profile.md says

_DOCS = (Path(__file__).parents[2] / "docs" / "profile.md").read_text(encoding="utf-8")
_PHASE_TIMES = """
unit = "ms"
[phases]
"attn(F)" = 0.9
"dispatch(F)" = 0.04
"mlp(F)" = 0.08
"combine(F)" = 0.04
"combine(B)" = 0.9
"mlp(B)" = 0.8
"dispatch(B)" = 0.7
"attn(B)" = 1.1
"mlp(W)" = 0.7
"attn(W)" = 0.4
"""


def documented(section: str) -> list[str]:
    """The keys in the first cells of a text's tables."""
    return re.findall(r"`(.*?)`", " ".join(re.findall(r"^\| (`.*?`) \|", section, re.M)))


def paths(value: object, at: str = "") -> Iterator[str]:
    """Where the entries of a JSON value lie: "a.b", or "a[].b" for what the list a holds."""
    if isinstance(value, dict) and not at.endswith(("behind_ms", "counts")):  # made of names
        for key, entry in value.items():
            yield from paths(entry, f"{at}.{key}" if at else key)
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        for entry in value:
            yield from paths(entry, f"{at}[]")
    else:
        yield at


def test_the_documented_keys_are_those_of_the_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, trace: str, folder: str
) -> None:
    (tmp_path / "costs.toml").write_text(_PHASE_TIMES, encoding="utf-8")
    sizes = ("--schedule", "1f1b", "--ranks", "1", "--microbatches", "1")
    assert main(["simulate", *sizes, "--costs", str(tmp_path / "costs.toml"), "--json"]) == 0
    simulated = tmp_path / "simulated.json"
    simulated.write_text(capsys.readouterr().out, encoding="utf-8")
    found = set(paths(printed(capsys, trace, "--against", str(simulated))))
    found |= set(paths(printed(capsys, folder)))
    written(Path(folder) / "rank2.json.gz", rank=2, world=4, steps=1)  # what does not match
    found |= set(paths(printed(capsys, folder)))
    # What is documented by "as of", or is null in one of the two.
    same = {"layers[].": "phases[].", "unknown[].": "kernels[].", "ranks[].": ""}
    same["across.phases[].shares[]."] = "across.ranks[]."
    for path in sorted(found):
        for start, other in same.items():
            if path.startswith(start) and other + path.removeprefix(start) in found:
                found.discard(path)
    found -= {"against", "against.pair", "across", "across.unmatched"}
    found -= {"across.phases", "across.stragglers", "across.imbalance"}
    keys = documented(_DOCS.partition("## JSON")[2].partition("## From")[0])
    assert len(keys) == len(set(keys))
    shared = {"unknown", "across.phases[].shares", "ranks[].window", "ranks[].phases"}
    shared |= {"ranks[].sm_split", "ranks[].missing", "against.pair.measured_ms"}
    shared |= {"against.pair.simulated_ms"}  # of a trace without actions
    assert set(keys) - shared == found


def test_the_keys_marked_for_conditions_are_those_that_conditions_take() -> None:
    rows = re.findall(r"^\| (`.*?`) \| \+,", _DOCS, re.M)
    keys = re.findall(r"`(.*?)`", " ".join(rows))
    phase = [key.removeprefix("phases[].") for key in keys if key.startswith("phases[].")]
    assert sorted(phase) == sorted(PHASE_NUMBERS)
    assert sorted(key for key in keys if "." not in key) == sorted(NUMBERS)


def test_the_documented_output_has_the_rows_and_columns_of_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trace: str
) -> None:
    monkeypatch.setenv("COLUMNS", "108")
    (documented_output,) = re.findall(r"^```\n(train.json;.*?)^```$", _DOCS, re.M | re.S)

    def shape(text: str) -> list[list[str]]:
        """Heads of tables, and the names of the rows of time."""
        lines = text.splitlines()
        heads = [line.split() for line in lines if re.match(r"(phase|name) +\w|  +ms +of", line)]
        first = next(i for i, line in enumerate(lines) if line.startswith("span"))
        return heads + [[re.split(r"  +\d", line)[0]] for line in lines[first : first + 9]]

    assert shape(documented_output) == shape(shown(capsys, trace))


def test_the_documented_rules_and_conditions_are_taken(tmp_path: Path) -> None:
    (rules,) = re.findall(r"^```toml\n(.*?)^```$", _DOCS, re.M | re.S)
    (tmp_path / "rules.toml").write_text(rules, encoding="utf-8")
    assert len(load_rules(tmp_path / "rules.toml")) == len(RULES) + 1
    conditions = re.findall(r"--fail-if '(.*?)'", _DOCS)
    assert [parse_condition(text).limit for text in conditions] == [5, 80]


def test_the_documented_python_records_a_trace_and_reads_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    record, read = re.findall(r"^```python\n(.*?)^```$", _DOCS, re.M | re.S)
    Path("traces").mkdir()
    batches = (torch.ones(64, 64) @ torch.ones(64, 64) for _ in range(12))
    exec(compile(record, "docs/profile.md", "exec"), {"batches": batches, "rank": 3})
    found = printed(capsys, "traces")
    assert [(rank["rank"], rank["on_gpu"]) for rank in found["ranks"]] == [(3, False)]
    assert "aten::mm" in {kernel["name"] for kernel in found["kernels"]}
    written(tmp_path / "train.json")
    exec(compile(read, "docs/profile.md", "exec"), {})
    assert "['dispatch(F)', 'combine(F)']" in capsys.readouterr().out
