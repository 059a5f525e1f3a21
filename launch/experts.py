"""The dispatcher that a configuration asks for."""

from __future__ import annotations

from typing import Any

from ..comm.dispatch import Dispatcher, ExpertLayout, dispatcher
from ..comm.topology import require_node_limit
from ..parallel.mesh import Mesh
from .config import Config
from .settings import ConfigError


def make_experts(config: Config, mesh: Mesh) -> Dispatcher[Any]:
    """The dispatcher of this run. A collective of the world.

    Raises:
        ConfigError: the router's groups straddle nodes, or the dispatcher cannot be had here.
    """
    wanted, num_experts = config.dispatch, config.model.n_routed_experts
    try:
        return dispatcher(
            wanted.backend,
            mesh,
            num_experts=num_experts,
            payload=config.payload,
            node_limit=_node_limit(config, mesh),
            chunks=wanted.chunks,
            hidden=config.model.hidden_size,
            top_k=config.model.num_experts_per_tok,
            timeout_s=config.run.timeout_s,
            num_sms=wanted.num_sms,
        )
    except ValueError as error:
        raise ConfigError(f"dispatch.backend={wanted.backend}: {error}") from None


def _node_limit(config: Config, mesh: Mesh) -> int | None:
    """The most nodes that a token may reach, or None for any number."""
    model, shape = config.model, config.mesh
    given = config.dispatch.node_limit
    if given is not None:
        return given or None
    if model.topk_group >= model.n_group:
        return None
    layout = ExpertLayout.contiguous(model.n_routed_experts, shape.ep)
    for ranks in sorted({shape.ep_peers(rank) for rank in range(shape.world_size)}):
        nodes = [mesh.nodes[rank] for rank in ranks]
        try:
            require_node_limit(layout, nodes, num_groups=model.n_group, limit=model.topk_group)
        except ValueError as error:
            raise ConfigError(
                f"model.n_group={model.n_group}: {error}; or give dispatch.node_limit = 0 to do "
                "without the limit"
            ) from None
    return model.topk_group
