"""GPUs and their NVLinks, by NVML (pynvml, the module of the package nvidia-ml-py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

from .pci import pci_address

T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        index: NVML's, by PCI address.
        name, uuid: as the driver gives them.
        memory_bytes: of the whole GPU.
        pci: its address, such as "0000:1b:00.0".
        nvlinks_active, nvlinks: links that are up, and links that it has.
        nvlink_peers: what the active links lead to, and by how many: "gpu 0000:43:00.0",
            "switch 0000:05:00.0", or "unknown" where the driver does not tell, as in
            virtual machines.
        problems: what NVML could not tell of this GPU, and why.
    """

    index: int
    name: str
    uuid: str
    memory_bytes: int
    pci: str
    nvlinks_active: int
    nvlinks: int
    nvlink_peers: tuple[tuple[str, int], ...]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class GpuFacts:
    """The GPUs of this machine, or why they cannot be told.

    Attributes:
        gpus: by index.
        driver: its version, such as "570.86.15".
        cuda: the newest version of CUDA that the driver takes, such as "12.8".
        reason: why there is nothing, "" where NVML answered.
        no_driver: whether the reason is that this machine has no driver, and so no GPU to use.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: str | None = None
    reason: str = ""
    no_driver: bool = False


def find_gpus() -> GpuFacts:
    """The GPUs of this machine by NVML, whatever CUDA_VISIBLE_DEVICES hides. Never raises."""
    try:
        nvml = import_module("pynvml")
    except ModuleNotFoundError:
        return GpuFacts(reason="pynvml is not installed (pip install nvidia-ml-py)")
    except Exception as error:
        return GpuFacts(reason=f"pynvml cannot be imported: {type(error).__name__}: {error}")
    try:
        return facts_by_nvml(nvml)
    except Exception as error:  # of another library by that name, or of a driver that is broken
        return GpuFacts(reason=f"NVML failed: {type(error).__name__}: {error}")


def facts_by_nvml(nvml: Any) -> GpuFacts:
    """The GPUs as `nvml`, the module pynvml, tells of them.

    Raises:
        Exception: what the module itself raises where a call fails that every GPU answers.
    """
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        absent = (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED)
        reason = f"no NVIDIA driver answers: {error}"
        return GpuFacts(reason=reason, no_driver=error.value in absent)
    try:
        gpus = tuple(_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
        cuda = nvml.nvmlSystemGetCudaDriverVersion()  # 12080 is 12.8
        version = f"{cuda // 1000}.{cuda % 1000 // 10}"
        return GpuFacts(gpus, _text(nvml.nvmlSystemGetDriverVersion()), version)
    finally:
        nvml.nvmlShutdown()


def device_of_rank(local_rank: int | None, facts: GpuFacts, visible: str | None) -> str:
    """What a rank computes on that takes the GPU of its in-node index, in a few words.

    GPUs are counted as NVML does, by PCI address. CUDA does so with CUDA_DEVICE_ORDER=PCI_BUS_ID;
    by default it puts the fastest first, which differs on machines with several kinds of GPUs.

    Args:
        local_rank: the in-node index, None if unknown.
        facts: the GPUs of the machine.
        visible: CUDA_VISIBLE_DEVICES, None if not set: indices, or beginnings of UUIDs. Where it
            leaves one GPU, as launchers that bind GPUs to processes do, that is the rank's.

    Returns:
        "GPU 3: its name"; "CPU" where there is no GPU or no driver; else "unknown: " and why.
    """
    if facts.no_driver or not (facts.gpus or facts.reason):
        return "CPU"
    if facts.reason:
        return f"unknown: {facts.reason}"
    names = [str(gpu.index) for gpu in facts.gpus] if visible is None else visible.split(",")
    seen: list[Gpu] = []
    for name in map(str.strip, names):
        alike = [
            gpu
            for gpu in facts.gpus
            if name == str(gpu.index) or (name and gpu.uuid.startswith(name))
        ]
        if not alike:
            break  # as CUDA does: what comes after a wrong one is not seen
        seen.append(alike[0])
    if not seen:
        return f"unknown: CUDA_VISIBLE_DEVICES={visible!r} names no GPU that NVML tells of"
    place = 0 if visible is not None and len(names) == 1 else local_rank
    if place is None:
        return "unknown: the in-node index is not told"
    if place >= len(seen):
        return f"unknown: in-node index {place}, but CUDA sees {len(seen)} of the GPUs"
    return f"GPU {seen[place].index}: {seen[place].name}"


def _gpu(nvml: Any, index: int) -> Gpu:
    """One GPU; one that has fallen off the bus answers nothing, which keeps no other from it."""
    problems: list[str] = []

    def ask(what: str, call: Callable[[], T], otherwise: T) -> T:
        try:
            return call()
        except nvml.NVMLError as error:
            problems.append(f"{what}: {error}")
            return otherwise

    handle = ask("device", lambda: nvml.nvmlDeviceGetHandleByIndex(index), None)
    if handle is None:
        return Gpu(index, "unknown", "", 0, "", 0, 0, (), tuple(problems))
    active, links = 0, 0
    peers: Counter[str] = Counter()
    absent = (nvml.NVML_ERROR_INVALID_ARGUMENT, nvml.NVML_ERROR_NOT_SUPPORTED)
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            state = nvml.nvmlDeviceGetNvLinkState(handle, link)
        except nvml.NVMLError as error:
            if error.value not in absent:
                problems.append(f"NVLink {link}: {error}")
            continue
        links += 1
        if state == nvml.NVML_FEATURE_ENABLED:
            active += 1
            peers[_peer(nvml, handle, link)] += 1
    return Gpu(
        index=index,
        name=ask("name", lambda: _text(nvml.nvmlDeviceGetName(handle)), "unknown"),
        uuid=ask("UUID", lambda: _text(nvml.nvmlDeviceGetUUID(handle)), ""),
        memory_bytes=ask("memory", lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).total), 0),
        pci=ask("PCI", lambda: pci_address(_text(nvml.nvmlDeviceGetPciInfo(handle).busId)), ""),
        nvlinks_active=active,
        nvlinks=links,
        nvlink_peers=tuple(sorted(peers.items())),
        problems=tuple(problems),
    )


def _peer(nvml: Any, handle: Any, link: int) -> str:
    """What an active NVLink leads to."""
    try:
        address = pci_address(_text(nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId))
    except nvml.NVMLError:
        return "unknown"
    try:
        kind = nvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, link)
    except nvml.NVMLError:
        return f"device {address}"
    names = {
        nvml.NVML_NVLINK_DEVICE_TYPE_GPU: "gpu",
        nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH: "switch",
    }
    return f"{names.get(kind, 'device')} {address}"


def _text(value: str | bytes) -> str:
    """Texts are bytes in pynvml's structures, and in older versions of it everywhere."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
