"""The channels between pipeline ranks that a schedule needs, and their process groups."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..comm.p2p import ChannelGroups
from .mesh import Mesh
from .schedule import Schedule
from .transfers import sends

Edge = tuple[int, int]  # source and destination


def edges(schedule: Schedule) -> list[Edge]:
    """Pairs of pipeline ranks that exchange messages, each in both directions, in order.

    Where messages flow one way only, acknowledgements could flow back.
    """
    one_way = {(r, d) for r in range(schedule.num_ranks) for d, _ in sends(schedule, r)}
    return sorted(one_way | {(destination, source) for source, destination in one_way})


def channel_groups(
    schedule: Schedule, mesh: Mesh, *, separate: bool, device: torch.device, timeout_s: float
) -> dict[Edge, ChannelGroups]:
    """The process groups of each channel of this rank, by global ranks.

    Args:
        schedule: what will run.
        mesh: this rank's place.
        separate: give each channel groups of its own, which CUDA tensors need; a collective of the
            world, whose time grows with the number of pipelines. Otherwise all share the
            pipeline's group.
        device: where messages live.
        timeout_s: limit of a wait, seconds.

    Raises:
        ValueError: the mesh has no process groups.
    """
    if mesh.shape.pp == 1:
        return {}
    if mesh.pp_group is None:
        raise ValueError(
            f"this mesh has pp={mesh.shape.pp} but no process groups: make it with Mesh.create"
        )
    peers = mesh.shape.pp_peers(mesh.rank)
    own = [edge for edge in edges(schedule) if mesh.pp_rank in edge]
    if not separate:
        shared = ChannelGroups(mesh.pp_group, mesh.pp_group)
        return {(peers[a], peers[b]): shared for a, b in own}
    made: dict[Edge, list[dist.ProcessGroup]] = {edge: [] for edge in own}
    for use in ChannelGroups._fields:
        for way in ("up", "down"):  # a group has no direction, a channel has
            one_way = [e for e in edges(schedule) if (e[0] < e[1]) is (way == "up")]
            groups = mesh.groups_within_pipelines(
                [(min(e), max(e)) for e in one_way], f"{use} {way}", timeout_s=timeout_s
            )
            for edge in set(one_way) & set(own):
                made[edge].append(groups[min(edge), max(edge)])
    result = {(peers[a], peers[b]): ChannelGroups(*found) for (a, b), found in made.items()}
    _connect(result, mesh.rank, device)
    return result


def _connect(groups: dict[Edge, ChannelGroups], rank: int, device: torch.device) -> None:
    """Send one element over every group.

    NCCL connects two ranks when both first use a group, and blocks the program of the first until
    the second comes. Receives are posted ahead, so within a step that would be a deadlock; here
    all ranks take the channels in one order.
    """
    for source, destination in sorted(groups):
        for group in groups[source, destination]:
            if rank == source:
                dist.send(torch.zeros(1, device=device), destination, group)
            else:
                dist.recv(torch.zeros(1, device=device), source, group)
