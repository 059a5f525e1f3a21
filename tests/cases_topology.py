"""What ranks do in tests/comm/test_topology.py and tests/launch/test_doctor.py."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from unittest import mock

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from counterflow.comm.errors import CommError
from counterflow.comm.topology import Topology, gather_topology, place_of_process
from counterflow.launch.doctor_ranks import topology_of_ranks
from counterflow.parallel.mesh import Mesh, MeshShape

from .told import part


def _torchrun(rank: int, world: int, per_node: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "GROUP_RANK": str(rank // per_node),
        "LOCAL_RANK": str(rank % per_node),
        "LOCAL_WORLD_SIZE": str(per_node),
    }


def gathered(rank: int, world: int, per_node: int) -> Topology:
    environ = _torchrun(rank, world, per_node)
    return gather_topology(environ=environ, device=f"device {rank % per_node}")


def one_wrong(rank: int, world: int) -> str:
    """What a rank says of the topology when the environment of rank 1 is wrong."""
    environ = _torchrun(rank, world, world) | ({"GROUP_RANK": "x"} if rank == 1 else {})
    try:
        gather_topology(environ=environ)
    except ValueError as error:
        return str(error)
    return "no error"


def without_mpi4py(rank: int, world: int) -> tuple[Topology, list[str]]:
    """The topology where MPI started the ranks and cannot be asked, and what this rank logs."""
    environ = {"PMI_RANK": str(rank), "PMI_SIZE": str(world)}
    with warnings_logged() as said, mock.patch.dict("sys.modules", {"mpi4py.MPI": None}):
        return gather_topology(environ=environ), said


def one_missing(rank: int, world: int, limit_s: float) -> tuple[str, float]:
    """What rank 0 says when rank 1 does not gather within the world's limit, and after how long."""
    _set_pg_timeout(timedelta(seconds=limit_s))
    said, began = "no error", time.monotonic()
    if rank == 0:  # rank 1 is there, but not with the others
        try:
            gather_topology(environ=_torchrun(rank, world, world))
        except CommError as error:
            said = f"{error} {error.peers}"
    seconds = time.monotonic() - began
    part(rank, world)
    return said, seconds


def warned(rank: int, world: int, nodes: Sequence[int]) -> list[str]:
    """Warnings that this rank logs while it makes a mesh of two expert groups."""
    with warnings_logged() as said, mock.patch.dict(os.environ, _torchrun(rank, world, 2)):
        Mesh.create(MeshShape(1, world, world // 2), nodes=nodes)
    return said


@contextmanager
def warnings_logged() -> Iterator[list[str]]:
    """The warnings that the topology logs within this context."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("counterflow.comm.topology")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def met(rank: int, _world: int, environs: Sequence[Mapping[str, str]], limit_s: float) -> object:
    """The topology that processes find as the doctor does, or what they say instead."""
    environ = environs[rank]
    dist.destroy_process_group()  # the doctor makes a world of its own
    try:
        place = place_of_process(environ)
        return topology_of_ranks(place, f"device {rank}", environ, timeout_s=limit_s)
    except CommError as error:
        return str(error)
    finally:
        # One for the pool to destroy.
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
