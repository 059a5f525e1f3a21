"""GPUs by a fake of NVML, and network cards and PCI places in a made-up sysfs tree."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from counterflow.comm.topology import (
    Gpu,
    GpuFacts,
    Nic,
    device_of_rank,
    find_gpus,
    find_nics,
    nearest_nics,
)
from counterflow.comm.topology import pci_place as place_of
from counterflow.comm.topology.gpus import facts_by_nvml
from counterflow.comm.topology.nics import NearestNics
from counterflow.comm.topology.pci import Nearness, PciPlace, pci_address


class NVMLError(Exception):
    def __init__(self, value: int, text: str) -> None:
        super().__init__(text)
        self.value = value


class FakeNvml:
    """A fake of the module pynvml, for machines without a driver: two GPUs and what they answer.

    Names, parameters and constants are pynvml's, which a test below compares. Every call but
    nvmlInit is refused before nvmlInit and after nvmlShutdown, and devices are taken by handle.
    """

    NVML_ERROR_INVALID_ARGUMENT = 2
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_DRIVER_NOT_LOADED = 9
    NVML_ERROR_LIBRARY_NOT_FOUND = 12
    NVML_FEATURE_ENABLED = 1
    NVML_NVLINK_MAX_LINKS = 36
    NVML_NVLINK_DEVICE_TYPE_GPU = 0
    NVML_NVLINK_DEVICE_TYPE_SWITCH = 2
    NVMLError = NVMLError

    def __init__(self, links: Sequence[Mapping[int, tuple[int, str, int] | NVMLError]]) -> None:
        self._links = links  # of each GPU: link -> (state, remote bus id, remote type), or an error
        self._handles = [object() for _ in links]
        self._open = False
        self.lost: set[int] = set()

    def _device(self, handle: object) -> int:
        assert self._open, "NVML is not initialised"
        return self._handles.index(handle)

    def nvmlInit(self) -> None:  # noqa: N802
        assert not self._open
        self._open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        assert self._open
        self._open = False

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        assert self._open
        return "570.86.15"

    def nvmlSystemGetCudaDriverVersion(self) -> int:  # noqa: N802
        assert self._open
        return 12080

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        assert self._open
        return len(self._links)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> object:  # noqa: N802
        assert self._open
        if index in self.lost:
            raise NVMLError(15, "GPU is lost")
        return self._handles[index]

    def nvmlDeviceGetName(self, handle: object) -> str:  # noqa: N802
        return f"Fake H800 {self._device(handle)}"

    def nvmlDeviceGetUUID(self, handle: object) -> str:  # noqa: N802
        return f"GPU-{self._device(handle)}abc"

    def nvmlDeviceGetMemoryInfo(self, handle: object, version: Any = None) -> Any:  # noqa: N802
        self._device(handle)
        assert version is None
        return SimpleNamespace(total=80 * 2**30)

    def nvmlDeviceGetPciInfo(self, handle: object) -> Any:  # noqa: N802
        return SimpleNamespace(busId=f"00000000:{0x1B + self._device(handle):02X}:00.0".encode())

    def nvmlDeviceGetNvLinkState(self, device: object, link: int) -> int:  # noqa: N802
        links = self._links[self._device(device)]
        if link not in links:
            raise NVMLError(self.NVML_ERROR_INVALID_ARGUMENT, "Invalid Argument")
        if isinstance(answer := links[link], NVMLError):
            raise answer
        return answer[0]

    def nvmlDeviceGetNvLinkRemotePciInfo(self, device: object, link: int) -> Any:  # noqa: N802
        answer = self._links[self._device(device)][link]
        assert not isinstance(answer, NVMLError)
        if not answer[1]:
            raise NVMLError(self.NVML_ERROR_NOT_SUPPORTED, "Not Supported")
        return SimpleNamespace(busId=answer[1].encode())

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: object, link: int) -> int:  # noqa: N802
        answer = self._links[self._device(handle)][link]
        assert not isinstance(answer, NVMLError)
        return answer[2]


def test_the_fake_takes_what_pynvml_takes() -> None:
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    for name, fake in vars(FakeNvml).items():
        if name.startswith("nvml"):
            parameters = list(inspect.signature(fake).parameters)[1:]
            assert parameters == list(inspect.signature(getattr(pynvml, name)).parameters), name
        elif name.startswith("NVML_"):
            assert getattr(pynvml, name) == fake, name
    assert issubclass(pynvml.NVMLError, Exception)
    error = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    assert vars(error)["value"] == pynvml.NVML_ERROR_NOT_SUPPORTED
    for structure, field in (("nvmlPciInfo_t", "busId"), ("c_nvmlMemory_t", "total")):
        assert field in [name for name, _ in getattr(pynvml, structure)._fields_]


def test_gpus_and_where_their_nvlinks_lead_are_told() -> None:
    switched = {
        link: (1, f"00000000:{4 + link % 2:02X}:00.0", FakeNvml.NVML_NVLINK_DEVICE_TYPE_SWITCH)
        for link in range(4)
    }
    paired = {0: (1, "00000000:1B:00.0", 0), 1: (0, "", 0), 2: (1, "", 0)}
    paired |= {3: NVMLError(999, "Unknown Error"), 4: NVMLError(3, "Not Supported")}
    nvml = FakeNvml([switched, paired])
    facts = facts_by_nvml(nvml)
    assert (facts.driver, facts.cuda, facts.reason) == ("570.86.15", "12.8", "")
    first, second = facts.gpus
    assert first == Gpu(
        index=0,
        name="Fake H800 0",
        uuid="GPU-0abc",
        memory_bytes=80 * 2**30,
        pci="0000:1b:00.0",
        nvlinks_active=4,
        nvlinks=4,
        nvlink_peers=(("switch 0000:04:00.0", 2), ("switch 0000:05:00.0", 2)),
    )
    assert (second.nvlinks_active, second.nvlinks) == (2, 3)
    assert second.nvlink_peers == (("gpu 0000:1b:00.0", 1), ("unknown", 1))
    assert second.problems == ("NVLink 3: Unknown Error",)
    facts_by_nvml(nvml)  # it has been shut down, and can be asked again


def test_a_lost_gpu_is_told_beside_the_others() -> None:
    nvml = FakeNvml([{}, {}])
    nvml.lost.add(0)
    lost, well = facts_by_nvml(nvml).gpus
    assert lost.problems == ("device: GPU is lost",)
    assert (well.name, well.nvlinks, well.problems) == ("Fake H800 1", 0, ())


def test_without_a_driver_or_the_library_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvml = FakeNvml([])

    def no_driver() -> None:
        raise NVMLError(12, "NVML Shared Library Not Found")

    def broken_driver() -> None:
        raise NVMLError(999, "Unknown Error")

    monkeypatch.setattr(nvml, "nvmlInit", no_driver)
    facts = facts_by_nvml(nvml)
    assert facts.reason == "no NVIDIA driver answers: NVML Shared Library Not Found"
    assert device_of_rank(0, facts, None) == "CPU"
    monkeypatch.setattr(nvml, "nvmlInit", broken_driver)
    assert device_of_rank(0, facts_by_nvml(nvml), None) == (
        "unknown: no NVIDIA driver answers: Unknown Error"
    )
    monkeypatch.setitem(sys.modules, "pynvml", None)
    missing = "pynvml is not installed (pip install nvidia-ml-py)"
    assert find_gpus().reason == missing
    assert device_of_rank(0, find_gpus(), None) == f"unknown: {missing}"
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace())  # another library by that name
    assert find_gpus().reason.startswith("NVML failed: AttributeError")


@pytest.mark.parametrize(
    ("local_rank", "visible", "device"),
    [
        (0, None, "GPU 0: H800"),
        (3, None, "GPU 3: H800"),
        (4, None, "unknown: in-node index 4, but CUDA sees 4 of the GPUs"),
        (None, None, "unknown: the in-node index is not told"),
        (1, "2,0", "GPU 0: H800"),
        (2, "2,0", "unknown: in-node index 2, but CUDA sees 2 of the GPUs"),
        (5, "3", "GPU 3: H800"),  # a launcher has bound one GPU to each process
        (0, "", "unknown: CUDA_VISIBLE_DEVICES='' names no GPU that NVML tells of"),
        (0, "MIG-12", "unknown: CUDA_VISIBLE_DEVICES='MIG-12' names no GPU that NVML tells of"),
        (1, "GPU-3,GPU-1ab", "GPU 1: H800"),
        # CUDA ignores what follows a device that is not there.
        (1, "0,9,1", "unknown: in-node index 1, but CUDA sees 1 of the GPUs"),
    ],
)
def test_a_ranks_device_is_the_gpu_of_its_in_node_index_or_why_that_is_unknown(
    local_rank: int | None, visible: str | None, device: str
) -> None:
    gpus = tuple(Gpu(i, "H800", f"GPU-{i}abc", 0, "", 0, 0, ()) for i in range(4))
    assert device_of_rank(local_rank, GpuFacts(gpus), visible) == device


def test_a_machine_whose_driver_has_no_gpu_computes_on_the_cpu() -> None:
    assert device_of_rank(None, facts_by_nvml(FakeNvml([])), None) == "CPU"


class MadeUpSysfs:
    """Files and links as Linux has them in /sys, for a machine that does not exist."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def device(self, *path: str, numa: int = -1) -> Path:
        """A PCI device, `path` from the host bridge down."""
        folder = self.root.joinpath("sys/devices", *path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "numa_node").write_text(f"{numa}\n")
        by_address = self.root / "sys/bus/pci/devices"
        by_address.mkdir(parents=True, exist_ok=True)
        (by_address / path[-1]).symlink_to(folder)
        return folder

    def net(self, name: str, device: Path | None, **files: str) -> None:
        folder = self.root / "sys/class/net" / name
        folder.mkdir(parents=True)
        if device is not None:
            (folder / "device").symlink_to(device)
        for file, text in files.items():
            (folder / file).write_text(f"{text}\n")

    def rdma(self, name: str, device: Path, ports: dict[int, tuple[str, str]]) -> None:
        for port, (state, rate) in ports.items():
            folder = self.root / "sys/class/infiniband" / name / "ports" / str(port)
            folder.mkdir(parents=True)
            (folder / "state").write_text(f"{state}\n")
            (folder / "rate").write_text(f"{rate}\n")
        (self.root / "sys/class/infiniband" / name / "device").symlink_to(device)

    def gpu(self, *path: str, numa: int = -1) -> PciPlace:
        self.device(*path, numa=numa)
        place = place_of(self.root / "sys/bus/pci/devices" / path[-1])
        assert place is not None
        return place


