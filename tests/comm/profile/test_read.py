"""What is made of a trace's events: times, launches, copies, annotations, collectives, devices."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.comm.profile.metadata import all_groups, groups
from counterflow.comm.profile.read import read
from counterflow.comm.profile.trace import Activity, Annotation, Exchange, Trace

Event = dict[str, Any]


def event(category: str, name: str, start: Any, duration: Any, **args: Any) -> Event:
    """A range; on the device for the categories of its activities, else of thread 11 of 10."""
    on_device = category in ("kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation")
    where = {"pid": 0, "tid": 7} if on_device else {"pid": 10, "tid": 11}
    times = {"ts": start, "dur": duration}
    return {"ph": "X", "cat": category, "name": name, **where, **times, "args": args}


@pytest.fixture
def reading(tmp_path: Path) -> Any:
    """Writes events, with other top-level keys, to a file and reads it."""

    def read_events(*events: Event, name: str = "trace.json", **top: Any) -> Trace:
        path = tmp_path / name
        path.write_text(json.dumps({**top, "traceEvents": events}), encoding="utf-8")
        return read(path)

    return read_events


def test_a_kernel_has_its_grid_stream_device_and_launch(reading: Any) -> None:
    trace = reading(
        event("kernel", "k", 30, 5, grid=[20, 2, 1], block=[320, 1, 1], stream=27, device=3),
        event("kernel", "launched", 40, 5, stream=7, device=0, correlation=8),
        event("cuda_driver", "cuLaunchKernelEx", 12, 1, correlation=8),
    )
    assert trace.activities == (
        Activity(
            "k", 30_000, 35_000, "kernel", "stream 27", 3, None, None, (20, 2, 1), (320, 1, 1)
        ),
        Activity("launched", 40_000, 45_000, "kernel", "stream 7", 0, 12_000, (10, 11)),
    )
    assert trace.on_gpu
    assert trace.num_events == 3
    assert trace.missing == ("1 of 2 activities of the GPU have no launch in the trace",)


@pytest.mark.parametrize("category", ["cuda_runtime", "cuda_driver", "hip_runtime"])
@pytest.mark.parametrize("launch_first", [True, False])
def test_a_launch_is_found_before_or_after_what_it_launched(
    reading: Any, category: str, launch_first: bool
) -> None:
    launch = event(category, "launch", 1, 1, correlation=5)
    kernel = event("kernel", "k", 2, 1, correlation=5)
    trace = reading(*((launch, kernel) if launch_first else (kernel, launch)))
    assert (trace.activities[0].launched, trace.activities[0].launcher) == (1000, (10, 11))
    assert trace.missing == ()


def test_copies_and_fills_tell_their_bytes(reading: Any) -> None:
    trace = reading(
        event("gpu_memcpy", "Memcpy DtoH", 1, 1, bytes=4096, stream=7, device=0),
        event("gpu_memset", "Memset (Device)", 3, 0, bytes=8, stream=7, device=0),
    )
    assert [(a.kind, a.num_bytes) for a in trace.activities] == [("memcpy", 4096), ("memset", 8)]


def test_activities_come_by_start_and_outer_annotations_before_inner(reading: Any) -> None:
    trace = reading(
        event("user_annotation", "inner", 10, 5),
        event("kernel", "late", 20, 1),
        event("user_annotation", "outer", 10, 50),
        event("kernel", "early", 10, 1),
        event("gpu_user_annotation", "drawn", 12, 4),
    )
    assert [a.name for a in trace.activities] == ["early", "late"]
    assert trace.annotations == (
        Annotation("outer", 10_000, 60_000, (10, 11)),
        Annotation("inner", 10_000, 15_000, (10, 11)),
        Annotation("drawn", 12_000, 16_000, None, "stream 7"),
    )


@given(st.integers(0, 2 * 10**18), st.integers(0, 10**12))
def test_times_are_exact_however_they_are_written(
    tmp_path_factory: pytest.TempPathFactory, start: int, length: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "times.json"

    def us(ns: int) -> str:
        return f"{ns // 1000}.{ns % 1000:03}"

    written = [
        (us(start), us(length)),
        (f'"{us(start)}"', f'"{us(length)}"'),
        (f"{Decimal(start) / 1000:e}", f"{Decimal(length) / 1000:e}"),
    ]
    if start % 1000 == length % 1000 == 0:
        written.append((str(start // 1000), str(length // 1000)))
    kernel = '{"ph": "X", "cat": "kernel", "name": "k", "ts": %s, "dur": %s, "pid": 0, "tid": 7}'
    path.write_text("[" + ",".join(kernel % each for each in written) + "]")
    assert {(a.start, a.end) for a in read(path).activities} == {(start, start + length)}


def test_a_range_may_be_told_by_its_beginning_and_its_end(reading: Any) -> None:
    thread = {"pid": 10, "tid": 11}
    beginnings = [
        {"ph": "B", "cat": "user_annotation", "name": name, "ts": ts, **thread}
        for name, ts in (("outer", "5.250"), ("inner", 7))
    ]
    trace = reading(
        *beginnings,
        {"ph": "E", "ts": 9, **thread},
        {"ph": "E", "ts": "12.125", "pid": 10, "tid": 12},
        {"ph": "E", "ts": "12.125", **thread},
        beginnings[0] | {"ts": 20},
        event("kernel", "k", 1, 1),
    )
    assert trace.annotations == (
        Annotation("outer", 5250, 12_125, (10, 11)),
        Annotation("inner", 7000, 9000, (10, 11)),
    )
    assert "2 ranges lack their beginning or end and were left out" in trace.missing


NCCL = {
    "Collective name": "all_to_allv",
    "In msg nelems": 12,
    "Out msg nelems": 10,
    "dtype": "BFloat16",
    "In split size": "[4, 8]",
    "Out split size": [5, 5],
    "Group size": 2,
    "Process Group Name": "3",
    "Process Group Ranks": "[0, 1]",
    "Seq": 41,
}
DESCRIBED = Exchange("all_to_allv", 24, 20, "3", 2, 41, (4, 8), (5, 5), (0, 1))


def test_a_collective_is_described_by_its_kernel(reading: Any) -> None:
    trace = reading(event("kernel", "ncclDevKernel_SendRecv", 1, 1, **NCCL))
    assert trace.activities[0].exchange == DESCRIBED


def test_a_collective_is_described_by_the_operator_that_launched_it(reading: Any) -> None:
    operator = event("cpu_op", "record_param_comms", 0, 1, **NCCL, **{"External id": 77})
    kernels = [event("kernel", "nccl", 1, 1, **{"External id": ext}) for ext in (77, 78)]
    for order in ((operator, *kernels), (*kernels, operator)):
        trace = reading(*order)
        assert [a.exchange for a in trace.activities] == [DESCRIBED, None]


@pytest.mark.parametrize(
    ("dtype", "sent"), [("Float8_e4m3fn", 12), ("Half", 24), ("Int", 48), ("Long", 96), ("?", None)]
)
def test_sizes_follow_from_the_type_of_elements(reading: Any, dtype: str, sent: int | None) -> None:
    trace = reading(event("kernel", "nccl", 1, 1, **{**NCCL, "dtype": dtype}))
    assert trace.activities[0].exchange.sent_bytes == sent


def test_splits_that_are_cut_short_are_not_told(reading: Any) -> None:
    trace = reading(event("kernel", "nccl", 1, 1, **{**NCCL, "In split size": "[4, 8, ...]"}))
    assert trace.activities[0].exchange.sent_splits == ()


@pytest.mark.parametrize("after", [True, False])
def test_rank_device_and_clock_are_told_before_or_after_the_events(
    tmp_path: Path, after: bool
) -> None:
    devices = [{"id": idx, "name": f"GPU {idx}", "numSms": 100 + idx} for idx in range(3)]
    top = {
        "baseTimeNanoseconds": 1_790_857_026_000_000_000,
        "distributedInfo": {"backend": "nccl", "rank": 5, "world_size": 64},
        "deviceProperties": devices,
    }
    events = {"traceEvents": [event("kernel", "k", 1, 1, device=2)]}
    path = tmp_path / "rank9.json"
    path.write_text(json.dumps({**events, **top} if after else {**top, **events}))
    trace = read(path)
    assert (trace.rank, trace.world_size, trace.num_sms) == (5, 64, 102)
    assert (trace.device_name, trace.clock_ns) == ("GPU 2", 1_790_857_026_000_000_000)


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("rank3.json", 3),
        ("rank_12.pt.trace.json", 12),
        ("profile-rank-0.json", 0),
        ("trace.Rank7.json", 7),
        ("node1_rank2_step5.json", 2),
        ("host_4711.1740461679470.pt.trace.json", None),
        ("crank3.json", None),
    ],
)
def test_the_rank_may_stand_in_the_name_of_the_file(
    reading: Any, name: str, rank: int | None
) -> None:
    assert reading(event("kernel", "k", 1, 1), name=name).rank == rank


def test_on_a_cpu_transfers_of_the_backends_own_threads_are_activities_too(reading: Any) -> None:
    trace = reading(
        event("cpu_op", "aten::mul", 5, 2),
        event("user_annotation", "gloo:all_reduce", 4, 9) | {"tid": 12},
        event("user_annotation", "gloo:recv", 1, 30),  # posted here, while other work goes on
        deviceProperties=[],
    )
    assert [one.name for one in trace.activities] == ["gloo:all_reduce", "aten::mul"]
    assert trace.activities[0].launcher == (10, 12)


def test_without_kernels_operators_are_the_activities(reading: Any) -> None:
    named = {"ph": "M", "name": "thread_name", "pid": 10, "tid": 11, "args": {"name": "autograd"}}
    for devices in ([], [{"id": 0, "name": "GPU"}]):
        trace = reading(
            named,
            event("cpu_op", "aten::mul", 5, 2),
            event("cpu_op", "aten::linear", 5, 4),
            event("cpu_op", "aten::add", 4, 1) | {"tid": 12},
            event("user_annotation", "forward", 3, 9),
            event("user_annotation", "wait", 4, 1) | {"tid": 12},
            event("cuda_runtime", "cudaGetDeviceCount", 1, 1),
            deviceProperties=devices,
        )
        assert not trace.on_gpu
        assert trace.activities == (
            Activity("aten::add", 4000, 5000, "operator", "thread 12", -1, launcher=(10, 12)),
            Activity("aten::linear", 5000, 9000, "operator", "autograd", -1, launcher=(10, 11)),
            Activity("aten::mul", 5000, 7000, "operator", "autograd", -1, launcher=(10, 11)),
        )
        assert [each.thread for each in trace.annotations] == [(10, 11), (10, 12)]
        assert trace.missing == (
            "the trace has no kernels: operators of the CPU are analysed instead",
        )
        assert (trace.num_sms, trace.device_name) == (None, "")


def test_threads_of_one_name_have_lanes_of_their_own(reading: Any) -> None:
    operators = [event("cpu_op", "op", 1, 1) | {"pid": pid} for pid in (10, 20)]
    lanes = {activity.lane for activity in reading(*operators).activities}
    assert lanes == {"thread 11 (10, 11)", "thread 11 (20, 11)"}


def test_clocks_that_disagree_are_told(reading: Any) -> None:
    launch = event("cuda_runtime", "cudaLaunchKernel", 10, 1, correlation=5)
    assert reading(launch, event("kernel", "k", 9, 1, correlation=5)).missing == ()
    (told,) = reading(launch, event("kernel", "k", 8, 1, correlation=5)).missing
    assert "by up to 0.002 ms: the clocks of host and GPU disagree" in told
    assert "do not rely on windows named by a range, on phases" in told


@pytest.mark.parametrize("as_text", [False, True])
def test_process_groups_are_known_by_name_where_all_their_ranks_are_listed(as_text: bool) -> None:
    listed = [
        {"pg_name": "0", "pg_size": 4, "ranks": []},  # c10d's way to say all
        {"pg_name": "1", "pg_size": 2, "ranks": [1, 3]},
        {"pg_name": "2", "pg_size": 3, "ranks": "[0, 1, ...]"},
        {"pg_name": "3", "pg_size": 3, "ranks": []},
    ]

    def top(groups: list[dict[str, Any]]) -> dict[str, Any]:
        told = json.dumps(groups) if as_text else groups
        return {"distributedInfo": {"rank": 1, "world_size": 4, "pg_config": told}}

    assert groups(top(listed)) == {"0": (0, 1, 2, 3), "1": (1, 3)}
    assert all_groups(top(listed)) == ()
    assert all_groups(top(listed[:2])) == ((0, 1, 2, 3), (1, 3))
    assert groups({"distributedInfo": {"pg_config": "none"}}) == {}


def test_a_collective_has_the_ranks_that_its_trace_lists_for_its_group(tmp_path: Path) -> None:
    args = {
        "Collective name": "allreduce",
        "Process Group Name": "1",
        "Process Group Ranks": "[1, ...]",
    }
    path = tmp_path / "t.json"
    config = [{"pg_name": "1", "pg_size": 2, "ranks": [1, 3]}]
    told = {"distributedInfo": {"rank": 1, "world_size": 4, "pg_config": config}}
    path.write_text(json.dumps({"traceEvents": [event("kernel", "nccl", 1, 1, **args)], **told}))
    trace = read(path)
    assert [one.exchange.group_ranks for one in trace.activities if one.exchange] == [(1, 3)]
    assert trace.groups == ((1, 3),)


def test_garbage_collection_is_as_it_was_before(tmp_path: Path, reading: Any) -> None:
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            reading(event("kernel", "k", 1, 1))
            with pytest.raises(ValueError, match="cannot be read"):
                read(tmp_path / "none.json")
            assert gc.isenabled() == enabled
        finally:
            gc.enable()


def test_a_trace_of_torchs_profiler_is_read(tmp_path: Path) -> None:
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("forward"):
        torch.ones(4).mul(2)
    profiler.export_chrome_trace(str(tmp_path / "rank_0.json"))
    trace = read(tmp_path / "rank_0.json")
    assert trace.rank == 0
    assert {"aten::ones", "aten::mul"} <= {activity.name for activity in trace.activities}
    (forward,) = (each for each in trace.annotations if each.name == "forward")
    for activity in trace.activities:
        assert forward.start <= activity.start <= activity.end <= forward.end


def test_reading_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; import counterflow.comm.profile.read; "
        "print([m for m in ('torch', 'numpy', 'rich') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
