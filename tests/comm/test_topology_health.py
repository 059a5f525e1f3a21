"""The health of GPUs as NVML tells it, by a fake of pynvml that is held to the real one."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace

import pytest

from counterflow.comm.topology.health import (
    SLOWDOWNS,
    GpuHealth,
    Link,
    find_health,
    health_by_nvml,
)
from tests.fake_nvml import FOREIGN, LOST, UNSUPPORTED, FakeHealthNvml, NVMLError


def test_the_fake_takes_what_pynvml_takes() -> None:
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    compared = 0
    for name, fake in vars(FakeHealthNvml).items():
        if not name.startswith(("nvml", "NVML_")):
            continue
        compared += 1
        if callable(fake):
            parameters = list(inspect.signature(fake).parameters)[1:]
            assert parameters == list(inspect.signature(getattr(pynvml, name)).parameters), name
        else:
            assert getattr(pynvml, name) == fake, name
    assert compared > 40
    for name in SLOWDOWNS.values():
        now = name.replace("ClocksThrottleReason", "ClocksEventReason")  # pynvml's newer name
        assert getattr(pynvml, name) == getattr(pynvml, now) == getattr(FakeHealthNvml, name), name
    memory = [name for name, _ in pynvml.c_nvmlMemory_t._fields_]
    process = [name for name, _ in pynvml.c_nvmlProcessInfo_v3_t._fields_]
    assert {"total", "used"} <= set(memory)
    assert {"pid", "usedGpuMemory"} <= set(process)


def test_every_question_has_its_answer() -> None:
    ill = {
        "ecc": (2, 5),
        "rows": (0, 3, 1, 1),
        "pages": [1, 2, 3],
        "pages_pending": 1,
        "slowdowns": 8 | 64,
        "mig": [1, 1],
        "persistence": 0,
        "processes": [(77, 2**30), (78, None)],
        "links": {0: (1, {1: 4}), 1: (0, {})},
    }
    nvml = FakeHealthNvml([{}, ill])
    health = health_by_nvml(nvml)
    assert (health.driver, health.reason) == ("570.86.15", "")
    well, found = health.gpus
    assert well == GpuHealth(
        index=0,
        name="Fake H800",
        pci="0000:00:00.0",
        ecc_volatile=0,
        ecc_aggregate=0,
        rows_pending=False,
        rows_failed=False,
        retired_pages=0,
        retired_pending=False,
        slowdowns=("idle",),
        sm_mhz=345,
        sm_max_mhz=1980,
        celsius=40,
        slowdown_celsius=90,
        persistence=True,
        mig=False,
        links=tuple(Link(i, active=True) for i in range(4)),
        memory_bytes=80 * 2**30,
        used_bytes=2**29,
    )
    assert (found.ecc_volatile, found.ecc_aggregate) == (2, 5)
    assert (found.rows_pending, found.rows_failed) == (True, True)
    assert (found.retired_pages, found.retired_pending) == (3, True)
    assert found.slowdowns == ("hardware slowdown", "hardware thermal slowdown")
    assert (found.mig, found.persistence) == (True, False)
    assert found.processes == ((77, 2**30), (78, None))
    assert found.links == (Link(0, True, (("recovery", 4),)), Link(1, False))
    health_by_nvml(nvml)  # it has been shut down, and can be asked again


def test_what_a_gpu_does_not_have_is_not_told_and_what_fails_is_noted() -> None:
    old = {"rows": UNSUPPORTED, "mig": UNSUPPORTED, "slowdown_celsius": UNSUPPORTED}
    broken = {"celsius": NVMLError(999, "Unknown Error"), "links": {0: NVMLError(15, "lost")}}
    gone = {"handle": LOST}
    first, second, third = health_by_nvml(FakeHealthNvml([old, broken, gone])).gpus
    assert (first.errors, first.mig, first.rows_failed) == ((), None, None)
    assert second.errors == ("temperature: Unknown Error", "NVLink 0: lost")
    assert third == GpuHealth(2, errors=("device: GPU is lost",))


@pytest.mark.parametrize(
    ("visible", "seen", "named"),
    [
        (None, [0, 2, 3], None),
        ("0,2", [0, 3], 2),  # places among those that may be opened
        ("GPU-0003", [3], 1),
        ("GPU-0000, GPU-0002", [0, 2], 2),
        ("0,7", [0], 2),
        ("", [], 0),
        ("NoDevFiles", [], 1),
        ("MIG-0123", [0, 2, 3], 1),
    ],
)
def test_gpus_of_other_jobs_are_not_looked_at(
    visible: str | None, seen: list[int], named: int | None
) -> None:
    nvml = FakeHealthNvml([{}, {"handle": FOREIGN, "ecc": (1, 1)}, {}, {}])
    health = health_by_nvml(nvml, visible)
    assert [gpu.index for gpu in health.gpus] == seen
    assert health.named == named
    assert not any(gpu.errors or gpu.ecc_volatile for gpu in health.gpus)


def test_without_a_driver_or_the_library_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvml = FakeHealthNvml([])

    def no_driver() -> None:
        raise NVMLError(12, "NVML Shared Library Not Found")

    monkeypatch.setattr(nvml, "nvmlInit", no_driver)
    found = health_by_nvml(nvml)
    assert found.no_driver
    assert found.reason == "no NVIDIA driver answers: NVML Shared Library Not Found"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_health().no_library
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace())  # another library by that name
    assert find_health().reason.startswith("NVML failed: AttributeError")