@pytest.fixture
def sysfs(tmp_path: Path) -> MadeUpSysfs:
    return MadeUpSysfs(tmp_path)


def test_network_cards_are_read_from_sysfs(sysfs: MadeUpSysfs) -> None:
    card = sysfs.device("pci0000:16", "0000:16:01.0", "0000:17:00.0", numa=1)
    (card / "virtio2").mkdir()
    sysfs.net("eth0", card / "virtio2", type="1", operstate="up", speed="100000")
    sysfs.net("veth1", None, type="1", operstate="down", speed="-1")
    sysfs.net("lo", None, type="772", operstate="unknown")
    (sysfs.root / "sys/class/net/bonding_masters").write_text("\n")
    sysfs.rdma("mlx5_10", card, {1: ("4: ACTIVE", "400 Gb/sec (4X NDR)")})
    two = {1: ("1: DOWN", "10 Gb/sec (4X SDR)"), 2: ("4: ACTIVE", "2.5 Gb/sec (1X SDR)")}
    sysfs.rdma("mlx5_2", card, two)
    place = PciPlace(("pci0000:16", "0000:16:01.0", "0000:17:00.0"), 1)
    assert find_nics(sysfs.root) == (
        Nic("mlx5_2:1", "rdma", "down", None, place),
        Nic("mlx5_2:2", "rdma", "active", 2.5, place),
        Nic("mlx5_10", "rdma", "active", 400.0, place),
        Nic("eth0", "net", "up", 100.0, place),
        Nic("veth1", "net", "down", None, None),
    )


