"""Multi-token prediction: each depth predicts one token further (arXiv 2412.19437, eq. 21-25).

Shapes: B sequences, L positions, D hidden, V vocabulary. Position i of `targets_BL` is the token
after position i of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..comm.dispatch import Dispatcher
from ..parallel.chunk import Chunk
from .build import Build
from .config import ModelConfig
from .layer import DecoderLayer
from .linear import Linear, RMSNorm, at_least_float32
from .rope import Rotation


class SharedHead(nn.Module):
    """What a depth has of the output head: its own norm. The matrix is the main model's."""

    def __init__(self, size: int, eps: float, build: Build) -> None:
        super().__init__()
        self.norm = RMSNorm(size, eps, build)


class PredictionLayer(DecoderLayer):
    """One depth: a projection of the hidden state and the next token's embedding, and a layer.

    Published weights have it as layer `num_hidden_layers + depth`. `eh_proj` takes the embedding
    first, as they do; the paper writes the hidden state first.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        dispatcher: Dispatcher[Any],
        build: Build,
    ) -> None:
        super().__init__(config, index, dispatcher, build)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(size, eps, build)
        self.hnorm = RMSNorm(size, eps, build)
        self.eh_proj = Linear(2 * size, size, build)
        self.shared_head = SharedHead(size, eps, build)

    def predict(
        self,
        hidden_BLD: Tensor,
        embedded_BLD: Tensor,
        rotation: Rotation,
        chunk: Chunk | None = None,
    ) -> Tensor:
        """h^k from h^(k-1) and the embedding of the token k ahead (eq. 21, 22): [B, L, D]."""
        both = torch.cat((self.enorm(embedded_BLD), self.hnorm(hidden_BLD)), dim=-1)
        joined_BLD = self.eh_proj(both, None if chunk is None else chunk.weight_grads)
        return self(joined_BLD, rotation, chunk)


def prediction_loss(
    layers: Sequence[PredictionLayer],
    hidden_BLD: Tensor,
    targets_BL: Tensor,
    *,
    embed: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    rotation: Rotation,
    chunk: Chunk | None = None,
) -> Tensor:
    """The mean over depths of eq. 24 (L_MTP of eq. 25 without lambda), in nats.

    h^0 is the main model's output after its final norm: so the engines that run the published
    weights feed it. Depth k sees positions 0..L-k-1, whose token k ahead and label lie within the
    sequence; eq. 24 divides their sum by L all the same.

    Args:
        layers: one for each depth, the first first.
        hidden_BLD: h^0.
        targets_BL: int64.
        embed: tokens to [..., D]; shared with the main model.
        head: [..., D] to logits; shared with the main model.
        rotation: of at least L - 1 positions.
        chunk: of this micro-batch.

    Raises:
        ValueError: the sequence is too short for the depth.
    """
    length = targets_BL.shape[1]
    if length <= len(layers):
        raise ValueError(
            f"sequences of {length} tokens are too short for multi-token prediction of depth "
            f"{len(layers)}; use longer ones or lower num_nextn_predict_layers"
        )
    total = hidden_BLD.new_zeros((), dtype=at_least_float32(hidden_BLD.dtype))
    for depth, layer in enumerate(layers, start=1):
        seen = length - depth
        embedded = embed(targets_BL[:, depth - 1 : length - 1])
        hidden_BLD = layer.predict(hidden_BLD[:, :seen], embedded, rotation.first(seen), chunk)
        logits = head(layer.shared_head.norm(hidden_BLD))
        loss = cross_entropy(logits, targets_BL[:, depth:])
        total = total + loss * (seen / length)
    return total / len(layers)


def cross_entropy(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """Mean cross-entropy over all positions, nats, in float32 at least: 0-dim."""
    logits = logits_BLV.flatten(0, 1)
    return F.cross_entropy(logits.to(at_least_float32(logits.dtype)), targets_BL.reshape(-1))
