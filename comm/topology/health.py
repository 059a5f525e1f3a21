"""The health of this machine's GPUs, by NVML: what each counter and sensor says, without judging.

Every question is asked apart: what a GPU cannot tell (of another generation, in a virtual machine)
is None, what fails is noted with the GPU, and one that has fallen off the bus keeps no other from
being asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

from .pci import pci_address

T = TypeVar("T")

# What keeps a GPU's clocks down, by the names of pynvml's bits: those that older versions have too.
SLOWDOWNS = {
    "hardware slowdown": "nvmlClocksThrottleReasonHwSlowdown",
    "hardware thermal slowdown": "nvmlClocksThrottleReasonHwThermalSlowdown",
    "power brake": "nvmlClocksThrottleReasonHwPowerBrakeSlowdown",
    "software thermal slowdown": "nvmlClocksThrottleReasonSwThermalSlowdown",
    "power cap": "nvmlClocksThrottleReasonSwPowerCap",
    "sync boost": "nvmlClocksThrottleReasonSyncBoost",
    "clock setting": "nvmlClocksThrottleReasonApplicationsClocksSetting",
    "display setting": "nvmlClocksThrottleReasonDisplayClockSetting",
    "idle": "nvmlClocksThrottleReasonGpuIdle",
}
_LINK_ERRORS = {
    "replay": "NVML_NVLINK_ERROR_DL_REPLAY",
    "recovery": "NVML_NVLINK_ERROR_DL_RECOVERY",
    "CRC flit": "NVML_NVLINK_ERROR_DL_CRC_FLIT",
    "CRC data": "NVML_NVLINK_ERROR_DL_CRC_DATA",
}
# Errors that say that a GPU does not have what was asked for, or that we may not ask.
_UNTOLD = (
    "NVML_ERROR_NOT_SUPPORTED",
    "NVML_ERROR_INVALID_ARGUMENT",
    "NVML_ERROR_NO_PERMISSION",
    "NVML_ERROR_FUNCTION_NOT_FOUND",
    "NVML_ERROR_NO_DATA",
    "NVML_ERROR_NOT_FOUND",
    "NVML_ERROR_DEPRECATED",
    "NVML_ERROR_ARGUMENT_VERSION_MISMATCH",
)


@dataclass(frozen=True)
class Link:
    """One NVLink of a GPU: whether it is up, and errors by kind since the driver was loaded."""

    index: int
    active: bool
    errors: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class GpuHealth:
    """What NVML tells of one GPU; None where it does not tell.

    Attributes:
        index: NVML's.
        name, pci: as of `Gpu`.
        errors: questions that failed, with NVML's words, such as "device: GPU is lost".
        ecc_volatile, ecc_aggregate: uncorrected errors of memory, since the driver was loaded and
            in the GPU's life.
        rows_pending, rows_failed: whether rows wait for a reset to be remapped, and whether one
            could not be.
        retired_pages: pages given up after double-bit errors; retired_pending: whether some wait
            for a reset (GPUs before A100).
        slowdowns: what keeps the clocks down now, of "hardware slowdown", "hardware thermal
            slowdown", "power brake", "software thermal slowdown", "power cap" (the power limit,
            where most GPUs stand under load), "sync boost" (the clock of the slowest GPU of a
            group), "clock setting", "display setting", "idle".
        sm_mhz, sm_max_mhz: clock of the multiprocessors, now and at most.
        celsius, slowdown_celsius: temperature, and at which clocks are lowered.
        persistence, mig: whether these modes are on.
        links: NVLinks.
        memory_bytes, used_bytes: of the whole GPU, and of it in use.
        processes: (process id, bytes or None) that compute on it.
    """

    index: int
    name: str = "unknown"
    pci: str = ""
    errors: tuple[str, ...] = ()
    ecc_volatile: int | None = None
    ecc_aggregate: int | None = None
    rows_pending: bool | None = None
    rows_failed: bool | None = None
    retired_pages: int | None = None
    retired_pending: bool | None = None
    slowdowns: tuple[str, ...] = ()
    sm_mhz: int | None = None
    sm_max_mhz: int | None = None
    celsius: int | None = None
    slowdown_celsius: int | None = None
    persistence: bool | None = None
    mig: bool | None = None
    links: tuple[Link, ...] = ()
    memory_bytes: int | None = None
    used_bytes: int | None = None
    processes: tuple[tuple[int, int | None], ...] = ()


@dataclass(frozen=True)
class GpusHealth:
    """The GPUs of this machine that this process may use, or in `reason` why they cannot be asked.

    Attributes:
        gpus: by index.
        named: how many CUDA_VISIBLE_DEVICES names, whether they are there or not; None if not set.
        driver: its version, "" if unknown.
        reason: "" where NVML answered.
        no_library: the reason is that pynvml is missing, which says nothing of the machine.
        no_driver: the reason is that there is no driver, as on machines without GPUs.
    """

    gpus: tuple[GpuHealth, ...] = ()
    driver: str = ""
    reason: str = ""
    no_library: bool = False
    no_driver: bool = False
    named: int | None = None


def find_health(visible: str | None = None) -> GpusHealth:
    """The health of this machine's GPUs that this process may use. Never raises.

    Args:
        visible: CUDA_VISIBLE_DEVICES, None if not set: all GPUs but those that we may not open.
    """
    try:
        nvml = import_module("pynvml")
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError)
        reason = (
            "pynvml is not installed (pip install nvidia-ml-py)"
            if missing
            else f"pynvml cannot be imported: {type(error).__name__}: {error}"
        )
        return GpusHealth(reason=reason, no_library=True)
    try:
        return health_by_nvml(nvml, visible)
    except Exception as error:  # of another library by that name, or of a driver that is broken
        return GpusHealth(reason=f"NVML failed: {type(error).__name__}: {error}")


def health_by_nvml(nvml: Any, visible: str | None = None) -> GpusHealth:
    """The same, as `nvml`, the module pynvml, tells it.

    GPUs that belong to other jobs of a machine that is shared are asked nothing but their UUID.

    Raises:
        Exception: what the module raises where it cannot even count the GPUs.
    """
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        absent = (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED)
        reason = f"no NVIDIA driver answers: {error}"
        return GpusHealth(reason=reason, no_driver=error.value in absent)
    try:
        driver = nvml.nvmlSystemGetDriverVersion()
        found = [_open(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
        opened = [one for one in found if one is not None]
        names = None if visible is None else [name.strip() for name in visible.split(",") if name]
        gpus = tuple(_health(nvml, one) for one in _of_process(opened, names))
        named = None if names is None else len(names)
        return GpusHealth(gpus, _text(driver), named=named)
    finally:
        nvml.nvmlShutdown()


class _Asker:
    """Asks, and keeps what failed."""

    def __init__(self, nvml: Any) -> None:
        self.errors: list[str] = []
        self._nvml = nvml
        self._untold = {getattr(nvml, name, None) for name in _UNTOLD}

    def __call__(self, what: str, call: Callable[[], T]) -> T | None:
        try:
            return call()
        except self._nvml.NVMLError as error:
            if error.value not in self._untold:
                self.errors.append(f"{what}: {error}")
        except AttributeError:  # an older pynvml, which has no such question
            pass
        return None


class _Opened(NamedTuple):
    """A GPU that this process may open: NVML's number, its handle (None: lost), its UUID or ""."""

    number: int
    handle: Any
    uuid: str
    errors: tuple[str, ...]


