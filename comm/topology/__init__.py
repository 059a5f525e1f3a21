"""Where ranks are: nodes and in-node indices, GPUs and NVLinks, network cards, and what follows.

`place` reads the launcher's environment, `mpi` asks MPI, `world` puts all ranks together; `gpus`,
`nics` and `pci` look at this machine; `spread` says whether groups lie on few nodes.
Imports no torch and no optional library by itself.
"""

from .gpus import Gpu, GpuFacts, device_of_rank, find_gpus
from .nics import NearestNics, Nic, find_nics, nearest_nics
from .pci import PciPlace, pci_place
from .place import ProcessPlace, place_of_process, rank_told
from .spread import (
    GroupSpread,
    order_by_node,
    require_node_limit,
    spread_of_groups,
    warn_of_spread,
    why_spread,
)
from .world import Machine, Seat, Topology, gather_topology, this_machine

__all__ = [
    "Gpu",
    "GpuFacts",
    "GroupSpread",
    "Machine",
    "NearestNics",
    "Nic",
    "PciPlace",
    "ProcessPlace",
    "Seat",
    "Topology",
    "device_of_rank",
    "find_gpus",
    "find_nics",
    "gather_topology",
    "nearest_nics",
    "order_by_node",
    "pci_place",
    "place_of_process",
    "rank_told",
    "require_node_limit",
    "spread_of_groups",
    "this_machine",
    "warn_of_spread",
    "why_spread",
]
