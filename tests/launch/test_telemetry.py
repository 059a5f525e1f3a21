"""What is measured of each step beside its losses."""

from __future__ import annotations

import inspect
import logging
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from counterflow.comm.waiting import WaitBoard
from counterflow.launch.config import Config
from counterflow.launch.engine import StepResult
from counterflow.launch.telemetry import Telemetry, expert_load, over_ranks, peak_resident_bytes
from counterflow.launch.telemetry_gpu import GpuMeter
from counterflow.model.flops import token_flops
from counterflow.parallel.mesh import Mesh, MeshShape
from tests import cases_telemetry
from tests.ranks import RankPool

pytestmark = pytest.mark.alone

CPU = torch.device("cpu")
LOADS = {"model.layers.1.mlp.gate": [10, 30, 20, 20], "model.layers.2.mlp.gate": [20, 20, 20, 20]}
RESULT = StepResult({"main": 2.0, "mtp": 0.5, "balance": 0.1}, 1.0, LOADS)


def telemetry(peak: float | None = None) -> tuple[Telemetry, Mesh]:
    config = Config()
    config = replace(config, metrics=replace(config.metrics, peak_tflops=peak))
    mesh = Mesh(MeshShape(pp=1, dp=2))
    return Telemetry(config, mesh, CPU), mesh


def test_waits_within_waits_and_waits_of_other_threads_do_not_count() -> None:
    board = WaitBoard()
    began = time.perf_counter()
    with board.waiting("a sum", (1,)):
        time.sleep(0.02)
        with board.waiting("a part of it", (1,)):
            time.sleep(0.02)
    elapsed = time.perf_counter() - began

    def wait() -> None:
        with board.waiting("a move", (2,)):
            time.sleep(0.1)

    other = threading.Thread(target=wait)
    other.start()
    other.join(5)
    assert 0.04 <= board.waited_s <= elapsed
    assert board.now == ""


def test_a_wait_that_fails_counts_and_the_next_one_too() -> None:
    board = WaitBoard()

    def fail() -> None:
        with board.waiting("a sum", (1,)):
            time.sleep(0.02)
            raise RuntimeError("gone")

    for _ in range(2):
        with pytest.raises(RuntimeError):
            fail()
    assert board.waited_s >= 0.04


def test_what_is_told_of_a_step() -> None:
    meter, mesh = telemetry(peak=1e-3)
    with mesh.waits.waiting("what came before the step", (1,)):
        time.sleep(0.05)
    with meter.step():
        time.sleep(0.03)
        with mesh.waits.waiting("a sum", (1,)):
            time.sleep(0.02)
    values = meter.values(1, RESULT, 1000)
    seconds = values["seconds"]
    assert seconds == meter.seconds >= 0.05
    assert values["tokens_per_second_per_gpu"] == 1000 / seconds / 2
    config = Config()
    flops = token_flops(config.model, config.data.sequence_length).published
    assert values["mfu"] == pytest.approx(flops * 500 / seconds / 1e9)
    assert 20 <= values["exposed_comm_ms"] <= 1e3 * seconds - 30
    assert values["exposed_comm_percent"] == pytest.approx(values["exposed_comm_ms"] / seconds / 10)
    peak = values["memory_gib"] * 2**30
    assert 0 <= peak_resident_bytes() - peak < 2**22  # it may have grown since, by little
    assert peak > 2**24  # torch is in it
    assert not any(key.startswith("gpu_") for key in values)


def test_without_a_known_peak_there_is_no_mfu() -> None:
    meter, _ = telemetry()
    with meter.step():
        pass
    assert meter.values(1, RESULT, 1000)["mfu"] is None


def test_loads_are_told_against_the_mean_of_their_layer() -> None:
    assert expert_load(LOADS) == {
        "expert_load_max": 1.5,
        "expert_load_min": 0.5,
        "expert_load_std": 0.25,
        "max_vio_by_layer": [0.5, 0.0],
    }
    assert expert_load({}) == {}
    nothing = expert_load({"a": [0, 0]})
    assert nothing["max_vio_by_layer"] == [None]
    assert nothing["expert_load_max"] is None


def test_the_time_that_a_rank_waits_for_a_late_one_is_exposed(ranks: RankPool) -> None:
    waited = ranks.run(cases_telemetry.late_rank, world=2, late_s=0.3)
    assert waited[0] >= 0.3
    assert waited[1] < 0.3


class NVMLError(Exception):
    """As pynvml's."""


class FakeNvml:
    """A fake of the module pynvml with one GPU; names and parameters are compared below."""

    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0
    NVMLError = NVMLError

    def __init__(self) -> None:
        self.broken = False
        self.asked: list[str] = []

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != "GPU-12ab":
            raise NVMLError("Not Found")
        return "handle"

    def _answer(self, handle: str, what: str, value: Any) -> Any:
        assert handle == "handle"
        self.asked.append(what)
        if self.broken:
            raise NVMLError("GPU is lost")
        return value

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return self._answer(handle, "power", 412_500)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        return self._answer(handle, "use", SimpleNamespace(gpu=97, memory=40))

    def nvmlDeviceGetClockInfo(self, handle: str, type: int) -> int:  # noqa: A002, N802
        assert type == self.NVML_CLOCK_SM
        return self._answer(handle, "clock", 1755)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:  # noqa: N802
        assert sensor == self.NVML_TEMPERATURE_GPU
        return self._answer(handle, "temperature", 61)


