"""A fake of the module pynvml for machines without a driver: GPUs, and what each one answers.

Names, parameters and constants are pynvml's, which tests/comm/test_topology_health.py compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    def __init__(self, value: int, text: str) -> None:
        super().__init__(text)
        self.value = value


LOST = NVMLError(15, "GPU is lost")
FOREIGN = NVMLError(4, "Insufficient Permissions")
UNSUPPORTED = NVMLError(3, "Not Supported")

# What a GPU answers that is well; by question, and for links (active, {kind of error: count}).
WELL: Mapping[str, Any] = {
    "ecc": (0, 0),
    "rows": (0, 0, 0, 0),
    "pages": [],
    "pages_pending": 0,
    "slowdowns": 1,  # idle
    "clock": 345,
    "most_clock": 1980,
    "celsius": 40,
    "slowdown_celsius": 90,
    "persistence": 1,
    "mig": [0, 0],
    "links": {link: (1, {}) for link in range(4)},
    "processes": [],
}


class FakeHealthNvml:
    """Every call but nvmlInit is refused before it and after nvmlShutdown; devices are handles.

    Args:
        gpus: by index, what differs from WELL. An answer that is an error is raised.
    """

    NVML_ERROR_INVALID_ARGUMENT = 2
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_NO_PERMISSION = 4
    NVML_ERROR_DRIVER_NOT_LOADED = 9
    NVML_ERROR_LIBRARY_NOT_FOUND = 12
    NVML_FEATURE_ENABLED = 1
    NVML_NVLINK_MAX_LINKS = 36
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0
    NVML_AGGREGATE_ECC = 1
    NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR = 1
    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0
    NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = 1
    NVML_DEVICE_MIG_ENABLE = 1
    NVML_NVLINK_ERROR_DL_REPLAY = 0
    NVML_NVLINK_ERROR_DL_RECOVERY = 1
    NVML_NVLINK_ERROR_DL_CRC_FLIT = 2
    NVML_NVLINK_ERROR_DL_CRC_DATA = 3
    nvmlClocksThrottleReasonGpuIdle = 1
    nvmlClocksThrottleReasonApplicationsClocksSetting = 2
    nvmlClocksThrottleReasonSwPowerCap = 4
    nvmlClocksThrottleReasonHwSlowdown = 8
    nvmlClocksThrottleReasonSyncBoost = 16
    nvmlClocksThrottleReasonSwThermalSlowdown = 32
    nvmlClocksThrottleReasonHwThermalSlowdown = 64
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 128
    nvmlClocksThrottleReasonDisplayClockSetting = 256
    NVMLError = NVMLError

    def __init__(self, gpus: Sequence[Mapping[str, Any]]) -> None:
        self._gpus = [{**WELL, **gpu} for gpu in gpus]
        self._handles = [object() for _ in gpus]
        self._open = False

    def _ask(self, handle: object, question: str) -> Any:
        assert self._open, "NVML is not initialised"
        answer = self._gpus[self._handles.index(handle)].get(question)
        if isinstance(answer, NVMLError):
            raise answer
        return answer

    def nvmlInit(self) -> None:  # noqa: N802
        assert not self._open
        self._open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        assert self._open
        self._open = False

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        assert self._open
        return "570.86.15"

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        assert self._open
        return len(self._gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> object:  # noqa: N802
        self._ask(self._handles[index], "handle")
        return self._handles[index]

    def nvmlDeviceGetName(self, handle: object) -> str:  # noqa: N802
        return self._ask(handle, "name") or "Fake H800"

    def nvmlDeviceGetUUID(self, handle: object) -> str:  # noqa: N802
        return self._ask(handle, "uuid") or f"GPU-{self._handles.index(handle):04x}"

    def nvmlDeviceGetPciInfo(self, handle: object) -> Any:  # noqa: N802
        self._ask(handle, "pci")
        return SimpleNamespace(busId=f"00000000:{self._handles.index(handle):02X}:00.0".encode())

    def nvmlDeviceGetMemoryInfo(self, handle: object, version: Any = None) -> Any:  # noqa: N802
        self._ask(handle, "memory")
        assert version is None
        return SimpleNamespace(total=80 * 2**30, used=2**29)

    def nvmlDeviceGetTotalEccErrors(  # noqa: N802
        self,
        handle: object,
        errorType: int,
        counterType: int,
    ) -> int:
        assert errorType == self.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
        return self._ask(handle, "ecc")[counterType]

    def nvmlDeviceGetRemappedRows(self, device: object) -> tuple[int, ...]:  # noqa: N802
        return self._ask(device, "rows")

    def nvmlDeviceGetRetiredPages(self, device: object, sourceFilter: int) -> list[int]:  # noqa: N802
        assert sourceFilter == self.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR
        return self._ask(device, "pages")

    def nvmlDeviceGetRetiredPagesPendingStatus(self, device: object) -> int:  # noqa: N802
        return self._ask(device, "pages_pending")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: object) -> int:  # noqa: N802
        return self._ask(handle, "slowdowns")

    def nvmlDeviceGetClockInfo(self, handle: object, type: int) -> int:  # noqa: N802, A002
        assert type == self.NVML_CLOCK_SM
        return self._ask(handle, "clock")

    def nvmlDeviceGetMaxClockInfo(self, handle: object, type: int) -> int:  # noqa: N802, A002
        assert type == self.NVML_CLOCK_SM
        return self._ask(handle, "most_clock")

    def nvmlDeviceGetTemperature(self, handle: object, sensor: int) -> int:  # noqa: N802
        assert sensor == self.NVML_TEMPERATURE_GPU
        return self._ask(handle, "celsius")

    def nvmlDeviceGetTemperatureThreshold(self, handle: object, threshold: int) -> int:  # noqa: N802
        assert threshold == self.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        return self._ask(handle, "slowdown_celsius")

    def nvmlDeviceGetPersistenceMode(self, handle: object) -> int:  # noqa: N802
        return self._ask(handle, "persistence")

    def nvmlDeviceGetMigMode(self, device: object) -> list[int]:  # noqa: N802
        return self._ask(device, "mig")

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> list[Any]:  # noqa: N802
        found = self._ask(handle, "processes")
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in found]

    def nvmlDeviceGetNvLinkState(self, device: object, link: int) -> int:  # noqa: N802
        links = self._ask(device, "links")
        if link not in links:
            raise NVMLError(self.NVML_ERROR_INVALID_ARGUMENT, "Invalid Argument")
        if isinstance(links[link], NVMLError):
            raise links[link]
        return links[link][0]

    def nvmlDeviceGetNvLinkErrorCounter(self, device: object, link: int, counter: int) -> int:  # noqa: N802
        return self._ask(device, "links")[link][1].get(counter, 0)
