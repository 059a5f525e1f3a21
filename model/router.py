"""Which experts a token goes to, with what weight, and what keeps the load even.

Routing is arXiv 2412.19437, eq. 12-16 (V3) or 2405.04434, section 2.2 (V2). All of it is computed
in float32 at least.

Shapes: B sequences of L tokens, T = B * L tokens, D hidden, E experts, K experts a token, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..fp8.carried import carried
from ..parallel.chunk import Chunk
from ..parallel.deferred import linear
from .config import ModelConfig
from .linear import at_least_float32


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        experts_TK: [T, K] int64, the best first.
        weights_TK: [T, K], float32 (float64 in a float64 model).
    """

    experts_TK: Tensor
    weights_TK: Tensor


class Router(nn.Module):
    """The gate of one layer.

    Attributes:
        weight: [E, D], the experts' centroids; float32 at least, whatever the model's dtype.
        e_score_correction_bias: [E] buffer, added for selection only; with "noaux_tc" alone.
        load_E: [E] int64, tokens sent to each expert in training forwards since it was last zeroed.
            It counts this rank's tokens over all experts; who updates the bias sums it over the
            data-parallel ranks and the replicas of the stage, and zeroes it. Not saved.
    """

    load_E: Tensor
    e_score_correction_bias: Tensor

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self._config = config
        dtype, experts = at_least_float32(dtype), config.n_routed_experts
        self.weight = nn.Parameter(
            torch.empty(experts, config.hidden_size, dtype=dtype, device=device)
        )
        self.has_bias = config.topk_method == "noaux_tc"
        if self.has_bias:
            bias = torch.zeros(experts, dtype=dtype, device=device)
            self.register_buffer("e_score_correction_bias", bias)
        load = torch.zeros(experts, dtype=torch.int64, device=device)
        self.register_buffer("load_E", load, persistent=False)

    def forward(self, x_BLD: Tensor, chunk: Chunk | None = None) -> Routing:
        """Route the tokens of [B, L, D].

        With a chunk, its balance loss is added; in training the load is counted.
        """
        config = self._config
        queue = None if chunk is None else chunk.weight_grads
        logits_BLE = linear(
            x_BLD.to(self.weight.dtype),
            self.weight,
            None,
            queue,
            remake=_widened(x_BLD, self.weight),
        )
        scores_BLE = (
            logits_BLE.sigmoid() if config.scoring_func == "sigmoid" else logits_BLE.softmax(-1)
        )
        scores_TE = scores_BLE.flatten(0, 1)
        experts_TK = self._select(scores_TE.detach())
        weights_TK = scores_TE.gather(1, experts_TK)
        if config.norm_topk_prob and config.num_experts_per_tok > 1:
            # As published: one expert alone keeps its affinity, or the gate would get no gradient.
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        if chunk is not None:
            self._balance(scores_BLE, experts_TK, chunk)
        return Routing(experts_TK, weights_TK * config.routed_scaling_factor)

    def _select(self, scores_TE: Tensor) -> Tensor:
        """The K best of the M best groups, by scores with the bias added: [T, K]."""
        config = self._config
        choice_TE = scores_TE + self.e_score_correction_bias if self.has_bias else scores_TE
        if config.topk_group < config.n_group:
            choice_TGe = choice_TE.unflatten(1, (config.n_group, -1))
            if self.has_bias:
                # The paper sums the K / M highest, which is 2; the published code says 2, biased.
                group_TG = choice_TGe.topk(2, dim=-1).values.sum(dim=-1)
            else:
                group_TG = choice_TGe.amax(dim=-1)
            kept_TM = group_TG.topk(config.topk_group, dim=-1).indices
            dropped_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter_(1, kept_TM, False)
            choice_TE = choice_TGe.masked_fill(dropped_TG.unsqueeze(-1), -torch.inf).flatten(1)
        return choice_TE.topk(config.num_experts_per_tok, dim=-1).indices

    @torch.no_grad()
    def _count(self, experts_TK: Tensor) -> None:
        chosen = experts_TK.reshape(-1)
        self.load_E.scatter_add_(0, chosen, torch.ones_like(chosen))

    def _balance(self, scores_BLE: Tensor, experts_TK: Tensor, chunk: Chunk) -> None:
        config = self._config
        if chunk.training:
            self._count(experts_TK)
        if config.aux_loss_alpha:
            if self.has_bias:
                # V3's eq. 18 is written on the affinities without bias or groups.
                chosen_BLK = scores_BLE.detach().topk(config.num_experts_per_tok, dim=-1).indices
            else:
                chosen_BLK = experts_TK.view(*scores_BLE.shape[:2], -1)
            chunk.add_loss("balance", config.aux_loss_alpha * balance_loss(scores_BLE, chosen_BLK))

    def extra_repr(self) -> str:
        config = self._config
        return (
            f"{config.n_routed_experts} experts, {config.scoring_func}, top "
            f"{config.num_experts_per_tok} of {config.topk_group}/{config.n_group} groups"
        )


def _widened(x: Tensor, weight: Tensor) -> Callable[[], Tensor] | None:
    """How x in the router's dtype is made again, rather than kept: from x, or as x is made."""
    remake, dtype = carried(x).remake, weight.dtype
    if remake is not None:
        return lambda: remake().to(dtype)
    if x.dtype == dtype:
        return None
    kept = x.detach()
    return lambda: kept.to(dtype)


def balance_loss(scores_BLE: Tensor, chosen_BLK: Tensor) -> Tensor:
    """Sequence-wise balance loss, eq. 17-20 without alpha, averaged over sequences.

    Args:
        scores_BLE: affinities, not negative.
        chosen_BLK: int64, the experts that count as selected; no gradient flows through them.

    Returns:
        0-dim; 1 where load and affinity are even.
    """
    batch, length, num_experts = scores_BLE.shape
    chosen = chosen_BLK.reshape(batch, -1)
    ones = torch.ones_like(chosen, dtype=scores_BLE.dtype)
    count_BE = scores_BLE.new_zeros(batch, num_experts).scatter_add_(1, chosen, ones)
    frequency_BE = count_BE * (num_experts / (chosen_BLK.shape[-1] * length))
    affinity_BE = (scores_BLE / scores_BLE.sum(dim=-1, keepdim=True)).mean(dim=1)
    return (frequency_BE * affinity_BE).sum(dim=-1).mean()


def updated_bias(bias_E: Tensor, load_E: Tensor, speed: float) -> Tensor:
    """Selection biases after a step: up by `speed` where load is under the mean, else down.

    arXiv 2408.15664, algorithm 1; V3 has speed 0.001, and 0 at the end of training.

    Args:
        bias_E: [E] floating.
        load_E: [E] tokens sent to each expert in the step's whole global batch.
        speed: gamma.

    Returns:
        [E], dtype of bias_E; bias_E is left alone.
    """
    load = load_E.to(torch.float64)
    return bias_E + speed * torch.sign(load.mean() - load).to(bias_E.dtype)
