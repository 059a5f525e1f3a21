"""What a token costs in floating-point operations, and what share of a GPU's peak a run reaches.

The recipe is the one behind the figures that DeepSeek published for V3 (arXiv 2505.09343, table 2:
250 GFLOPs a token at 4096 tokens). Counted are the matrix products of the main model, 2 operations
for each weight that a token meets in the forward and twice that in the backward, and in attention
each query with half of the sequence's keys and values, since it is causal. Not counted are the
embedding (a look-up), norms, the routers, multi-token prediction, the optimizer, and what a
backward makes again (model FLOPs, not hardware FLOPs: arXiv 2204.02311, appendix B). No torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .config import ModelConfig

# Dense BF16 peak with float32 sums, TFLOP/s, by the name that the driver gives a GPU; the first
# that fits counts. From NVIDIA's data sheets of each, half of what they state with sparsity.
_PEAKS = (
    (r"\bGB200\b", 2500.0),
    (r"\bB200\b", 2250.0),
    (r"\bH[12]00 NVL\b", 835.5),
    (r"\bH[18]00 PCIe\b", 756.5),
    (r"\b(H100|H800|H200|GH200)\b", 989.0),
    (r"\bH20\b", 148.0),
    (r"\bA[18]00\b", 312.0),
)


@dataclass(frozen=True)
class TokenFlops:
    """Floating-point operations of one token's forward and backward, a mean over its sequence.

    Attributes:
        projections: of attention, from and to the hidden state, through the latents.
        scores: attention's products of queries with keys and of weights with values, half of the
            whole square.
        dense: feed-forward of the layers without experts.
        shared: shared experts.
        routed: a token's routed experts.
        head: logits.
        router: affinities to all experts.
        mtp: everything in multi-token prediction, whose depth k sees all tokens of a sequence but
            the last k.
    """

    projections: float
    scores: float
    dense: float
    shared: float
    routed: float
    head: float
    router: float
    mtp: float

    @property
    def published(self) -> float:
        """What MFU is computed from: everything but `router` and `mtp`; 249.81e9 for V3 at 4096."""
        parts = (self.projections, self.scores, self.dense, self.shared, self.routed, self.head)
        return sum(parts)

    @property
    def not_causal(self) -> float:
        """The same with attention's masked half counted too; 280.51e9 for V3 at 4096."""
        return self.published + self.scores

    @property
    def everything(self) -> float:
        """All matrix products that training makes, attention's masked half left out."""
        return self.published + self.router + self.mtp


def token_flops(config: ModelConfig, length: int) -> TokenFlops:
    """The cost of a token in sequences of `length` tokens."""
    moe = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    layers, hidden = config.num_hidden_layers, config.hidden_size
    projections, head = 6 * _projections(config), 6 * config.vocab_size * hidden
    expert = 6 * 3 * hidden * config.moe_intermediate_size
    shared, routed = expert * config.n_shared_experts, expert * config.num_experts_per_tok
    router = 6 * hidden * config.n_routed_experts
    joining = 6 * 2 * hidden * hidden  # eh_proj
    mtp = 0.0
    for depth in range(1, config.num_nextn_predict_layers + 1):
        seen = length - depth
        of_one = joining + projections + _scores(config, seen) + shared + routed + router + head
        mtp += of_one * seen / length
    return TokenFlops(
        projections=layers * projections,
        scores=layers * _scores(config, length),
        dense=(layers - moe) * 6 * 3 * hidden * config.intermediate_size,
        shared=moe * shared,
        routed=moe * routed,
        head=head,
        router=moe * router,
        mtp=mtp,
    )


def peak_tflops(name: str) -> float | None:
    """Dense BF16 peak of a GPU, TFLOP/s, by its name ("NVIDIA H800"); None where unknown."""
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, name)), None)


def mfu(flops: float, tokens_per_second: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation, 0 to 1; None without a peak.

    Args:
        flops: of a token, `TokenFlops.published`.
        tokens_per_second: of one GPU.
        peak: of one GPU, TFLOP/s.
    """
    return None if peak is None else flops * tokens_per_second / (peak * 1e12)


def _projections(config: ModelConfig) -> int:
    """Weights of one attention's matrices."""
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    query_size = heads * config.qk_head_dim
    query = hidden * query_size if rank is None else rank * (hidden + query_size)
    down = hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
    up = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return query + down + up + heads * config.v_head_dim * hidden


def _scores(config: ModelConfig, length: int) -> float:
    """One layer's attention core: a query meets `length` / 2 keys and values on average."""
    per_pair = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return 6 * per_pair * length / 2
