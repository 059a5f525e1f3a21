"""Every parameter of a part of a model, by name and shape, before there is any. No torch needed.

The names and their order are those of `DeepSeekV3.named_parameters`, the shapes those of all
experts. A test holds this against the model itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from .config import ModelConfig
from .stages import EMBEDDING, Part, needs_embedding
from .storage import Storage


class Parameter(NamedTuple):
    """One parameter of the whole model.

    Attributes:
        name: as in checkpoints.
        shape: of all experts together.
        routed: whether it holds routed experts, which are divided over expert-parallel ranks.
        product: of a product that is computed in FP8 where the model is.
        wide: float32 at least, whatever the model's dtype.
    """

    name: str
    shape: tuple[int, ...]
    routed: bool = False
    product: bool = False
    wide: bool = False

    @property
    def numel(self) -> int:
        """Its numbers."""
        return math.prod(self.shape)

    @property
    def matrices(self) -> int:
        """In it: as many as experts, where it holds experts."""
        return math.prod(self.shape[:-2])

    def itemsize(self, storage: Storage) -> int:
        """Bytes of one of its numbers."""
        masters = self.product and storage.fp8
        return storage.wide if self.wide or masters else storage.itemsize


@lru_cache(maxsize=1024)
def inventory(config: ModelConfig, part: Part) -> tuple[Parameter, ...]:
    """The parameters of a part, in the order of `named_parameters`.

    Raises:
        ValueError: not a part of such a model.
    """
    part.check(config)
    return tuple(_parameters(config, part))


def _parameters(config: ModelConfig, part: Part) -> Iterator[Parameter]:
    hidden = config.hidden_size
    if part.embed or (part.head and needs_embedding(config)):
        yield Parameter(EMBEDDING, (config.vocab_size, hidden))
    for layer in part.layers:
        yield from _layer(config, f"model.layers.{layer}", moe=config.is_moe(layer))
    if not part.head:
        return
    for depth in range(config.num_nextn_predict_layers):
        index = config.num_hidden_layers + depth
        prefix = f"model.layers.{index}"
        yield from _layer(config, prefix, moe=config.is_moe(index))
        for norm in ("enorm", "hnorm"):
            yield _norm(f"{prefix}.{norm}", hidden)
        yield _linear(f"{prefix}.eh_proj", 2 * hidden, hidden)
        yield _norm(f"{prefix}.shared_head.norm", hidden)
    yield _norm("model.norm", hidden)
    if not config.tie_word_embeddings:
        yield Parameter("lm_head.weight", (config.vocab_size, hidden))


def _layer(config: ModelConfig, prefix: str, *, moe: bool) -> Iterator[Parameter]:
    hidden = config.hidden_size
    yield _norm(f"{prefix}.input_layernorm", hidden)
    yield from _attention(config, f"{prefix}.self_attn")
    yield _norm(f"{prefix}.post_attention_layernorm", hidden)
    if moe:
        yield from _experts(config, f"{prefix}.mlp")
    else:
        yield from _feed_forward(f"{prefix}.mlp", hidden, config.intermediate_size)


def _attention(config: ModelConfig, prefix: str) -> Iterator[Parameter]:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    query = heads * config.qk_head_dim
    if rank is None:
        yield _linear(f"{prefix}.q_proj", hidden, query)
    else:
        yield _linear(f"{prefix}.q_a_proj", hidden, rank)
        yield _norm(f"{prefix}.q_a_layernorm", rank)
        yield _linear(f"{prefix}.q_b_proj", rank, query)
    latent = config.kv_lora_rank
    yield _linear(f"{prefix}.kv_a_proj_with_mqa", hidden, latent + config.qk_rope_head_dim)
    yield _norm(f"{prefix}.kv_a_layernorm", latent)
    up = heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield _linear(f"{prefix}.kv_b_proj", latent, up)
    yield _linear(f"{prefix}.o_proj", heads * config.v_head_dim, hidden)


def _experts(config: ModelConfig, prefix: str) -> Iterator[Parameter]:
    hidden, inner, count = (
        config.hidden_size,
        config.moe_intermediate_size,
        config.n_routed_experts,
    )
    yield Parameter(f"{prefix}.gate.weight", (count, hidden), wide=True)
    for name, shape in (
        ("gate_up_proj", (count, 2 * inner, hidden)),
        ("down_proj", (count, hidden, inner)),
    ):
        yield Parameter(f"{prefix}.experts.{name}", shape, routed=True, product=True)
    if config.n_shared_experts:
        inner *= config.n_shared_experts
        yield from _feed_forward(f"{prefix}.shared_experts", hidden, inner)


def _feed_forward(prefix: str, hidden: int, inner: int) -> Iterator[Parameter]:
    yield _linear(f"{prefix}.gate_proj", hidden, inner)
    yield _linear(f"{prefix}.up_proj", hidden, inner)
    yield _linear(f"{prefix}.down_proj", inner, hidden)


def _linear(name: str, columns: int, rows: int) -> Parameter:
    return Parameter(f"{name}.weight", (rows, columns), product=True)


def _norm(name: str, size: int) -> Parameter:
    return Parameter(f"{name}.weight", (size,))
