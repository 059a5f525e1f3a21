"""Which dispatcher: by name, or what the topology calls for."""

from __future__ import annotations

import difflib
import logging
from functools import partial
from typing import Any, get_args

import torch
import torch.distributed as dist

from ...parallel.mesh import Mesh
from ..collectives import gather
from .base import Dispatcher, Options, require_groups
from .exchange import Peers
from .grid import NodeGrid
from .hops import Hops
from .lane import lane_of
from .layout import ExpertLayout
from .names import DispatcherName, PayloadName
from .payload import Payload

_LOG = logging.getLogger(__name__)


def dispatcher(
    name: str,
    mesh: Mesh,
    *,
    num_experts: int,
    layout: ExpertLayout | None = None,
    payload: PayloadName = "exact",
    alignment: int = 1,
    node_limit: int | None = None,
    chunks: int = 4,
    check: bool | None = None,
    hidden: int | None = None,
    top_k: int | None = None,
    timeout_s: float = 300.0,
    num_sms: int | None = None,
) -> Dispatcher[Any]:
    """The dispatcher called `name`, over the expert-parallel group of `mesh`.

    A collective of the world, as its process groups are made here: every rank asks for the same.

    Args:
        name: "flat", a row for each (token, expert); "dedup", a row once to each rank that needs
            it; "two_hop", once to each node and from there to its ranks; "deep_ep", DeepEP's
            kernels, on GPUs; "auto", what the topology calls for (`why` of the result says it).
        mesh: made by `Mesh.create` where ep > 1; its `nodes` say which rank is where.
        num_experts: E, routed experts.
        layout: which expert stands where; by default E / ep follow each other on each rank.
        payload: "exact", rows travel in their own dtype; "bf16"; "fp8", dispatch(F) and combine(B)
            in E4M3 with scales of 1x128 tiles, the other two in BF16 (arXiv 2412.19437, 3.2.2);
            "logfmt8", LogFMT of 8 bits for E4M3; "logfmt10", of 10 bits for all four
            (arXiv 2505.09343, 3.2).
        alignment: rows of each expert are padded with zeros to a multiple of this.
        node_limit: the most nodes that a token may go to; more is an error on every rank.
        chunks: two hops work on that many pieces at once at most, one crossing while another is
            handed on inside the node.
        check: refuse weights that are not finite; by default on the CPU only, because a GPU would
            have to stop for it.
        hidden, top_k: columns of a row and experts a token, where they are known: "auto" then
            takes nothing that would refuse them later.
        timeout_s: limit of every wait for peers, seconds. (A GPU waits by its stream, whose limit
            is that of the process group: `Mesh.create`'s.)
        num_sms: most SMs of a GPU that communication takes: those of DeepEP's kernels, or the
            blocks (CTAs) of NCCL's, which gets process groups of its own for it; None leaves it to
            the library.

    Raises:
        ValueError: unknown name, experts that do not divide among the ranks, a group that lies
            unevenly on its nodes with "two_hop", DeepEP where it cannot be used, or `num_sms` where
            ranks do not speak NCCL.
    """
    known = get_args(DispatcherName)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"there is no dispatcher {name!r}; did you mean {nearest!r}? "
            f"(known: {', '.join(known)})"
        )
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if layout is None:
        mesh.shape.require_experts(num_experts)
        layout = ExpertLayout.contiguous(num_experts, mesh.shape.ep)
    elif layout.num_experts != num_experts:
        raise ValueError(
            f"the layout is of {layout.num_experts} experts, num_experts is {num_experts}"
        )
    options = Options(
        Payload(payload), alignment, node_limit, chunks, check, hidden, top_k, timeout_s, num_sms
    )
    _require_alike(mesh, name, layout, options)
    why = "asked for by name"
    if name == "auto":
        name, why = choose(mesh, layout, options)
    made = _make(name, mesh, layout, options)
    made.why = why
    if not mesh.rank:
        _LOG.info("dispatch: %s (%s)", name, why)
    return made


def _require_alike(mesh: Mesh, name: str, layout: ExpertLayout, options: Options) -> None:
    """Raise ValueError on all ranks of an expert group where one asks for something else."""
    mine = {"name": name, "num_experts": layout.num_experts, "layout": layout.slots}
    mine |= {"payload": options.payload.name}
    names = ("alignment", "node_limit", "chunks", "check", "hidden", "top_k", "timeout_s",
             "num_sms")  # fmt: skip
    mine |= {option: getattr(options, option) for option in names}
    ranks = mesh.shape.ep_peers(mesh.rank)
    every = gather(mine, mesh.ep_group, "a dispatcher's options", board=mesh.waits)
    for rank, other in zip(ranks, every, strict=False):
        for option, value in other.items():
            if value != every[0][option]:
                raise ValueError(
                    f"ranks ask for different dispatchers: {option} is {_short(every[0][option])} "
                    f"on rank {ranks[0]}, {_short(value)} on rank {rank}; give all the same"
                )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def choose(mesh: Mesh, layout: ExpertLayout, options: Options) -> tuple[str, str]:
    """The dispatcher for this topology, and why, in a sentence. A collective of the world."""
    from .deep_ep import usable

    groups = _groups(mesh)
    if len(groups[0]) == 1:
        return "flat", "every rank has all experts, so nothing is sent"
    # Hosts may differ in what is installed, and all ranks have to choose alike.
    world = dist.group.WORLD if dist.is_initialized() else None
    obstacles = gather(usable(mesh, layout, options), world, "what is installed", board=mesh.waits)
    obstacle = next(filter(None, obstacles), None)
    if obstacle is None:
        return "deep_ep", "DeepEP is installed and fits this group"
    name, why = _by_topology(mesh, groups)
    # Without a GPU nobody expects DeepEP.
    return name, f"{why}; not deep_ep: {obstacle}" if torch.cuda.is_available() else why


