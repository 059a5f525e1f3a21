"""Nodes as MPI knows them: processes that can share memory are on one node.

The one module that touches mpi4py. Importing mpi4py.MPI initialises MPI, so it is imported only
where MPI started the job. Waits are bounded by a barrier that is asked, not waited, for: once
everyone has come to it, the blocking calls that follow end at once.
"""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any, TypeVar

from ..errors import CommError
from .place import ProcessPlace

T = TypeVar("T")
_LOOK_S = 0.005


def load_mpi(rank: int, world_size: int) -> Any:
    """The module mpi4py.MPI.

    Args:
        rank, world_size: of this process, by the environment that MPI's launcher made.

    Raises:
        ValueError: it cannot be imported, or is bound to another MPI.
    """
    try:
        mpi = import_module("mpi4py.MPI")
    except Exception as error:  # a library that is missing, or bound to an MPI that is
        raise ValueError(
            f"MPI started this process as one of {world_size}, but mpi4py, which tells which of "
            f"them share a node, cannot be imported ({type(error).__name__}: {error}); install "
            "mpi4py for this MPI (pip install mpi4py), or start through torchrun or srun"
        ) from error
    world = mpi.COMM_WORLD
    if (world.rank, world.size) != (rank, world_size):
        library = " ".join(mpi.Get_library_version().split()[:3])
        raise ValueError(
            f"MPI started this process as rank {rank} of {world_size}, but in mpi4py it is rank "
            f"{world.rank} of {world.size}: mpi4py is bound to another MPI ({library}) than the "
            "mpirun that started it; use that MPI's mpirun, or install mpi4py for this one"
        )
    return mpi


def place_in_mpi(mpi: Any, *, timeout_s: float) -> ProcessPlace:
    """The place of this process in MPI.COMM_WORLD; a collective of it.

    Nodes are numbered by their lowest rank.

    Args:
        mpi: the module mpi4py.MPI.
        timeout_s: limit of the wait for the other processes, seconds.

    Raises:
        CommError: the others did not answer within the limit.
    """
    world = mpi.COMM_WORLD
    _await_all(mpi, "tell which of them share a node", timeout_s)
    shared = world.Split_type(mpi.COMM_TYPE_SHARED, key=world.rank)
    try:
        local_rank, local_size = int(shared.rank), int(shared.size)
        lowest = shared.bcast(world.rank, root=0)
    finally:
        shared.Free()
    node = sorted(set(world.allgather(lowest))).index(lowest)
    return ProcessPlace(world.rank, world.size, node, local_rank, local_size, "mpi")


def gather_in_mpi(mpi: Any, value: T, what: str, *, timeout_s: float) -> list[T]:
    """The `value` of every process of MPI.COMM_WORLD, by rank, on all of them.

    Args:
        mpi: the module mpi4py.MPI.
        value: picklable.
        what: what the others are to do, such as "tell their hosts", for the error.
        timeout_s: limit of the wait for the others, seconds.

    Raises:
        CommError: the others did not answer within the limit.
    """
    _await_all(mpi, what, timeout_s)
    return mpi.COMM_WORLD.allgather(value)


def _await_all(mpi: Any, what: str, timeout_s: float) -> None:
    """Wait until every process of COMM_WORLD is here.

    Raises:
        CommError: some are not within the limit.
    """
    world = mpi.COMM_WORLD
    barrier = world.Ibarrier()
    end = time.monotonic() + timeout_s
    while not barrier.Test():
        if time.monotonic() > end:
            others = [rank for rank in range(world.size) if rank != world.rank]
            raise CommError(
                f"rank {world.rank}: waiting for all {world.size} processes that MPI started to "
                f"{what}: no answer within {timeout_s:g} s; each of them must make the same calls",
                peers=others,
            )
        time.sleep(_LOOK_S)
