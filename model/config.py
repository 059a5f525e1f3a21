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
        factor: the new context length over the original (s).
        original_max_position_embeddings: length of the context before the extension, tokens.
        beta_fast: turns in the original context from which on a frequency is kept; down to
            beta_slow there is a linear ramp.
        beta_slow: turns in the original context below which a frequency is divided by factor.
        mscale: with m(a) = 0.1 a ln(factor) + 1, rotated parts are scaled by m(mscale) /
            m(mscale_all_dim).
        mscale_all_dim: the softmax is scaled by m(mscale_all_dim) squared; 0 for not at all.
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
        vocab_size: number of token ids, rows of the embedding and of the output head.
        hidden_size: channels of a token between layers (d).
        intermediate_size: channels inside the feed-forward of a dense layer.
        moe_intermediate_size: channels inside the feed-forward of one expert.
        num_hidden_layers: number of decoder layers, those of multi-token prediction not counted.
        first_k_dense_replace: number of leading layers with a dense feed-forward and no experts.
        num_attention_heads: number of attention heads of a layer (n_h).
        q_lora_rank: channels that queries are compressed to (d_c'); none leaves them uncompressed.
        kv_lora_rank: channels that keys and values are compressed to (d_c), as they are cached.
        qk_nope_head_dim: channels of a query or key head without rotary position (d_h).
        qk_rope_head_dim: channels of a query or key head with rotary position (d_h^R), even.
        v_head_dim: channels of a value head.
        n_routed_experts: number of routed experts of a layer (N_r).
        n_shared_experts: number of experts of a layer that every token uses (N_s).
        num_experts_per_tok: number of routed experts that a token uses (K_r).
        n_group: number of groups that a layer's routed experts are divided into.
        topk_group: number of groups that a token's experts may come from (M), n_group for any.
        scoring_func: how a token's affinity to an expert is computed, "sigmoid" (V3) or "softmax"
            (V2).
        topk_method: how experts are selected: "noaux_tc" adds the balancing bias and scores a group
            by the sum of its top 2 (V3); "group_limited_greedy" scores it by its highest (V2);
            "greedy" knows no groups (V2-Lite).
        norm_topk_prob: whether the affinities of a token's experts are divided by their sum.
        routed_scaling_factor: factor of these affinities after that, without unit.
        rope_theta: base of the rotary frequencies, without unit.
        yarn: extension of the context beyond that of rope_theta, or none.
        max_position_embeddings: length of the longest sequence, tokens.
        rms_norm_eps: what the norms add to the mean square (those of the compressed queries, keys
            and values add 1e-6 always).
        initializer_range: standard deviation of every initial weight.
        tie_word_embeddings: whether the output head has the embedding's weights.
        num_nextn_predict_layers: number of further tokens that are predicted at each position, a
            layer each (D); 0 for none.
        aux_loss_alpha: weight of the sequence-wise balance loss (alpha of eq. 17); 0 for none.
        init_seed: seed of the initial weights, with their names. Not in config.json.
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
