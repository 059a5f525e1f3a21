"""What ranks do in tests/parallel/test_mesh.py."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from counterflow.parallel.mesh import Mesh, MeshShape

GROUPS = ("pp", "dp", "ep", "edp")


def talk(rank: int, _world: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Coordinates, and who answers in each group, in the group's order."""
    mesh = Mesh.create(MeshShape(*shape))
    heard: dict[str, Any] = {"coordinates": (mesh.pp_rank, mesh.dp_rank, mesh.ep_rank)}
    for name in GROUPS:
        group = getattr(mesh, f"{name}_group")
        if group is None:
            heard[name] = None
            continue
        answers = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
        dist.all_gather(answers, torch.tensor([rank]), group=group)
        heard[name] = tuple(int(a) for a in answers)
    return heard


def refused(_rank: int, _world: int, shape: tuple[int, int, int], nodes: Any = None) -> str:
    """The reason why the world does not fit; no group and no message came before it."""
    made: list[object] = []
    with (
        mock.patch.object(dist, "new_group", lambda *a, **_: made.append(a)),
        mock.patch.object(dist, "all_gather_object", lambda *a, **_: made.append(a)),
    ):
        try:
            Mesh.create(MeshShape(*shape), nodes=nodes)
        except ValueError as error:
            assert not made
            return str(error)
    return "accepted"


def nodes_from_environment(
    rank: int, world: int, per_node: int, by_group_rank: bool
) -> tuple[tuple[int, ...], int, int]:
    told = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(per_node)}
    if by_group_rank:
        told["GROUP_RANK"] = str(rank // per_node)
    with mock.patch.dict(os.environ, told):
        mesh = Mesh.create(MeshShape(1, world, world))
    return mesh.nodes, mesh.node, mesh.num_nodes


def explicit_nodes(_rank: int, world: int) -> tuple[tuple[int, ...], int]:
    with mock.patch.dict(os.environ, {"GROUP_RANK": "5"}):
        mesh = Mesh.create(MeshShape(world), nodes=[1, 1, 0, 0])
    return mesh.nodes, mesh.node


def limit(rank: int, world: int) -> str:
    """A group's collective ends after the limit given to the mesh."""
    dist.barrier()  # making the groups has that limit, too
    mesh = Mesh.create(MeshShape(1, world), timeout_s=3.0)
    said = "no error"
    if rank == 0:
        try:
            dist.all_reduce(torch.ones(1), group=mesh.dp_group)
        except RuntimeError as error:
            said = str(error)
    dist.barrier()  # over the world, which has not failed
    return said
