"""The dimensions of a model, checked. Field names are those of the published config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

SCORING_FUNCS = ("sigmoid", "softmax")
TOPK_METHODS = ("noaux_tc", "group_limited_greedy", "greedy")


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """Context extension by YaRN (arXiv 2309.00071), as `rope_scaling` in config.json has it.

    Attributes:
        factor: s, the ratio of the new context length to the original.
        original_max_position_embeddings: tokens of context before the extension.
        beta_fast, beta_slow: turns over the original context above which a frequency is kept, and
            below which it is divided by `factor`; between them a linear ramp.
        mscale, mscale_all_dim: with m(a) = 0.1 a ln(factor) + 1, the rotated parts are scaled by
            m(mscale) / m(mscale_all_dim) and the softmax by m(mscale_all_dim) squared.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"yarn.factor must be at least 1, got {self.factor}")
        if self.original_max_position_embeddings < 1:
            raise ValueError(
                "yarn.original_max_position_embeddings must be at least 1, got "
                f"{self.original_max_position_embeddings}"
            )
        if not self.beta_fast > self.beta_slow > 0:
            raise ValueError(
                f"yarn: beta_fast > beta_slow > 0 is needed, got {self.beta_fast}, {self.beta_slow}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model's dimensions; an impossible combination raises ValueError.

    The defaults are DeepSeek-V3's (arXiv 2412.19437, section 4.2) at its pre-training context.

    Attributes:
        vocab_size: tokens of the vocabulary.
        hidden_size: d.
        intermediate_size: inner size of the dense feed-forward layers.
        moe_intermediate_size: inner size of one expert.
        num_hidden_layers: decoder layers, multi-token prediction not counted.
        first_k_dense_replace: leading layers with a dense feed-forward instead of experts.
        num_attention_heads: n_h.
        q_lora_rank: d_c', the query compression; None leaves queries uncompressed.
        kv_lora_rank: d_c, the key-value compression.
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim: a head's unrotated, rotated, value sizes.
        n_routed_experts, n_shared_experts, num_experts_per_tok: N_r, N_s, K_r.
        n_group, topk_group: groups of experts, and M, how many of them a token may use.
        scoring_func: affinities by "sigmoid" (V3) or "softmax" (V2).
        topk_method: "noaux_tc" adds the balancing bias for selection and scores a group by the sum
            of its top 2 (V3); "group_limited_greedy" scores it by its highest (V2); "greedy" knows
            no groups (V2-Lite).
        norm_topk_prob: selected affinities are divided by their sum.
        routed_scaling_factor: then multiplied by this.
        rope_theta: base of the rotary frequencies.
        yarn: context extension, or None.
        max_position_embeddings: longest sequence, tokens.
        rms_norm_eps: epsilon of the norms (those of the compressed latents have 1e-6 always).
        initializer_range: standard deviation of every initial weight.
        tie_word_embeddings: the output head is the embedding.
        num_nextn_predict_layers: D, the depth of multi-token prediction; 0 is none.
        aux_loss_alpha: weight of the balance loss (alpha of eq. 17).
        init_seed: initial weights are a function of this and of their names. Not in config.json.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    rope_theta: float = 10000.0
    yarn: Yarn | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 1
    aux_loss_alpha: float = 1e-4
    init_seed: int = 0

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_routing()

    def _check_sizes(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if name == "q_lora_rank" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number from {least} up, got {value!r}")
        if self.init_seed >= 2**31:
            raise ValueError(f"init_seed must be less than 2**31, got {self.init_seed}")
        for name in ("rope_theta", "rms_norm_eps", "routed_scaling_factor", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if self.aux_loss_alpha < 0:
            raise ValueError(f"aux_loss_alpha must not be negative, got {self.aux_loss_alpha!r}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim={self.qk_rope_head_dim} must be even: dimensions rotate in pairs"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace={self.first_k_dense_replace} is more than "
                f"num_hidden_layers={self.num_hidden_layers}; lower it"
            )

    def _check_routing(self) -> None:
        for name, known in (("scoring_func", SCORING_FUNCS), ("topk_method", TOPK_METHODS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        experts, groups, top = self.n_routed_experts, self.n_group, self.num_experts_per_tok
        if self.topk_method == "greedy" and groups != 1:
            raise ValueError(
                f"topk_method='greedy' knows no groups, but n_group={groups}; set n_group and "
                "topk_group to 1 or topk_method to 'group_limited_greedy'"
            )
        if experts % groups:
            raise ValueError(
                f"n_group={groups} does not divide n_routed_experts={experts}; change one of them"
            )
        if self.topk_group > groups:
            raise ValueError(
                f"topk_group={self.topk_group} is more than n_group={groups}; lower it"
            )
        size = experts // groups
        if self.topk_method == "noaux_tc" and groups > 1 and size < 2:
            raise ValueError(
                f"n_group={groups} leaves {size} expert in a group, but a group is scored by its "
                "best 2; lower n_group"
            )
        if top > self.topk_group * size:
            raise ValueError(
                f"num_experts_per_tok={top} cannot be met: topk_group={self.topk_group} groups of "
                f"{size} experts have {self.topk_group * size}; raise topk_group or lower "
                "num_experts_per_tok"
            )

    @property
    def qk_head_dim(self) -> int:
        """d_h + d_h^R, the size of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        """Whether decoder layer `layer` has experts; the layers of multi-token prediction do."""
        return layer >= self.first_k_dense_replace

    @classmethod
    def from_hf(cls, source: str | PathLike[str] | Mapping[str, Any]) -> ModelConfig:
        """The configuration that a published config.json describes.

        Args:
            source: a config.json, a folder with one, or its contents.

        Raises:
            ValueError: not a DeepSeek-V2 or V3 configuration, or one with a setting that this
                architecture does not have (attention biases, another activation).
        """
        from .hf_config import read_config

        return read_config(source)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a config.json that `from_hf` and transformers read."""
        from .hf_config import config_dict

        return config_dict(self)


_LEAST = {
    "vocab_size": 1,
    "hidden_size": 1,
    "intermediate_size": 1,
    "moe_intermediate_size": 1,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "num_attention_heads": 1,
    "q_lora_rank": 1,
    "kv_lora_rank": 1,
    "qk_nope_head_dim": 1,
    "qk_rope_head_dim": 2,
    "v_head_dim": 1,
    "n_routed_experts": 1,
    "n_shared_experts": 0,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 1,
    "num_nextn_predict_layers": 0,
    "init_seed": 0,
}
