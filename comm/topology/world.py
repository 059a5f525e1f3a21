"""All ranks of a world by node: what each one tells of itself, put together and compared."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .place import ProcessPlace, place_of_process

if TYPE_CHECKING:
    from ..waiting import WaitBoard

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """The machine that a process runs on.

    Attributes:
        host: its name; containers on one machine may have several.
        boot: names the running kernel, which containers of one machine share; "" if unknown.
    """

    host: str
    boot: str = ""

    def surely_differs(self, other: Machine) -> bool:
        """Whether these are two machines, not one under two names or two under one."""
        return self.host != other.host and (self.boot != other.boot or not self.boot)


def this_machine(root: Path = Path("/")) -> Machine:
    """The machine that this process runs on, its boot as the files under `root` tell."""
    try:
        boot = (root / "proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        boot = ""
    return Machine(socket.gethostname(), boot)


@dataclass(frozen=True)
class Seat:
    """What one rank tells of itself: its place, its machine, and the device it is to compute on."""

    place: ProcessPlace
    machine: Machine
    device: str = ""


@dataclass(frozen=True)
class Topology:
    """Every rank of a world by node. `Topology.of` makes it, `gather_topology` collects it.

    Attributes:
        nodes: the node of each rank, from 0 up without gaps, in the launcher's order.
        local_ranks: each rank's index within its node.
        seats: what each rank told.
        notes: a sentence for each thing that is odd: a launcher that disagrees with the hosts,
            nodes of unequal size, an MPI that could not be asked.
    """

    nodes: tuple[int, ...]
    local_ranks: tuple[int, ...]
    seats: tuple[Seat, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, seats: Sequence[Seat]) -> Topology:
        """The topology of a world whose rank r told seats[r].

        A launcher's nodes are followed where all ranks know theirs, also where hosts say otherwise,
        which is noted. Else the ranks of one machine are one node.
        """
        told = [None if _is_alone(seat, len(seats)) else seat.place.node for seat in seats]
        known = [node for node in told if node is not None]
        by_host = len(known) < len(told)
        names: list[Hashable] = [seat.machine for seat in seats] if by_host else list(known)
        ordered = dict.fromkeys(names) if by_host else sorted(set(known))
        numbers: dict[Hashable, int] = {name: i for i, name in enumerate(ordered)}
        nodes = tuple(numbers[name] for name in names)
        notes = [
            *_odd_sources(seats, by_host=by_host),
            *_odd_hosts(nodes, seats),
            *_uneven_nodes(nodes),
        ]
        return cls(nodes, _local_ranks(nodes, seats), tuple(seats), tuple(notes))

    @property
    def num_nodes(self) -> int:
        return len(set(self.nodes))

    def ranks_of(self, node: int) -> tuple[int, ...]:
        """The ranks on a node, ascending."""
        return tuple(rank for rank, n in enumerate(self.nodes) if n == node)

    @property
    def is_even(self) -> bool:
        """Whether all nodes have the same number of ranks."""
        return len({len(self.ranks_of(node)) for node in range(self.num_nodes)}) == 1


def gather_topology(
    *,
    environ: Mapping[str, str] = os.environ,
    device: str = "",
    board: WaitBoard | None = None,
    timeout_s: float = 300.0,
) -> Topology:
    """The topology of torch.distributed's world; a collective of all its ranks.

    Where MPI started the ranks and could not be asked, hosts are taken for nodes, and rank 0 logs a
    warning that says why.

    Args:
        environ: this process's environment.
        device: what this rank is to compute on, for the reader.
        board: where the wait is announced.
        timeout_s: limit of the wait for MPI where that started the job, seconds; the limit of the
            gathering itself is that of torch.distributed's world.

    Raises:
        ValueError: a rank's environment is wrong; raised on every rank.
        CommError: a rank is gone, or did not answer within the limit.
    """
    import torch.distributed as dist

    from ..collectives import gather
    from ..errors import CommError

    mine: Seat | Exception
    try:
        mine = Seat(place_of_process(environ, timeout_s=timeout_s), this_machine(), device)
    except (ValueError, CommError) as error:
        mine = error  # told to all, so that none of them waits for this rank
    told = gather(mine, dist.group.WORLD, "the nodes of all ranks", board=board)
    for rank, seat in enumerate(told):
        if isinstance(seat, CommError):
            raise seat
        if isinstance(seat, Exception):
            raise ValueError(f"rank {rank} does not know its node: {seat}")
    seats = [seat for seat in told if isinstance(seat, Seat)]
    if dist.get_rank() == 0:
        for note in _problems(seats):
            _log.warning("%s", note)
    return Topology.of(seats)


def listed(items: Sequence[object], most: int = 8) -> str:
    """Items for a sentence: the first ones, and dots for the rest."""
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")


def _is_alone(seat: Seat, world_size: int) -> bool:
    """Whether a rank of several has no launcher's word, and so takes itself for the only one."""
    return world_size > 1 and seat.place.world_size == 1


