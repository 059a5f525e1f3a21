"""Whether DeepEP is here and can serve an expert group."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from ...parallel.mesh import Mesh
from .base import Options
from .deep_ep_versions import Elastic, Legacy
from .grid import NodeGrid
from .layout import ExpertLayout

LEAST_CAPABILITY = ((8, 0), (9, 0))  # of a GPU, for V1 and V2


def load() -> Any:
    """The installed module deep_ep.

    Raises:
        ValueError: there is none, or it cannot be loaded.
    """
    try:
        library = import_module("deep_ep")
    except Exception as error:  # it checks CUDA and NCCL on import, and fails in its own ways
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"deep_ep is not installed: {lines[0]}; install DeepEP, or use 'two_hop'"
        ) from error
    if not hasattr(library, "ElasticBuffer") and not hasattr(library, "Buffer"):
        raise ValueError(
            "the module deep_ep has neither ElasticBuffer nor Buffer, so it is not DeepEP; install "
            "DeepEP, or use 'two_hop'"
        )
    return library


def usable(mesh: Mesh, layout: ExpertLayout, options: Options) -> str | None:
    """Why DeepEP should not be chosen here, or None if it can be.

    What only shows with the tensors is not known yet: a hidden size that DeepEP does not take is
    refused by `dispatch`.
    """
    if not torch.cuda.is_available():
        return "there is no GPU"
    if mesh.ep_group is not None and "cuda:nccl" not in dist.get_backend_config(mesh.ep_group):
        return "the ranks do not speak NCCL with each other"
    if options.payload.name == "exact":
        return "DeepEP rounds rows to bfloat16, which the payload 'exact' does not ask for"
    reason = obstacle(mesh, layout)
    if reason is not None:
        return reason
    least = LEAST_CAPABILITY[1 if hasattr(load(), "ElasticBuffer") else 0]
    if torch.cuda.get_device_capability() < least:
        return f"this GPU's compute capability is below {least[0]}.{least[1]}, which DeepEP needs"
    return None


def obstacle(mesh: Mesh, layout: ExpertLayout) -> str | None:
    """What stands against DeepEP, whatever the tensors."""
    world = range(mesh.shape.world_size)
    groups = sorted({mesh.shape.ep_peers(rank) for rank in world})  # of all: ranks answer alike
    try:
        library = load()
        grids = [NodeGrid.of([mesh.nodes[rank] for rank in group]) for group in groups]
    except ValueError as error:
        return str(error)
    ranks = mesh.shape.ep
    if ranks == 1:
        return "ep=1, so there is nobody to exchange tokens with"
    if any(grid.order != tuple(range(ranks)) for grid in grids):
        return "DeepEP takes neighbouring ranks for a node, and these lie in another order"
    if torch.are_deterministic_algorithms_enabled() and _fills_memory():
        return (
            "torch fills new memory, which would run beside the communication: set "
            "torch.utils.deterministic.fill_uninitialized_memory = False"
        )
    if hasattr(library, "ElasticBuffer"):
        most, most_a_rank = Elastic.MOST_SLOTS, Elastic.MOST_SLOTS_A_RANK
        if layout.num_slots > most or layout.slots_per_rank > most_a_rank:
            return f"DeepEP takes at most {most} expert slots, {most_a_rank} a rank"
        return None
    node = Legacy.NODE
    if ranks not in Legacy.RANKS:
        return f"DeepEP V1 takes {', '.join(map(str, Legacy.RANKS))} ranks, not {ranks}"
    for grid in grids:
        if grid.ranks_per_node != min(node, ranks):
            return f"DeepEP V1 takes {node} ranks for a node, here are {grid.ranks_per_node}"
    return None


def _fills_memory() -> bool:
    from torch.utils import deterministic

    return bool(deterministic.fill_uninitialized_memory)  # pyright: ignore[reportAttributeAccessIssue]
