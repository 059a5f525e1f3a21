"""Whether DeepEP is here and can serve an expert group."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

from ...parallel.mesh import Mesh
from ..collectives import gather
from .base import Options
from .deep_ep_versions import Elastic, Legacy
from .grid import NodeGrid
from .layout import ExpertLayout

Version = type[Elastic] | type[Legacy]


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

    What `options` leaves open (`hidden`, `top_k`) is refused by `dispatch` where it does not fit.
    """
    if not torch.cuda.is_available():
        return "there is no GPU"
    if mesh.ep_group is not None and "cuda:nccl" not in dist.get_backend_config(mesh.ep_group):
        return "the ranks do not speak NCCL with each other"
    if options.payload.name == "exact":
        return "DeepEP rounds rows to bfloat16, which the payload 'exact' does not ask for"
    try:
        suitable(mesh, layout, options)
    except ValueError as error:
        return str(error)
    name = torch.cuda.get_device_name()
    if "pcie" in name.lower():
        return f"{name} is a PCIe card, and DeepEP counts on NVLink between a node's GPUs"
    return None


def agreed(mesh: Mesh, layout: ExpertLayout, options: Options) -> Version:
    """The generation of DeepEP that serves this rank's expert group. A collective of the group.

    Raises:
        ValueError: on all its ranks, where DeepEP cannot serve one of them, or serves them by
            different generations.
        CommError: a rank died or did not answer within the process group's limit.
    """
    version, reason = None, None
    try:
        version = suitable(mesh, layout, options)
    except ValueError as error:
        reason = str(error)
    mine = ("" if version is None else version.version, reason)
    told = gather(mine, mesh.ep_group, "which DeepEP is installed", board=mesh.waits)
    for rank, (_, why) in zip(mesh.shape.ep_peers(mesh.rank), told, strict=True):
        if why is not None:
            advice = "" if "two_hop" in why else "; use 'two_hop'"
            raise ValueError(
                f"the dispatcher 'deep_ep' cannot serve here, says rank {rank}: {why}{advice}"
            )
    names = sorted({name for name, _ in told})
    if len(names) > 1:
        raise ValueError(
            f"the ranks of an expert group have different generations of DeepEP "
            f"({', '.join(names)}): install one on all hosts, or use 'two_hop'"
        )
    assert version is not None
    return version


def suitable(mesh: Mesh, layout: ExpertLayout, options: Options) -> Version:
    """The generation that serves on this rank.

    Raises:
        ValueError: DeepEP is not here, or something stands against it.
    """
    library = load()
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    version = _version(library, capability)
    world = range(mesh.shape.world_size)
    groups = sorted({mesh.shape.ep_peers(rank) for rank in world})  # of all: ranks answer alike
    grids = [NodeGrid.of([mesh.nodes[rank] for rank in group]) for group in groups]
    payload, ranks = options.payload.name, mesh.shape.ep
    reasons = (
        _against_payload(payload),
        _against_group(version, grids, ranks, layout),
        _against_gpu(library, capability, ranks, payload),
        filling(),
        version.refusal(ranks, payload, options.hidden, options.top_k),
        _against_sms(version, options.num_sms),
    )
    for reason in reasons:
        if reason is not None:
            raise ValueError(reason)
    return version


def _version(library: Any, capability: tuple[int, int] | None) -> Version:
    """V2 where the package has it and the GPU bears it; V2's package has V1's `Buffer` too."""
    versions: list[Version] = []
    if hasattr(library, "ElasticBuffer"):
        versions.append(Elastic)
    if hasattr(library, "Buffer"):
        versions.append(Legacy)
    for version in versions:
        if capability is None or capability >= version.least_capability:
            return version
    major, minor = min(version.least_capability for version in versions)
    raise ValueError(f"this GPU's compute capability is below {major}.{minor}, which DeepEP needs")


def _against_payload(payload: str) -> str | None:
    if payload.startswith("logfmt"):
        return (
            f"DeepEP's kernels carry BF16 and FP8, not {payload!r}: ask for payload 'fp8', or for "
            "'two_hop'"
        )
    return None


def _against_group(
    version: Version, grids: list[NodeGrid], ranks: int, layout: ExpertLayout
) -> str | None:
    if ranks == 1:
        return "ep=1, so there is nobody to exchange tokens with"
    if any(grid.order != tuple(range(ranks)) for grid in grids):
        return "DeepEP takes neighbouring ranks for a node, and these lie in another order"
    if version is Elastic:
        most, most_a_rank = Elastic.MOST_SLOTS, Elastic.MOST_SLOTS_A_RANK
        if layout.num_slots > most or layout.slots_per_rank > most_a_rank:
            return f"DeepEP takes at most {most} expert slots, {most_a_rank} a rank"
        return None
    if ranks not in Legacy.RANKS:
        return f"DeepEP V1 takes {', '.join(map(str, Legacy.RANKS))} ranks, not {ranks}"
    for grid in grids:
        if grid.ranks_per_node != min(Legacy.NODE, ranks):
            return f"DeepEP V1 takes {Legacy.NODE} ranks for a node, here are {grid.ranks_per_node}"
    return None


def _against_sms(version: Version, num_sms: int | None) -> str | None:
    if num_sms is None or num_sms % 2 == 0 or version is Elastic:
        return None
    return f"DeepEP ({version.version}) takes SMs in pairs; give num_sms={num_sms + 1}"


def _against_gpu(
    library: Any, capability: tuple[int, int] | None, ranks: int, payload: str
) -> str | None:
    if capability is None:
        return None
    name = torch.cuda.get_device_name()
    if "PCIE" in name and ranks > 2:  # as DeepEP itself looks for them
        return f"{name}: DeepEP takes PCIe cards in pairs only, and here are {ranks} ranks"
    if capability >= Elastic.least_capability:
        return None
    # Without the features of 9.0 (DISABLE_SM90_FEATURES), V1 leaves out FP8 and nodes.
    major, minor = Elastic.least_capability
    if library.Buffer.is_sm90_compiled():
        return f"this DeepEP is compiled for GPUs of compute capability {major}.{minor} or more"
    if ranks > Legacy.NODE or payload == "fp8":
        return (
            f"below compute capability {major}.{minor} DeepEP neither leaves the node nor carries "
            "FP8"
        )
    return None


def filling() -> str | None:
    """What to say where torch fills new memory, which DeepEP does not bear; or None."""
    from torch.utils import deterministic

    fills = bool(deterministic.fill_uninitialized_memory)  # pyright: ignore[reportAttributeAccessIssue]
    if torch.are_deterministic_algorithms_enabled() and fills:
        return (
            "torch fills new memory, which would run beside the communication: set "
            "torch.utils.deterministic.fill_uninitialized_memory = False"
        )
    return None
