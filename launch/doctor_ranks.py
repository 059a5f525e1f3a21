"""How the ranks that run `counterflow doctor` together find each other and tell where they are."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from ..comm.topology import ProcessPlace, Seat, Topology, gather_topology, this_machine
from ..comm.topology.mpi import gather_in_mpi, load_mpi
from .preflight.together import Gather
from .slurm.address import derived_port
from .slurm.hostlist import parse_hostlist
from .torchrun import free_port
from .world import Place, joined

T = TypeVar("T")


class Ranks(NamedTuple):
    """All ranks of a launch, come together.

    Attributes:
        topology: where they are.
        gather: gives every rank the values of all.
    """

    topology: Topology
    gather: Gather


@contextmanager
def met(
    place: ProcessPlace,
    device: str,
    environ: Mapping[str, str] = os.environ,
    *,
    timeout_s: float,
    backend: str | None = None,
) -> Iterator[Ranks]:
    """All ranks that were started with this one; entering is a collective of them.

    Args:
        place: this process's.
        device: what it is to compute on.
        environ: its environment.
        timeout_s: limit of each wait for the others, seconds.
        backend: of torch.distributed, which is then up within the context; None: it need not be.

    Raises:
        ValueError: the environment does not tell where the ranks meet, or MPI cannot be asked.
        CommError: some did not come within the limit.
    """
    seat = Seat(place, this_machine(), device)
    if place.world_size == 1:
        yield Ranks(Topology.of([seat]), _alone)
        return
    if place.source == "mpi":
        mpi = load_mpi(place.rank, place.world_size)

        def ask(value: T, what: str) -> list[T]:
            return gather_in_mpi(mpi, value, what, timeout_s=timeout_s)

        topology = Topology.of(ask(seat, "tell their hosts and devices"))
        if backend is None:
            yield Ranks(topology, ask)
            return
        meeting = _meeting_in_mpi(place, ask)
        with joined(meeting, backend, timeout_s=timeout_s):
            yield Ranks(topology, ask)
        return
    meeting = Place.of(environ) if place.source != "slurm" else meeting_of_step(place, environ)
    with joined(meeting, backend or "gloo", timeout_s=timeout_s):
        yield Ranks(
            gather_topology(environ=environ, device=device, timeout_s=timeout_s), _among_all
        )


def topology_of_ranks(
    place: ProcessPlace, device: str, environ: Mapping[str, str] = os.environ, *, timeout_s: float
) -> Topology:
    """The topology of all ranks that were started with this one; as `met`."""
    with met(place, device, environ, timeout_s=timeout_s) as ranks:
        return ranks.topology


def _alone(value: T, what: str) -> list[T]:  # noqa: ARG001  one of several that gather
    return [value]


def _among_all(value: T, what: str) -> list[T]:
    import torch.distributed as dist

    from ..comm.collectives import gather

    return gather(value, dist.group.WORLD, f"all ranks to {what}")


def _meeting_in_mpi(place: ProcessPlace, ask: Gather) -> Place:
    """Rank 0's host, and a port that is free there."""
    mine = (socket.gethostname(), free_port(0) if place.rank == 0 else 0)
    host, port = ask(mine, "tell where to meet")[0]
    told = {"RANK": str(place.rank), "WORLD_SIZE": str(place.world_size)}
    return Place.of(told | {"MASTER_ADDR": host, "MASTER_PORT": str(port)})


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
    port = environ.get("MASTER_PORT") or str(derived_port(environ))
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
        ValueError: there is none, or the list is written otherwise.
    """
    if not hostlist:
        raise ValueError(
            f"SLURM_STEP_NODELIST={hostlist!r} names no host where the ranks could meet; export "
            "MASTER_ADDR, the host of rank 0"
        )
    return parse_hostlist(hostlist, "SLURM_STEP_NODELIST")[0]
