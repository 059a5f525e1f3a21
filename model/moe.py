"""A mixture-of-experts layer, cut where communication begins and ends.

    route -> dispatch (communication) -> compute -> combine (communication)

No token is dropped. Shapes: B sequences of L tokens, T = B * L, D hidden, N rows of this rank's
experts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..comm.dispatch import Dispatched, Dispatcher
from ..parallel.chunk import Chunk, WeightGradQueue
from .build import Build
from .config import ModelConfig
from .experts import MLP, Experts
from .router import Router, Routing


class MoE(nn.Module):
    """Shared experts, which see every token, and routed ones (arXiv 2412.19437, eq. 12).

    Args:
        config: dimensions.
        dispatcher: moves rows to their experts; says which experts are this rank's.
        build: how layers are made.
    """

    def __init__(
        self,
        config: ModelConfig,
        dispatcher: Dispatcher[Any],
        build: Build,
    ) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.moe_intermediate_size
        self.dispatcher = dispatcher
        self.gate = Router(config, dtype=build.dtype, device=build.device)
        self.experts = Experts(dispatcher.local_experts, size, inner, build)
        self.shared_experts = None
        if config.n_shared_experts:
            inner *= config.n_shared_experts
            self.shared_experts = MLP(size, inner, build)

    def route(self, x_BLD: Tensor, chunk: Chunk | None = None) -> Routing:
        """Choose each token's experts."""
        return self.gate(x_BLD, chunk)

    def dispatch(self, x_BLD: Tensor, routing: Routing) -> Dispatched:
        """Send each token to its experts' ranks. A collective of the expert-parallel group."""
        return self.dispatcher.dispatch(x_BLD.flatten(0, 1), routing.experts_TK, routing.weights_TK)

    def compute_routed(self, arrived: Dispatched, queue: WeightGradQueue | None = None) -> Tensor:
        """This rank's experts on what arrived, times the router's weights: [N, D]."""
        return self.experts(arrived.rows_ND, arrived.weights_N, arrived.counts, queue)

    def compute_shared(self, x_BLD: Tensor, queue: WeightGradQueue | None = None) -> Tensor | None:
        """The shared experts, which need no communication: [B, L, D], or None without them."""
        return None if self.shared_experts is None else self.shared_experts(x_BLD, queue)

    def combine(self, rows_ND: Tensor, arrived: Dispatched) -> Tensor:
        """Send rows back and sum each token's: [T, D]. A collective, as `dispatch` is."""
        return self.dispatcher.combine(rows_ND, arrived.handle)
