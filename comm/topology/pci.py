"""Where a device hangs in the PCI tree, as Linux shows it in sysfs, and how near two are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_BRIDGE = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}")
_DEVICE = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")

# From near to far. "switch": under one PCI switch; "bridges": under one root port, through several
# switches; "host bridge": through the processor's PCI; "numa": one NUMA node, other host bridge.
Nearness = Literal["switch", "bridges", "host bridge", "numa", "far", "unknown"]


@dataclass(frozen=True)
class PciPlace:
    """A PCI device and the bridges above it.

    Attributes:
        path: from the host bridge ("pci0000:16") to the device ("0000:1b:00.0").
        numa_node: of the host's memory, None if the machine has one only or does not tell.
    """

    path: tuple[str, ...]
    numa_node: int | None

    @property
    def address(self) -> str:
        return self.path[-1]

    def shared_with(self, other: PciPlace) -> int:
        """How many steps of the path, from the host bridge down, two devices have in common."""
        count = 0
        for mine, its in zip(self.path, other.path, strict=False):
            if mine != its:
                break
            count += 1
        return count

    def nearness(self, other: PciPlace) -> Nearness:
        """How near another device is, by what traffic between the two passes."""
        shared = self.shared_with(other)
        if shared >= 2:
            # Below the shared part one step is the switch's own port and one the device.
            below = max(len(self.path), len(other.path)) - shared
            return "switch" if below <= 2 else "bridges"
        if shared == 1:
            return "host bridge"
        if self.numa_node is not None and self.numa_node == other.numa_node:
            return "numa"
        return "far"


def pci_place(link: Path) -> PciPlace | None:
    """The PCI device that a sysfs path leads to, or hangs under; None if there is none.

    Args:
        link: such as /sys/class/net/eth0/device or /sys/bus/pci/devices/0000:1b:00.0; what a
            device is to its PCI device, such as virtio2, may come after it.
    """
    try:
        real = link.resolve(strict=True)
    except (OSError, RuntimeError):  # absent, or links in a circle
        return None
    path: list[str] = []
    device: Path | None = None
    for folder in [*reversed(real.parents), real]:
        if _BRIDGE.fullmatch(folder.name):
            path = [folder.name]
        elif path and _DEVICE.fullmatch(folder.name):
            path.append(folder.name)
            device = folder
    if device is None:
        return None
    numa = read_line(device / "numa_node")
    known = numa is not None and numa.isdigit()  # -1: the machine has one node only
    return PciPlace(tuple(path), int(numa) if known and numa is not None else None)


def pci_address(text: str) -> str:
    """A bus id as sysfs writes it: "00000000:1B:00.0" is "0000:1b:00.0"."""
    domain, _, rest = text.lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}" if rest.count(":") == 1 else text.lower()


def read_line(path: Path) -> str | None:
    """The text of a sysfs file, None where it cannot be read: some answer with an error."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
