"""The placement of a run's ranks, verified at start and shown.

`counterflow node` leaves the order of the job's nodes on file. Every rank tells where it is and
what that order says (`told_by`, whose value the trainer gathers over all ranks: small, because
there are as many as ranks); `require_order` then finds the same fault on every rank, and rank 0
prints `placement_lines` of what it reads in the file itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ...parallel.mesh import MeshShape
from ..settings import ConfigError
from .order import digest

ORDER = "COUNTERFLOW_ORDER"  # the variable that names the file of the order
_SHOWN_NODES = 64


@dataclass(frozen=True)
class Told:
    """What a rank of a Slurm job tells of its place.

    Attributes:
        rank: as torchrun numbers it.
        node: on which Slurm has put it.
        expected: the node that the order says for this rank.
        order: the order's checksum.
        path: of the file that this rank has it from.
    """

    rank: int
    node: str
    expected: str
    order: str
    path: str

    @property
    def nodes(self) -> tuple[str, ...]:
        """The order, read from the file."""
        return _read_order(self.path)[1]

    @property
    def switches(self) -> tuple[str, ...]:
        """The lowest switch of each of its nodes, "" if unknown; read from the file."""
        return _read_order(self.path)[2]


def told_by(environ: Mapping[str, str] = os.environ) -> Told | str | None:
    """What this rank tells; None where `counterflow node` did not start it.

    An order that cannot be read is told as the reason, so that no rank waits for this one.
    """
    path = environ.get(ORDER)
    if not path:
        return None
    try:
        rank = int(environ["RANK"])
        per_node, nodes, _ = _read_order(path)
        expected = nodes[rank // per_node]
        node = environ["SLURMD_NODENAME"]
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError) as error:
        return f"the order of the job's nodes in {path} cannot be used: {error!r}"
    return Told(rank, node, expected, digest(nodes), path)


@cache  # once in a process: every rank of a run reads it from one shared folder
def _read_order(path: str) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    """Ranks of each node, the nodes, and the lowest switch of each."""
    text = json.loads(Path(path).read_text(encoding="utf-8"))
    nodes = tuple(str(entry["node"]) for entry in text["order"])
    switches = tuple(str(entry["switch"]) for entry in text["order"])
    return int(text["per_node"]), nodes, switches


def require_order(told: Sequence[Told | str | None]) -> None:
    """Check that every rank is on the node that the order says, and that all have one order.

    Args:
        told: what `told_by` gave on every rank, by rank.

    Raises:
        ConfigError: the same on every rank; names the first rank that is elsewhere.
    """
    if all(one is None for one in told):
        return
    first: Told | None = None
    for rank, one in enumerate(told):
        if one is None:
            raise ConfigError(
                f"rank {rank} was not started by `counterflow node`, as others were; start all "
                "ranks of a run alike"
            )
        if isinstance(one, str):
            raise ConfigError(f"rank {rank}: {one}")
        if one.rank != rank or one.node != one.expected:
            raise ConfigError(
                f"rank {rank} is on node {one.node}, but the order of the job's nodes has it on "
                f"{one.expected}: the nodes were numbered otherwise, and expert groups would be "
                "torn apart"
            )
        first = first or one
        if one.order != first.order:
            raise ConfigError(
                f"rank {rank} on node {one.node} has another order of the job's nodes than rank "
                f"{first.rank} on node {first.node}; the run's folder is not the same on both"
            )


def placement_lines(mesh: MeshShape, nodes: Sequence[str], switches: Sequence[str]) -> list[str]:
    """The real placement, for a person.

    Args:
        mesh: the sizes; its ranks are on the nodes in this order, the same number on each.
        nodes: by node rank.
        switches: the lowest switch of each node, "" if unknown.
    """
    per_node = mesh.world_size // len(nodes)
    groups = expert_groups(mesh)
    of_rank = {rank: index for index, group in enumerate(groups) for rank in group}
    rows: list[list[str]] = []
    for index, (node, switch) in enumerate(zip(nodes, switches, strict=True)):
        ranks = range(index * per_node, (index + 1) * per_node)
        held = sorted({of_rank[rank] for rank in ranks})
        rows.append(
            [str(index), node, switch or "-", _span(ranks[0], ranks[-1]), _span(held[0], held[-1])]
        )
    shown = rows[:_SHOWN_NODES]
    lines = _columns([["node", "host", "switch", "ranks", "expert groups"], *shown])
    if len(rows) > len(shown):
        lines.append(f"... and {len(rows) - len(shown)} more nodes")
    inside = sum(group[0] // per_node == group[-1] // per_node for group in groups)
    told = f"expert groups of {mesh.ep} ranks: {inside} of {len(groups)} within one node"
    if any(switches):
        under = sum(
            len({switches[rank // per_node] for rank in group}) == 1
            and bool(switches[group[0] // per_node])
            for group in groups
        )
        told += f", {under} under one switch"
    return [*lines, told]


def expert_groups(mesh: MeshShape) -> list[tuple[int, ...]]:
    """The ranks of each expert group, by its first rank."""
    return list(dict.fromkeys(mesh.ep_peers(rank) for rank in range(mesh.world_size)))


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
