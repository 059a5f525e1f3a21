"""Multi-head latent attention (arXiv 2412.19437, eq. 1-11), in its expanded form for training.

Shapes: B sequences, L positions, D hidden, H heads; C and R are the compressed and rotated sizes,
d a head's size in queries and keys, v in values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parallel.chunk import WeightGradQueue
from .build import Build
from .config import ModelConfig
from .kept_attention import Expanded, beside, keeping_less, widened
from .linear import Linear, RMSNorm, remaking, side_by_side
from .rope import Rotation, rotate, softmax_scale

# The published code gives the norms of the latents this epsilon whatever rms_norm_eps is.
_LATENT_EPS = 1e-6


class Latents(NamedTuple):
    """What queries, keys and values are expanded from.

    Attributes:
        query_BLC: compressed queries before their norm; the queries themselves where they are not
            compressed.
        key_value_BLC: compressed keys and values before their norm.
        position_BLR: the part of the key that is rotated, which all heads share.
    """

    query_BLC: Tensor
    key_value_BLC: Tensor
    position_BLR: Tensor


class Attention(nn.Module):
    """Causal latent attention; attribute names are the published weights' names."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        self._heads = heads
        self._query_sizes = [config.qk_nope_head_dim, config.qk_rope_head_dim]
        self._latent_sizes = [rank, config.qk_rope_head_dim]
        self._key_value_sizes = [config.qk_nope_head_dim, config.v_head_dim]
        self._scale = softmax_scale(config)
        self._remade = build.recompute.up_projections
        self._e5m6 = build.recipe is not None and build.recipe.e5m6

        query_size = heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, query_size, build)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, build)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, _LATENT_EPS, build)
            self.q_b_proj = Linear(config.q_lora_rank, query_size, build)
        self._compresses_queries = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = Linear(hidden, sum(self._latent_sizes), build)
        self.kv_a_layernorm = RMSNorm(rank, _LATENT_EPS, build)
        self.kv_b_proj = Linear(rank, heads * sum(self._key_value_sizes), build)
        self.o_proj = Linear(heads * config.v_head_dim, hidden, build)
        self._down_call = build.call()  # of the products with x, side by side

    def forward(
        self, x_BLD: Tensor, rotation: Rotation, queue: WeightGradQueue | None = None
    ) -> Tensor:
        """[B, L, D] -> [B, L, D]; each position sees itself and those before it."""
        latents = self.latents(x_BLD, queue)
        expanded = self.expand(latents, rotation, queue)
        remake = None
        if self._remade:
            given = Latents(*(x.detach() for x in latents))
            sources = [*given, *rotation, *self._up_weights()]
            remake = remaking(lambda: _of_one_size(self.expand(given, rotation)), sources)
        out_BLW = self._attend(_of_one_size(expanded), remake)
        return self.o_proj(out_BLW, queue)

    def _attend(self, expanded: Expanded, remake: Callable[[], Expanded] | None) -> Tensor:
        """Causal softmax attention of heads of one size: [B, L, H * v]."""

        def operator(given: Expanded) -> Tensor:
            return F.scaled_dot_product_attention(*given, is_causal=True, scale=self._scale)

        size = self._key_value_sizes[1]
        if torch.is_grad_enabled() and (remake is not None or self._e5m6):
            return keeping_less(operator, expanded, size, remake=remake, e5m6=self._e5m6)
        return beside(operator(expanded), size)

    def _up_weights(self) -> Iterator[Tensor]:
        """What `expand` multiplies with."""
        yield self.kv_a_layernorm.weight
        yield self.kv_b_proj.weight
        if self._compresses_queries:
            yield self.q_a_layernorm.weight
            yield self.q_b_proj.weight

    def set_name(self, name: str) -> None:
        """What errors call the product of the layers that take x."""
        if self._down_call is not None:
            first = "q_a_proj" if self._compresses_queries else "q_proj"
            both = f"{name}.{first} and kv_a_proj_with_mqa"
            self._down_call = replace(self._down_call, name=both)

    def latents(self, x_BLD: Tensor, queue: WeightGradQueue | None = None) -> Latents:
        """The products with x (eq. 1, 3, 6)."""
        first = self.q_a_proj if self._compresses_queries else self.q_proj
        layers = [first, self.kv_a_proj_with_mqa]
        query, latent = side_by_side(x_BLD, layers, self._down_call, queue)
        if self._down_call is not None and not (self._compresses_queries or self._remade):
            # The norm keeps this, which as a part of one product would keep the queries as well.
            latent = latent.clone()
        return Latents(query, *latent.split(self._latent_sizes, dim=-1))

    def expand(
        self, latents: Latents, rotation: Rotation, queue: WeightGradQueue | None = None
    ) -> Expanded:
        """Queries, keys and values of all heads from the latents (eq. 1-9)."""
        query = latents.query_BLC
        if self._compresses_queries:
            query = self.q_b_proj(self.q_a_layernorm(query), queue)
        content, position = query.unflatten(-1, (self._heads, -1)).split(self._query_sizes, dim=-1)
        query_BLHd = torch.cat((content, rotate(position, rotation)), dim=-1)

        key_value = self.kv_b_proj(self.kv_a_layernorm(latents.key_value_BLC), queue)
        content, value_BLHv = key_value.unflatten(-1, (self._heads, -1)).split(
            self._key_value_sizes, dim=-1
        )
        if not self._remade:
            # The core keeps this, which as a part of one product would keep the keys' part as well.
            value_BLHv = value_BLHv.contiguous()
        position = rotate(latents.position_BLR.unsqueeze(2), rotation)
        key_BLHd = torch.cat((content, position.expand(-1, -1, self._heads, -1)), dim=-1)
        return Expanded(*(x.transpose(1, 2) for x in (query_BLHd, key_BLHd, value_BLHv)))


def _of_one_size(expanded: Expanded) -> Expanded:
    """On CPUs, heads filled up with zeros to the largest size of the three.

    torch's fused attention for CPUs wants that; the other one keeps all scores. The scale is given
    to either, and zeros change no product.
    """
    if not expanded.query.is_cpu:
        return expanded
    size = max(x.shape[-1] for x in expanded)
    # With heads beside each other in memory, as before, so that the output's are too.
    return Expanded(*(widened(x.transpose(1, 2), size).transpose(1, 2) for x in expanded))