def _by_topology(mesh: Mesh, groups: list[tuple[int, ...]]) -> tuple[str, str]:
    spans = [len({mesh.nodes[r] for r in ranks}) for ranks in groups]
    if max(spans) == 1:
        return "dedup", "each expert group lies within a node"
    try:
        grids = [_grid(mesh, ranks) for ranks in groups]
    except ValueError as error:
        return "dedup", f"not two_hop, because {error}"
    if all(grid.ranks_per_node == 1 for grid in grids):
        return "dedup", "each rank of an expert group is on a node of its own"
    most = max(grids, key=lambda grid: grid.num_nodes)
    return "two_hop", (
        f"an expert group spans {most.num_nodes} nodes with {most.ranks_per_node} ranks on each"
    )


def _make(name: str, mesh: Mesh, layout: ExpertLayout, options: Options) -> Dispatcher[Any]:
    if name == "deep_ep":
        from .deep_ep import DeepEP

        return DeepEP(mesh, layout, options)
    ranks = mesh.shape.ep_peers(mesh.rank)
    require_groups(mesh)
    _require_sms(mesh, options)
    if options.num_sms is None:
        sequence = lane_of(mesh).sequence
        everyone = Peers(mesh.ep_group, ranks, mesh.rank, options.timeout_s, sequence)
    else:
        everyone = _peers(mesh, _groups(mesh), "dispatch", options)
    make = partial(Hops, name, mesh, layout, options, everyone=everyone)
    if name != "two_hop":
        return make(grid=NodeGrid.one_node(len(ranks)), each_choice=name == "flat")
    groups = _groups(mesh)
    grids = [_grid(mesh, group) for group in groups]  # of all, so that all ranks refuse
    rails: list[tuple[int, ...]] = []
    nodes: list[tuple[int, ...]] = []
    for group, grid in zip(groups, grids, strict=True):
        rows = [tuple(group[e] for e in row) for row in grid.rows]
        nodes += rows
        rails += list(zip(*rows, strict=True))
    return make(
        grid=grids[groups.index(ranks)],
        rail=_peers(mesh, rails, "dispatch over a rail", options),
        node=_peers(mesh, nodes, "dispatch within a node", options),
    )


def _require_sms(mesh: Mesh, options: Options) -> None:
    """Raise if a number of SMs is asked for that neither DeepEP nor NCCL is there to heed."""
    if options.num_sms is None or mesh.ep_group is None:
        return
    if "cuda:nccl" not in dist.get_backend_config(mesh.ep_group):
        raise ValueError(
            f"num_sms={options.num_sms}: only DeepEP and NCCL, on GPUs, can be kept to some SMs, "
            "and these ranks do not speak NCCL with each other; leave num_sms out"
        )


def _groups(mesh: Mesh) -> list[tuple[int, ...]]:
    """The expert groups of the whole world, by global rank."""
    return sorted({mesh.shape.ep_peers(rank) for rank in range(mesh.shape.world_size)})


def _grid(mesh: Mesh, ranks: tuple[int, ...]) -> NodeGrid:
    """The grid of an expert group, whose rails must have the nodes in the order of their ranks."""
    nodes = [mesh.nodes[rank] for rank in ranks]
    grid = NodeGrid.of(nodes)
    if any(list(rail) != sorted(rail) for rail in zip(*grid.rows, strict=True)):
        raise ValueError(
            f"the ranks of an expert group lie on their nodes in a changing order ({nodes}), so "
            "that those of one in-node index do not meet the nodes in the same order; start the "
            "ranks node by node, or use the dispatcher 'dedup'"
        )
    return grid


def _peers(mesh: Mesh, sets: list[tuple[int, ...]], purpose: str, options: Options) -> Peers:
    mine = next(ranks for ranks in sets if mesh.rank in ranks)
    limit_s, most = options.timeout_s, options.num_sms
    group = mesh.group_among(sets, purpose, timeout_s=limit_s, most_blocks=most)
    return Peers(group, mine, mesh.rank, limit_s, lane_of(mesh).sequence)
