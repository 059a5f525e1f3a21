"""What the host works out before a dispatch, without communication: DeepSeek-V3's size by default.

`Dispatcher.start_preprocess` and its `finish` as they are, on one core; only the exchange of counts
is replaced by a copy of what the other ranks would have told. Wall time, and processor time, to
which other programs add less.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.comm.dispatch.base import Options
from counterflow.comm.dispatch.census import UNKNOWN
from counterflow.comm.dispatch.exchange import Peers
from counterflow.comm.dispatch.grid import NodeGrid
from counterflow.comm.dispatch.hops import Hops
from counterflow.comm.dispatch.layout import ExpertLayout
from counterflow.comm.dispatch.route import SlotTables
from counterflow.parallel.mesh import Mesh, MeshShape
from tests.cases_dispatch_bytes import Sizes, routing

NAMES = ("flat", "dedup", "two_hop")


class Told(Peers):
    """Peers of an exchange whose outcome is known beforehand.

    Attributes:
        lines: [R, length] int64, what rank 0 is told, by source.
    """

    lines: Tensor

    def __init__(self, num_ranks: int) -> None:  # none of the groups that `Peers` needs
        self.size = num_ranks
        self.ranks = tuple(range(num_ranks))
        self.others = self.ranks[1:]

    def tell(self, lines: Tensor, operation: str) -> Tensor:
        """See `Peers.tell`."""
        return self.lines.clone()


def _dispatcher(name: str, rank: int, nodes: Sequence[int], num_experts: int, told: Told) -> Hops:
    num_ranks = len(nodes)
    mesh = Mesh(MeshShape(1, num_ranks, num_ranks), rank, nodes)
    mesh.ep_group = cast("dist.ProcessGroup", object())  # `told` is asked in its place
    layout = ExpertLayout.contiguous(num_experts, num_ranks)
    make = partial(Hops, name, mesh, layout, Options(), everyone=told)
    if name == "two_hop":
        return make(grid=_grid(name, nodes), rail=told, node=told)
    return make(grid=_grid(name, nodes), each_choice=name == "flat")


def _grid(name: str, nodes: Sequence[int]) -> NodeGrid:
    return NodeGrid.of(nodes) if name == "two_hop" else NodeGrid.one_node(len(nodes))


def case(
    rank: int, world: int, num_ranks: int, ranks_per_node: int, sizes: Sizes, repeats: int
) -> dict[str, dict[str, float]]:
    """Milliseconds of a preprocessing of the first of `num_ranks` ranks, by dispatcher."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    nodes = [r // ranks_per_node for r in range(num_ranks)]
    experts = [routing(r, sizes).experts_TK for r in range(num_ranks)]
    cpu = torch.device("cpu")
    walls: dict[str, list[float]] = {name: [] for name in NAMES}
    processor: dict[str, list[float]] = {name: [] for name in NAMES}
    made: dict[str, Hops] = {}
    for name in NAMES:
        told = Told(num_ranks)
        lines = []
        for source, experts_TK in enumerate(experts):
            d = _dispatcher(name, source, nodes, sizes.num_experts, told)
            tables = SlotTables(d.layout, _grid(name, nodes), nodes, cpu)
            lines.append(d.count(experts_TK, UNKNOWN, tables)[-1][0])
        told.lines = torch.stack(lines)
        made[name] = _dispatcher(name, 0, nodes, sizes.num_experts, told)
        made[name].start_preprocess(experts[0]).finish()
    for _ in range(repeats):
        for name, d in made.items():
            began, running = time.perf_counter(), time.process_time()
            d.start_preprocess(experts[0]).finish()
            walls[name].append((time.perf_counter() - began) * 1e3)
            processor[name].append((time.process_time() - running) * 1e3)
    return {
        name: {
            "median": statistics.median(walls[name]),
            "min": min(walls[name]),
            "processor_median": statistics.median(processor[name]),
        }
        for name in NAMES
    }
