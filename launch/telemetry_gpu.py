"""What one GPU draws and does, by NVML (pynvml, the module of the package nvidia-ml-py)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

_log = logging.getLogger(__name__)


class GpuMeter:
    """Reads one GPU. Never raises: what cannot be read is left out, and logged once.

    Args:
        uuid: of the GPU, with or without "GPU-" before it, as torch and NVML write it.
    """

    def __init__(self, uuid: str) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        self._silent: set[str] = set()  # what this GPU or driver does not tell
        try:
            self._nvml = import_module("pynvml")
            self._nvml.nvmlInit()  # until the process ends
            name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(name)
        except Exception as error:  # no module, another of its name, no driver, no such GPU
            _log.info("no power and use of GPUs in the metrics: %s", _line(error))
            self._nvml = None

    def read(self) -> dict[str, float]:
        """What the GPU says now; empty where NVML says nothing.

        Returns:
            gpu_power_w, gpu_utilization_percent (of the last second or less, in which any kernel
            ran), gpu_sm_clock_mhz, gpu_temperature_c; those that could be read.
        """
        if self._nvml is None:
            return {}
        nvml, handle = self._nvml, self._handle
        found: dict[str, float] = {}

        def ask(key: str, call: Callable[[], float]) -> None:
            if key in self._silent:
                return
            try:
                found[key] = call()
            except Exception as error:  # a GPU that is lost, or a figure that it does not have
                self._silent.add(key)
                _log.warning("%s can no longer be read by NVML: %s", key, _line(error))

        ask("gpu_power_w", lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000)
        ask("gpu_utilization_percent", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        ask("gpu_sm_clock_mhz", lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
        ask(
            "gpu_temperature_c",
            lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        )
        return found


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
