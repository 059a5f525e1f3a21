"""Network interfaces and RDMA devices of this machine, as Linux shows them in sysfs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from .pci import Nearness, PciPlace, pci_place, read_line

_LOOPBACK = "772"  # ARPHRD_LOOPBACK of linux/if_arp.h
_ORDER: tuple[Nearness, ...] = ("switch", "bridges", "host bridge", "numa", "far", "unknown")


@dataclass(frozen=True)
class Nic:
    """One port of a network device.

    Attributes:
        name: "eth0", "mlx5_0"; "mlx5_0:2" for a port of an RDMA device with several.
        kind: "rdma" for InfiniBand and RoCE as verbs see them, "net" for an interface of IP.
        state: "up", "down", "active", "unknown", as the driver tells.
        speed_gbps: line rate in Gbit/s, None if not told (virtual devices, links that are down).
        pci: None for a virtual device.
    """

    name: str
    kind: Literal["net", "rdma"]
    state: str
    speed_gbps: float | None
    pci: PciPlace | None


class NearestNics(NamedTuple):
    """The NICs nearest to a device, several where they are alike, and how near they are."""

    names: tuple[str, ...]
    nearness: Nearness


def find_nics(root: Path = Path("/")) -> tuple[Nic, ...]:
    """The RDMA ports and then the network interfaces of the machine whose files are under `root`.

    Loopback is left out. A folder that is missing (another system, no InfiniBand) holds none.
    """
    rdma = [
        port for device in _children(root / "sys/class/infiniband") for port in _rdma_ports(device)
    ]
    nets = [_interface(folder) for folder in _children(root / "sys/class/net")]
    return (*rdma, *(nic for nic in nets if nic is not None))


def nearest_nics(device: PciPlace | None, nics: Sequence[Nic]) -> NearestNics:
    """The NICs nearest to a device.

    RDMA devices are chosen among where there are any, else the network interfaces with a PCI place.

    Args:
        device: such as a GPU's place; None if unknown.
        nics: of the same machine.
    """
    rdma = [nic for nic in nics if nic.kind == "rdma" and nic.pci]
    found: list[tuple[tuple[int, int], str]] = []
    for nic in rdma or nics:
        if device is not None and nic.pci is not None:
            near = _ORDER.index(device.nearness(nic.pci))
            found.append(((near, -device.shared_with(nic.pci)), nic.name))
    if not found:
        return NearestNics((), "unknown")
    best = min(key for key, _ in found)
    return NearestNics(tuple(name for key, name in found if key == best), _ORDER[best[0]])


def _children(folder: Path) -> list[Path]:
    """What lies in a folder, mlx5_2 before mlx5_10."""
    try:
        found = list(folder.iterdir())
    except OSError:
        return []
    numbers = re.compile(r"([0-9]+)")
    return sorted(
        found, key=lambda p: [(len(t), t) if t.isdigit() else (0, t) for t in numbers.split(p.name)]
    )


def _interface(folder: Path) -> Nic | None:
    kind = read_line(folder / "type")
    if kind is None or kind == _LOOPBACK:  # no type: not an interface, such as bonding_masters
        return None
    speed = read_line(folder / "speed") or ""
    return Nic(
        name=folder.name,
        kind="net",
        state=read_line(folder / "operstate") or "unknown",
        # In Mbit/s; -1, 0 or an error where the driver does not know.
        speed_gbps=int(speed) / 1000 if speed.isdigit() and int(speed) > 0 else None,
        pci=pci_place(folder / "device"),
    )


def _rdma_ports(device: Path) -> list[Nic]:
    ports = _children(device / "ports")
    place = pci_place(device / "device")
    found: list[Nic] = []
    for port in ports:
        state = read_line(port / "state") or ""  # "4: ACTIVE"
        rate = re.match(r"[0-9.]+", read_line(port / "rate") or "")  # "400 Gb/sec (4X NDR)"
        up = "ACTIVE" in state
        found.append(
            Nic(
                name=device.name if len(ports) == 1 else f"{device.name}:{port.name}",
                kind="rdma",
                state=state.partition(": ")[2].lower() or "unknown",
                speed_gbps=float(rate[0]) if rate and up else None,
                pci=place,
            )
        )
    return found