def _local_ranks(nodes: Sequence[int], seats: Sequence[Seat]) -> tuple[int, ...]:
    """In-node indices as told, or where these make no sense by order of rank."""
    found = [0] * len(nodes)
    for node in set(nodes):
        ranks = [rank for rank, n in enumerate(nodes) if n == node]
        told = [seats[rank].place.local_rank for rank in ranks]
        sensible = set(told) == set(range(len(ranks)))
        for index, (rank, local) in enumerate(zip(ranks, told, strict=True)):
            found[rank] = local if sensible and local is not None else index
    return tuple(found)


def _odd_sources(seats: Sequence[Seat], *, by_host: bool) -> list[str]:
    notes: list[str] = []
    if by_host:
        notes.append("no launcher tells the node of every rank, so the ranks of a host are a node")
    sources = list(dict.fromkeys(seat.place.source for seat in seats))
    if len(sources) > 1:
        notes.append(f"the ranks know their places by different launchers: {', '.join(sources)}")
    return notes + _problems(seats)


def _problems(seats: Sequence[Seat]) -> list[str]:
    """What kept ranks from asking MPI, by the first of them."""
    for rank, seat in enumerate(seats):
        if seat.place.problem:
            return [
                f"rank {rank} cannot ask MPI for its node, so the ranks of a host are a node (give "
                f"Mesh.create(nodes=...) if that is wrong): {seat.place.problem}"
            ]
    return []


def _odd_hosts(nodes: Sequence[int], seats: Sequence[Seat]) -> list[str]:
    """Where the launcher's nodes and the machines do not match."""
    notes: list[str] = []
    nodes_on: dict[Machine, list[int]] = {}
    for node, seat in zip(nodes, seats, strict=True):
        on = nodes_on.setdefault(seat.machine, [])
        if node not in on:
            on.append(node)
    for machine, on in nodes_on.items():
        if len(on) > 1:
            notes.append(
                f"nodes {listed(sorted(on))} are all on host {machine.host}: the launcher's nodes "
                "are followed, but nothing between them crosses a network"
            )
    for node in sorted(set(nodes)):
        first = seats[nodes.index(node)].machine
        others = [m for m, on in nodes_on.items() if node in on and m.surely_differs(first)]
        if others:
            hosts = listed([m.host for m in [first, *others]])
            notes.append(
                f"node {node} has ranks on different hosts ({hosts}): the launcher's node is "
                "followed, but what stays inside it crosses a network; start one node per host"
            )
    return notes


def _uneven_nodes(nodes: Sequence[int]) -> list[str]:
    on: dict[int, int] = {}
    for node in nodes:
        on[node] = on.get(node, 0) + 1
    if len(set(on.values())) <= 1:
        return []
    sizes = listed([f"{count} on node {node}" for node, count in sorted(on.items())])
    return [f"nodes have different numbers of ranks: {sizes}"]
