"""How many parameters a configuration has, and bytes of cache for each token. No torch needed."""

from __future__ import annotations

from .config import ModelConfig


def num_parameters(config: ModelConfig, *, mtp: bool = False) -> int:
    """Every weight of the model, the balancing biases (not trained by gradients) left out.

    Args:
        config: the model.
        mtp: add what multi-token prediction has of its own; its embedding and head are the model's.

    Returns:
        The number; 671.03e9 for DeepSeek-V3, 235.74e9 for V2.
    """
    moe = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    total = (
        (config.num_hidden_layers - moe) * layer_parameters(config, moe=False)
        + moe * layer_parameters(config, moe=True)
        + config.hidden_size
        + (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    )
    return total + (config.num_nextn_predict_layers * mtp_parameters(config) if mtp else 0)


def num_active_parameters(config: ModelConfig, *, embedding: bool = False) -> int:
    """The weights that one token's forward uses: of the routed experts only its own.

    Args:
        config: the model.
        embedding: count the input embedding too, of which a token reads one row.

    Returns:
        The number; 36.63e9 for DeepSeek-V3, 37.55e9 with the embedding.
    """
    moe = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    vocabulary = config.vocab_size * config.hidden_size
    return (
        (config.num_hidden_layers - moe) * layer_parameters(config, moe=False)
        + moe * layer_parameters(config, moe=True, experts=config.num_experts_per_tok)
        + config.hidden_size
        + vocabulary
        + (vocabulary if embedding and not config.tie_word_embeddings else 0)
    )


def layer_parameters(config: ModelConfig, *, moe: bool, experts: int | None = None) -> int:
    """Weights of one decoder layer with `experts` routed experts (None: all of them)."""
    hidden = config.hidden_size
    norms = 2 * hidden
    if not moe:
        return attention_parameters(config) + norms + 3 * hidden * config.intermediate_size
    experts = config.n_routed_experts if experts is None else experts
    feed_forward = 3 * hidden * config.moe_intermediate_size * (experts + config.n_shared_experts)
    router = config.n_routed_experts * hidden
    return attention_parameters(config) + norms + feed_forward + router


def attention_parameters(config: ModelConfig) -> int:
    """Weights of one attention, the norms of its latents included."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    query_size = heads * config.qk_head_dim
    rank = config.q_lora_rank
    query = hidden * query_size if rank is None else rank * (hidden + 1 + query_size)
    down = hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
    up = config.kv_lora_rank * (1 + heads * (config.qk_nope_head_dim + config.v_head_dim))
    return query + down + up + heads * config.v_head_dim * hidden


def mtp_parameters(config: ModelConfig) -> int:
    """Weights of one depth of multi-token prediction: projection, layer and three norms."""
    hidden = config.hidden_size
    return layer_parameters(config, moe=True) + 2 * hidden * hidden + 3 * hidden


def kv_cache_bytes(config: ModelConfig, bytes_per_element: int = 2) -> int:
    """What inference keeps of one token: each layer's latent and the one rotated key of all heads.

    Args:
        config: the model; multi-token prediction is not counted.
        bytes_per_element: of the cache's numbers, 2 for BF16.

    Returns:
        70,272 for DeepSeek-V3 in BF16 (arXiv 2505.09343, table 1).
    """
    per_layer = config.kv_lora_rank + config.qk_rope_head_dim
    return config.num_hidden_layers * per_layer * bytes_per_element


def grouped_kv_cache_bytes(
    *, layers: int, kv_heads: int, head_dim: int, bytes_per_element: int = 2
) -> int:
    """The same of a model whose query heads share keys and values in groups, for comparison.

    Args:
        layers: of the model.
        kv_heads: heads of keys and of values in a layer.
        head_dim: of each of them.
        bytes_per_element: of the cache's numbers, 2 for BF16.
    """
    return layers * 2 * kv_heads * head_dim * bytes_per_element