def _open(nvml: Any, index: int) -> _Opened | None:
    """None for a GPU that we have no permission for: a container or a scheduler keeps it."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
    except nvml.NVMLError as error:
        if error.value == nvml.NVML_ERROR_NO_PERMISSION:
            return None
        return _Opened(index, None, "", (f"device: {error}",))
    ask = _Asker(nvml)
    uuid = _text(ask("UUID", lambda: nvml.nvmlDeviceGetUUID(handle)))
    return _Opened(index, handle, uuid, tuple(ask.errors))


def _of_process(opened: Sequence[_Opened], names: Sequence[str] | None) -> list[_Opened]:
    """Those that CUDA_VISIBLE_DEVICES names: by place among them, or by the UUID's beginning.

    Places are NVML's, by PCI address; see `gpus.device_of_rank`. Parts of divided GPUs (MIG) have
    UUIDs of their own, which do not tell the GPU: then all are taken.
    """
    if names is None or any(name.startswith("MIG") for name in names):
        return list(opened)
    return [
        one
        for place, one in enumerate(opened)
        if any(name == str(place) or (one.uuid and one.uuid.startswith(name)) for name in names)
    ]


def _health(nvml: Any, opened: _Opened) -> GpuHealth:
    ask = _Asker(nvml)
    index, handle, _, errors = opened
    ask.errors += errors
    if handle is None:
        return GpuHealth(index, errors=errors)
    volatile, aggregate = (
        ask(
            "ECC errors",
            lambda kind=kind: nvml.nvmlDeviceGetTotalEccErrors(
                handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, kind
            ),
        )
        for kind in (nvml.NVML_VOLATILE_ECC, nvml.NVML_AGGREGATE_ECC)
    )
    rows = ask("remapped rows", lambda: nvml.nvmlDeviceGetRemappedRows(handle))
    pages = ask(
        "retired pages",
        lambda: nvml.nvmlDeviceGetRetiredPages(
            handle, nvml.NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR
        ),
    )
    pending = ask("retired pages", lambda: nvml.nvmlDeviceGetRetiredPagesPendingStatus(handle))
    bits = ask("clocks", lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) or 0
    mig = ask("MIG", lambda: nvml.nvmlDeviceGetMigMode(handle))
    persistence = ask("persistence mode", lambda: nvml.nvmlDeviceGetPersistenceMode(handle))
    memory = ask("memory", lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    processes = ask("processes", lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    return GpuHealth(
        index=index,
        name=_text(ask("name", lambda: nvml.nvmlDeviceGetName(handle))) or "unknown",
        pci=pci_address(_text(ask("PCI", lambda: nvml.nvmlDeviceGetPciInfo(handle).busId))),
        ecc_volatile=volatile,
        ecc_aggregate=aggregate,
        rows_pending=None if rows is None else bool(rows[2]),
        rows_failed=None if rows is None else bool(rows[3]),
        retired_pages=None if pages is None else len(pages),
        retired_pending=None if pending is None else bool(pending),
        slowdowns=tuple(n for n, bit in SLOWDOWNS.items() if bits & getattr(nvml, bit, 0)),
        sm_mhz=ask("clocks", lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        sm_max_mhz=ask(
            "clocks", lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
        ),
        celsius=ask(
            "temperature",
            lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        ),
        slowdown_celsius=ask(
            "temperature",
            lambda: nvml.nvmlDeviceGetTemperatureThreshold(
                handle, nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
            ),
        ),
        persistence=None if persistence is None else bool(persistence),
        mig=None if mig is None else mig[0] == nvml.NVML_DEVICE_MIG_ENABLE,
        links=_links(nvml, handle, ask),
        memory_bytes=None if memory is None else int(memory.total),
        used_bytes=None if memory is None else int(memory.used),
        processes=tuple((int(p.pid), p.usedGpuMemory) for p in processes or ()),
        errors=tuple(dict.fromkeys(ask.errors)),
    )


def _links(nvml: Any, handle: Any, ask: _Asker) -> tuple[Link, ...]:
    links: list[Link] = []
    for index in range(nvml.NVML_NVLINK_MAX_LINKS):
        state = ask(f"NVLink {index}", lambda i=index: nvml.nvmlDeviceGetNvLinkState(handle, i))
        if state is None:
            continue
        errors: list[tuple[str, int]] = []
        for kind, name in _LINK_ERRORS.items():
            count = ask(
                f"errors of NVLink {index}",
                lambda i=index, n=name: nvml.nvmlDeviceGetNvLinkErrorCounter(
                    handle, i, getattr(nvml, n)
                ),
            )
            if count:
                errors.append((kind, int(count)))
        links.append(Link(index, state == nvml.NVML_FEATURE_ENABLED, tuple(errors)))
    return tuple(links)


def _text(value: str | bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""
