"""Multi-head latent attention (arXiv 2412.19437, eq. 1-11), in its expanded form for training.

Shapes: B sequences, L positions, D hidden, H heads; C and R are the compressed and rotated sizes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parallel.chunk import WeightGradQueue
from .config import ModelConfig
from .linear import Linear, RMSNorm
from .rope import Rotation, rotate, softmax_scale

# The published code gives the norms of the latents this epsilon whatever rms_norm_eps is.
_LATENT_EPS = 1e-6


class Attention(nn.Module):
    """Causal latent attention; attribute names are the published weights' names."""

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        super().__init__()
        hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        self._heads = heads
        self._query_sizes = [config.qk_nope_head_dim, config.qk_rope_head_dim]
        self._latent_sizes = [rank, config.qk_rope_head_dim]
        self._key_value_sizes = [config.qk_nope_head_dim, config.v_head_dim]
        self._scale = softmax_scale(config)

        def linear(size_in: int, size_out: int) -> Linear:
            return Linear(size_in, size_out, dtype=dtype, device=device)

        def norm(size: int) -> RMSNorm:
            return RMSNorm(size, _LATENT_EPS, dtype=dtype, device=device)

        query_size = heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = linear(hidden, query_size)
        else:
            self.q_a_proj = linear(hidden, config.q_lora_rank)
            self.q_a_layernorm = norm(config.q_lora_rank)
            self.q_b_proj = linear(config.q_lora_rank, query_size)
        self._compresses_queries = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = linear(hidden, sum(self._latent_sizes))
        self.kv_a_layernorm = norm(rank)
        self.kv_b_proj = linear(rank, heads * sum(self._key_value_sizes))
        self.o_proj = linear(heads * config.v_head_dim, hidden)

    def forward(
        self, x_BLD: Tensor, rotation: Rotation, queue: WeightGradQueue | None = None
    ) -> Tensor:
        """[B, L, D] -> [B, L, D]; each position sees itself and those before it."""
        query_BHLd = self._queries(x_BLD, rotation, queue)
        key_BHLd, value_BHLv = self._keys_values(x_BLD, rotation, queue)
        out_BHLv = F.scaled_dot_product_attention(
            query_BHLd, key_BHLd, value_BHLv, is_causal=True, scale=self._scale
        )
        return self.o_proj(out_BHLv.transpose(1, 2).flatten(2), queue)

    def _queries(self, x_BLD: Tensor, rotation: Rotation, queue: WeightGradQueue | None) -> Tensor:
        """Eq. 6-9: [B, H, L, nope + rope]."""
        if self._compresses_queries:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BLD, queue)), queue)
        else:
            q = self.q_proj(x_BLD, queue)
        content, position = q.unflatten(-1, (self._heads, -1)).split(self._query_sizes, dim=-1)
        return torch.cat((content, rotate(position, rotation)), dim=-1).transpose(1, 2)

    def _keys_values(
        self, x_BLD: Tensor, rotation: Rotation, queue: WeightGradQueue | None
    ) -> tuple[Tensor, Tensor]:
        """Eq. 1-5: keys [B, H, L, nope + rope], whose rotated part all heads share, and values."""
        latent_BLC, position_BLR = self.kv_a_proj_with_mqa(x_BLD, queue).split(
            self._latent_sizes, dim=-1
        )
        key_value = self.kv_b_proj(self.kv_a_layernorm(latent_BLC), queue)
        content, value = key_value.unflatten(-1, (self._heads, -1)).split(
            self._key_value_sizes, dim=-1
        )
        position = rotate(position_BLR.unsqueeze(2), rotation).expand(-1, -1, self._heads, -1)
        key = torch.cat((content, position), dim=-1)
        return key.transpose(1, 2), value.transpose(1, 2)
