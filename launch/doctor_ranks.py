"""How the ranks that run `counterflow doctor` together find each other and tell where they are."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from ..comm.topology import ProcessPlace, Seat, Topology, gather_topology, this_machine
from ..comm.topology.mpi import gather_in_mpi, load_mpi
from .world import Place, joined

# Below the ports that Linux gives to outgoing connections (from 32768).
_FIRST_PORT, _NUM_PORTS = 20000, 12000


def topology_of_ranks(
    place: ProcessPlace, device: str, environ: Mapping[str, str] = os.environ, *, timeout_s: float
) -> Topology:
    """The topology of all ranks that were started with this one; a collective of them.

    Args:
        place: this process's.
        device: what it is to compute on.
        environ: its environment.
        timeout_s: limit of each wait for the others, seconds.

    Raises:
        ValueError: the environment does not tell where the ranks meet, or MPI cannot be asked.
        CommError: some did not come within the limit.
    """
    seat = Seat(place, this_machine(), device)
    if place.world_size == 1:
        return Topology.of([seat])
    if place.source == "mpi":
        mpi = load_mpi(place.rank, place.world_size)
        what = "tell their hosts and devices"
        return Topology.of(gather_in_mpi(mpi, seat, what, timeout_s=timeout_s))
    meeting = Place.of(environ) if place.source != "slurm" else meeting_of_step(place, environ)
    with joined(meeting, "gloo", timeout_s=timeout_s):
        return gather_topology(environ=environ, device=device, timeout_s=timeout_s)


def meeting_of_step(place: ProcessPlace, environ: Mapping[str, str]) -> Place:
    """Where the processes that srun started meet: at MASTER_ADDR, or on the step's first node.

    The port is MASTER_PORT, or follows from the job's and step's numbers, so that steps which run
    beside each other seldom want the same.

    Raises:
        ValueError: neither is told, or rank 0 is not on the first node.
    """
    address = environ.get("MASTER_ADDR", "")
    if not address:
        address = first_host(environ.get("SLURM_STEP_NODELIST", ""))
        if place.rank == 0 and place.node:
            raise ValueError(
                f"rank 0 is on node {place.node} of the Slurm step, so the ranks cannot meet on "
                "its first node; export MASTER_ADDR, the host of rank 0"
            )
    steps = [environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    number = sum(17 * int(text) if text.isdigit() else 0 for text in steps)
    port = environ.get("MASTER_PORT") or str(_FIRST_PORT + number % _NUM_PORTS)
    return Place.of(
        {
            "RANK": str(place.rank),
            "WORLD_SIZE": str(place.world_size),
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
        }
    )


def first_host(hostlist: str) -> str:
    """The first host of a list as Slurm writes it: "rack[1-2]n[01-04],x9" is "rack1n01".

    Raises:
        ValueError: there is none.
    """
    found = re.match(r"(?:[^\[\],]|\[[^\]]*\])+", hostlist)
    if found is None:
        raise ValueError(
            f"SLURM_STEP_NODELIST={hostlist!r} names no host where the ranks could meet; export "
            "MASTER_ADDR, the host of rank 0"
        )
    return re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", found[0])
