"""Ranks that srun or mpirun started themselves: what torchrun would have told each of them.

`srun --ntasks-per-node=8 counterflow train ...` and `mpirun -n 8 counterflow train ...` start every
rank directly, without RANK in its environment.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

from ...comm.topology import ProcessPlace, place_of_process, this_machine
from ...comm.topology.mpi import gather_in_mpi, load_mpi
from ..settings import ConfigError
from .address import addresses_of, head_address

_QUIET_S = 5.0
# In-node index and count as MPI's launchers tell them: Open MPI; MPICH and its family.
_LOCAL = (
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def place_variables(
    environ: Mapping[str, str] = os.environ, *, timeout_s: float = 300.0
) -> dict[str, str]:
    """RANK, WORLD_SIZE, MASTER_ADDR and so on for this process, as torchrun sets them.

    Nothing where torchrun has set them, and for a single process, such as a batch script or a shell
    of salloc: that is no rank of a run. Under MPI a collective of all processes.

    Args:
        environ: of this process.
        timeout_s: under MPI, limit of each wait for the others, seconds.

    Raises:
        ValueError: the environment does not tell where the ranks meet, or MPI cannot be asked.
        CommError: other processes that MPI started did not answer within the limit.
    """
    if environ.get("RANK"):
        return {}
    place = place_of_process(environ, timeout_s=timeout_s)
    if place.world_size == 1 or place.source not in ("slurm", "mpi"):
        return {}
    if place.source == "slurm":
        from ..doctor_ranks import meeting_of_step

        alone = place.local_world_size == place.world_size and not environ.get("MASTER_ADDR")
        told = {**environ, "MASTER_ADDR": "127.0.0.1"} if alone else environ
        meeting = meeting_of_step(place, told)
        address, port = meeting.master_addr, str(meeting.master_port)
        _require_resolvable(address, place.rank)
        local = (place.local_rank, place.local_world_size)
    elif environ.get("MASTER_ADDR") and environ.get("MASTER_PORT"):
        address, port = environ["MASTER_ADDR"], environ["MASTER_PORT"]
        local = _local_by(environ) if place.local_rank is None else _local_of(place)
    elif place.problem:
        raise ConfigError(
            f"{place.problem}; or export MASTER_ADDR and MASTER_PORT, where rank 0 can be reached"
        )
    else:
        address, port = _meeting_by_mpi(place, timeout_s)
        local = _local_of(place)
    found = {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
    found |= {name: str(n) for name, n in zip(names, local, strict=True) if n is not None}
    # The launcher's word on nodes counts: ranks need not go node by node.
    return found if place.node is None else {**found, "GROUP_RANK": str(place.node)}


def _require_resolvable(address: str, rank: int) -> None:
    """Raise ConfigError if nobody knows where `address` is; rank 0 before the others.

    Its end ends those, where srun has --kill-on-bad-exit, so that it alone tells.
    """
    if addresses_of(address):
        return
    if rank:
        time.sleep(_QUIET_S)
    raise ConfigError(
        f"rank {rank}: the host {address}, where the ranks are to meet, does not resolve; export "
        "MASTER_ADDR, an address of rank 0's node that the others reach, or start with "
        "`counterflow launch slurm`, which finds one"
    )


def _meeting_by_mpi(place: ProcessPlace, timeout_s: float) -> tuple[str, str]:
    """Where rank 0 listens, by its own word: address and port."""
    mpi = load_mpi(place.rank, place.world_size)
    machines = gather_in_mpi(mpi, this_machine(), "tell their hosts", timeout_s=timeout_s)
    told: tuple[str, str] | ConfigError | None = None
    if place.rank == 0:
        others = [machine for machine in machines if machine != machines[0]]
        try:
            address = head_address(
                [socket.gethostname()],
                [machine.host for machine in others],
                interface="",
                one_machine=not any(machines[0].surely_differs(other) for other in others),
            )
            told = address if others else "127.0.0.1", str(_any_free_port())
        except ConfigError as error:
            told = error  # told to all, so that none of them waits
    first = gather_in_mpi(mpi, told, "learn where they meet", timeout_s=timeout_s)[0]
    if isinstance(first, ConfigError):
        raise first
    assert first is not None
    return first


def _any_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _local_of(place: ProcessPlace) -> tuple[int | None, int | None]:
    return place.local_rank, place.local_world_size


def _local_by(environ: Mapping[str, str]) -> tuple[int | None, int | None]:
    """In-node index and count by MPI's own variables, where mpi4py is missing.

    Raises:
        ConfigError: they do not tell, so that no rank would know its GPU.
    """
    for names in _LOCAL:
        rank, size = (environ.get(name, "") for name in names)
        if rank.isdecimal() and size.isdecimal():
            return int(rank), int(size)
    raise ConfigError(
        "MPI does not tell which of its node's processes this is; install mpi4py for this MPI, or "
        "start through torchrun or srun"
    )