def test_a_machine_without_sysfs_has_no_network_cards(tmp_path: Path) -> None:
    assert find_nics(tmp_path) == ()
    assert place_of(tmp_path / "device") is None
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert place_of(tmp_path / "circle") is None


def test_the_nearest_card_is_the_one_with_the_shortest_way_over_pci(sysfs: MadeUpSysfs) -> None:
    root, switch = ("pci0000:16", "0000:16:01.0"), "0000:17:00.0"
    other = ("pci0000:50", "0000:50:01.0")

    def card(name: str, *path: str, numa: int) -> Nic:
        sysfs.rdma(name, sysfs.device(*path, numa=numa), {1: ("4: ACTIVE", "400 Gb/sec")})
        return next(nic for nic in find_nics(sysfs.root) if nic.name == name)

    gpu = sysfs.gpu(*root, switch, "0000:18:00.0", "0000:19:00.0", numa=0)
    eth = Nic(
        "eth0", "net", "up", None, PciPlace((*root, switch, "0000:18:00.0", "0000:19:01.0"), 0)
    )
    far = card("mlx5_9", "pci0000:90", "0000:90:01.0", "0000:91:00.0", numa=1)
    numa = card("mlx5_8", *other, "0000:51:00.0", numa=0)
    host = card("mlx5_7", root[0], "0000:16:02.0", "0000:20:00.0", numa=0)
    aside = card("mlx5_3", *root, "0000:17:01.0", numa=0)
    below = card("mlx5_6", *root, switch, "0000:18:02.0", "0000:1f:00.0", "0000:21:00.0", numa=0)
    beside = card("mlx5_5", *root, switch, "0000:18:01.0", "0000:1a:00.0", numa=0)
    alike = card("mlx5_4", *root, switch, "0000:18:03.0", "0000:1c:00.0", numa=0)
    nics = [eth]
    nearer: list[tuple[Nic, Nearness]] = [
        (far, "far"),
        (numa, "numa"),
        (host, "host bridge"),
        (aside, "bridges"),
        (below, "bridges"),  # as far, but behind a switch that the GPU is behind too
        (beside, "switch"),
    ]
    for nic, near in nearer:
        nics.append(nic)
        assert nearest_nics(gpu, nics) == NearestNics((nic.name,), near)
    assert nearest_nics(gpu, [*nics, alike]) == NearestNics(("mlx5_5", "mlx5_4"), "switch")
    assert nearest_nics(gpu, [eth]).names == ("eth0",)
    assert nearest_nics(None, nics) == nearest_nics(gpu, []) == NearestNics((), "unknown")


def test_bus_ids_are_written_as_sysfs_writes_them() -> None:
    assert pci_address("00000000:1B:00.0") == "0000:1b:00.0"
    assert pci_address("0001:0A:00.1") == "0001:0a:00.1"
    assert pci_address("00010000:0A:00.1") == "10000:0a:00.1"
    assert pci_address("") == ""


def test_the_package_needs_neither_torch_nor_an_optional_library() -> None:
    code = (
        "import sys; import counterflow.comm.topology, counterflow.comm.topology.mpi;"
        "assert not {'torch', 'mpi4py', 'pynvml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
