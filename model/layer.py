"""A decoder layer as four phases, cut where expert-parallel communication begins and ends.

    phase      method
    attention  attend        norm, attention, residual, norm, routing      compute
    dispatch   dispatch      tokens to their experts                       communication
    mlp        feed_forward  routed and shared experts, or the dense MLP   compute
    combine    combine       back to the tokens, residual                  communication

`forward` runs them in turn. Whoever overlaps two micro-batches calls the phases itself; what one
hands to the next is in plain tuples, so that autograd can be cut there. A dense layer has the same
phases, with nothing to communicate.

Shapes: B sequences of L tokens, T = B * L, D hidden, N rows of this rank's experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from ..comm.dispatch import Dispatched, Dispatcher
from ..parallel.chunk import Chunk
from .attention import Attention
from .build import Build
from .config import ModelConfig
from .experts import MLP
from .linear import RMSNorm
from .moe import MoE
from .rope import Rotation
from .router import Routing


class Attended(NamedTuple):
    """What the attention phase leaves.

    Attributes:
        residual_BLD: the residual stream after attention.
        x_BLD: it, normed: what the feed-forward sees.
        routing: where the tokens go; None in a dense layer.
    """

    residual_BLD: Tensor
    x_BLD: Tensor
    routing: Routing | None


class Computed(NamedTuple):
    """What the mlp phase leaves.

    Attributes:
        rows_ND: of the routed experts, to be combined; None in a dense layer.
        local_BLD: of the dense MLP or the shared experts; None where there are no shared experts.
    """

    rows_ND: Tensor | None
    local_BLD: Tensor | None


class DecoderLayer(nn.Module):
    """One layer, with experts or dense; attribute names are the published weights' names.

    Args:
        config: dimensions.
        index: place in the model, from 0; tells whether the layer has experts.
        dispatcher: see `MoE`.
        build: how layers are made.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        dispatcher: Dispatcher[Any],
        build: Build,
    ) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps, build)
        self.self_attn = Attention(config, build)
        self.post_attention_layernorm = RMSNorm(size, eps, build)
        self.mlp: MLP | MoE
        if config.is_moe(index):
            self.mlp = MoE(config, dispatcher, build)
        else:
            self.mlp = MLP(size, config.intermediate_size, build)

    def forward(self, hidden_BLD: Tensor, rotation: Rotation, chunk: Chunk | None = None) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        attended = self.attend(hidden_BLD, rotation, chunk)
        arrived = self.dispatch(attended)
        computed = self.feed_forward(attended, arrived, chunk)
        return self.combine(attended, arrived, computed)

    def attend(
        self, hidden_BLD: Tensor, rotation: Rotation, chunk: Chunk | None = None
    ) -> Attended:
        """Attention and, in a layer with experts, routing."""
        queue = None if chunk is None else chunk.weight_grads
        attention_BLD = self.self_attn(self.input_layernorm(hidden_BLD), rotation, queue)
        residual_BLD = hidden_BLD + attention_BLD
        x_BLD = self.post_attention_layernorm(residual_BLD)
        routing = self.mlp.route(x_BLD, chunk) if isinstance(self.mlp, MoE) else None
        return Attended(residual_BLD, x_BLD, routing)

    def dispatch(self, attended: Attended) -> Dispatched | None:
        """Tokens to their experts' ranks; a collective. None in a dense layer."""
        if not isinstance(self.mlp, MoE):
            return None
        assert attended.routing is not None
        return self.mlp.dispatch(attended.x_BLD, attended.routing)

    def feed_forward(
        self, attended: Attended, arrived: Dispatched | None, chunk: Chunk | None = None
    ) -> Computed:
        """The experts, routed and shared, or the dense feed-forward."""
        queue = None if chunk is None else chunk.weight_grads
        if not isinstance(self.mlp, MoE):
            return Computed(None, self.mlp(attended.x_BLD, queue))
        assert arrived is not None
        rows_ND = self.mlp.compute_routed(arrived, queue)
        return Computed(rows_ND, self.mlp.compute_shared(attended.x_BLD, queue))

    def combine(self, attended: Attended, arrived: Dispatched | None, computed: Computed) -> Tensor:
        """Rows back to their tokens, a collective, and the residual: [B, L, D]."""
        routed_BLD = None
        if isinstance(self.mlp, MoE):
            assert arrived is not None
            assert computed.rows_ND is not None
            routed_BLD = self.mlp.combine(computed.rows_ND, arrived).view_as(attended.x_BLD)
        return joined(attended.residual_BLD, routed_BLD, computed.local_BLD)


def joined(residual_BLD: Tensor, routed_BLD: Tensor | None, local_BLD: Tensor | None) -> Tensor:
    """A layer's output: what the routed and the local experts (or the dense MLP) add."""
    added = [x for x in (routed_BLD, local_BLD) if x is not None]
    output_BLD = added[0] if len(added) == 1 else added[0] + added[1]
    return residual_BLD + output_BLD