def test_the_fake_takes_what_pynvml_takes() -> None:
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    for name, fake in vars(FakeNvml).items():
        if name.startswith("nvml"):
            parameters = list(inspect.signature(fake).parameters)[1:]
            assert parameters == list(inspect.signature(getattr(pynvml, name)).parameters), name
        elif name.startswith("NVML_"):
            assert getattr(pynvml, name) == fake, name
    assert "gpu" in [name for name, _ in pynvml.c_nvmlUtilization_t._fields_]


def test_a_gpu_is_read_in_its_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    for uuid in ("12ab", "GPU-12ab"):
        assert GpuMeter(uuid).read() == {
            "gpu_power_w": 412.5,
            "gpu_utilization_percent": 97,
            "gpu_sm_clock_mhz": 1755,
            "gpu_temperature_c": 61,
        }


def test_a_gpu_that_is_lost_is_asked_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    meter = GpuMeter("12ab")
    nvml.broken = True
    assert meter.read() == {}
    assert meter.read() == {}
    assert len(nvml.asked) == len(caplog.records) == 4


@pytest.mark.parametrize(
    "module", [None, SimpleNamespace(), FakeNvml()], ids=["none", "another", "no such GPU"]
)
def test_nothing_is_read_without_nvml(
    module: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    with caplog.at_level(logging.INFO):
        assert GpuMeter("34cd").read() == {}
    assert "no power and use of GPUs" in caplog.text


def test_on_a_gpu_waits_are_not_told_and_the_gpu_is_read_every_so_many_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    properties = SimpleNamespace(name="NVIDIA H800", uuid="12ab")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 4 * 2**30)
    meter = Telemetry(Config(), Mesh(MeshShape(pp=1, dp=2)), torch.device("cuda", 0))
    read: list[int] = []
    of_all: list[int] = []
    for step in range(1, 22):
        with meter.step():
            time.sleep(1e-4)
        values = meter.values(step, RESULT, 1000)
        assert values["exposed_comm_ms"] is values["exposed_comm_percent"] is None
        assert (values["memory_gib"], values["memory_reserved_gib"]) == (3, 4)
        assert values["mfu"] > 0
        if "gpu_power_w" in values:
            read.append(step)
        if "memory_gib_max" in values:
            of_all.append(step)
            assert values["memory_gib_max"] == 3
            assert values["exposed_comm_ms_max"] is values["exposed_comm_ms_mean"] is None
            assert values["gpu_power_w_max"] == values["gpu_power_w_mean"] == 412.5
            assert values["gpu_utilization_percent_min"] == 97
    assert read == of_all == [1, 10, 20]


def test_of_all_ranks_highest_lowest_and_mean_are_told_of_those_that_know() -> None:
    told = [
        {"memory_gib": 2.0, "exposed_comm_ms": None, "gpu_power_w": 300.0},
        {"memory_gib": 6.0, "exposed_comm_ms": None},
        {"memory_gib": 4.0, "exposed_comm_ms": None, "gpu_power_w": 500.0},
    ]
    assert over_ranks(told) == {
        "memory_gib_max": 6,
        "exposed_comm_ms_max": None,
        "exposed_comm_ms_mean": None,
        "gpu_power_w_mean": 400,
        "gpu_power_w_min": 300,
        "gpu_power_w_max": 500,
    }
    waits = over_ranks([{"exposed_comm_ms": ms} for ms in (10.0, 0.0, 50.0)])
    assert waits == {"exposed_comm_ms_max": 50, "exposed_comm_ms_mean": 20}


def test_every_rank_tells_of_itself_and_not_within_the_time_of_a_step() -> None:
    """Rank 1 has more memory, waits longer, and comes late to the telling."""
    with RankPool() as pool:  # no rank has taken more before
        told = pool.run(cases_telemetry.telling_ranks, world=2, more_gib=0.25, late_s=3.0)
    first, second = told
    assert [sorted(values) == sorted(first[0]) for values in first] == [True, False, True]
    for key in ("memory_gib", "exposed_comm_ms"):
        mine = [rank[0][key] for rank in told]
        assert first[0][f"{key}_max"] == second[0][f"{key}_max"] == max(mine)
    assert first[0]["memory_gib_max"] >= first[0]["memory_gib"] + 0.1
    exposed = [rank[0]["exposed_comm_ms"] for rank in told]
    assert first[0]["exposed_comm_ms_mean"] == pytest.approx(sum(exposed) / 2)
    assert exposed[1] >= exposed[0] + 20
    # Rank 0 has waited at the first step's telling, which is no part of any step.
    assert all(values["seconds"] < 2.5 and values["exposed_comm_ms"] < 2500 for values in first)


def test_nothing_is_told_of_all_ranks_where_that_is_off() -> None:
    config = Config()
    config = replace(config, metrics=replace(config.metrics, gpu_every=0))
    meter = Telemetry(config, Mesh(MeshShape(pp=1, dp=2)), CPU)
    with meter.step():
        time.sleep(1e-3)
    assert "memory_gib" in (values := meter.values(1, RESULT, 1000))
    assert "memory_gib_max" not in values
