"""Routing: limits, weights, bias, loads, the balance loss and the bias update."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from counterflow.model import ModelConfig, updated_bias
from counterflow.model.router import Router, Routing, balance_loss
from counterflow.parallel.chunk import Chunk
from tests.cases_model import SMALL, V2


def router(config: ModelConfig, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Router:
    made = Router(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.weight.copy_(torch.randn(made.weight.shape, generator=generator) * 0.3)
    return made


def hidden(config: ModelConfig, *, seed: int = 0, length: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, length, config.hidden_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def slow_route(gate: Router, config: ModelConfig, x: Tensor) -> tuple[list[set[int]], Tensor]:
    """Selected experts of each token and the gate matrix [T, E], one token and expert at a time."""
    logits = (x.flatten(0, 1) @ gate.weight.T).tolist()
    size = config.n_routed_experts // config.n_group
    selected: list[set[int]] = []
    gates = torch.zeros(len(logits), config.n_routed_experts, dtype=torch.float64)
    for token, row in enumerate(logits):
        if config.scoring_func == "sigmoid":
            scores = [1 / (1 + math.exp(-v)) for v in row]
        else:
            total = sum(math.exp(v) for v in row)
            scores = [math.exp(v) / total for v in row]
        bias = gate.e_score_correction_bias.tolist() if gate.has_bias else [0.0] * len(row)
        choice = [s + b for s, b in zip(scores, bias, strict=True)]
        groups = [sorted(choice[g * size : (g + 1) * size]) for g in range(config.n_group)]
        best_of = 2 if gate.has_bias else 1
        value = [sum(group[-best_of:]) for group in groups]
        kept = sorted(range(config.n_group), key=lambda g: -value[g])[: config.topk_group]
        allowed = [e for e in range(len(row)) if e // size in kept]
        chosen = sorted(allowed, key=lambda e: -choice[e])[: config.num_experts_per_tok]
        norm = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
        for e in chosen:
            gates[token, e] = scores[e] / norm * config.routed_scaling_factor
        selected.append(set(chosen))
    return selected, gates


def gate_matrix(routing: Routing, num_experts: int) -> Tensor:
    gates = torch.zeros(len(routing.experts_TK), num_experts, dtype=routing.weights_TK.dtype)
    return gates.scatter(1, routing.experts_TK, routing.weights_TK.detach())


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, n_group=8, topk_group=3, norm_topk_prob=False),
        replace(SMALL, n_group=1, topk_group=1),
        V2,
        replace(V2, topk_method="greedy", n_group=1, topk_group=1),
    ],
    ids=["v3", "v3 not normalised", "v3 one group", "v2", "v2-lite"],
)
def test_routing_is_that_of_a_loop_over_tokens(config: ModelConfig) -> None:
    gate, x = router(config), hidden(config)
    if gate.has_bias:
        gate.e_score_correction_bias.copy_(torch.linspace(-0.4, 0.4, config.n_routed_experts))
    routing = gate(x)
    selected, gates = slow_route(gate, config, x)
    assert [set(row) for row in routing.experts_TK.tolist()] == selected
    torch.testing.assert_close(gate_matrix(routing, config.n_routed_experts), gates)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.sampled_from([2, 4, 8]),
    kept=st.integers(1, 4),
    top=st.integers(1, 4),
    seed=st.integers(0, 1000),
    bias=st.floats(0, 3),
)
def test_a_token_uses_few_groups_and_its_gates_sum_to_the_scale(
    groups: int, kept: int, top: int, seed: int, bias: float
) -> None:
    kept = min(kept, groups)
    top = min(top, kept * 16 // groups)
    config = replace(SMALL, n_group=groups, topk_group=kept, num_experts_per_tok=top)
    gate = router(config, seed=seed)
    gate.e_score_correction_bias.normal_(0, bias, generator=torch.Generator().manual_seed(seed))
    routing = gate(hidden(config, seed=seed))
    for row in routing.experts_TK.tolist():
        assert len(set(row)) == top
        assert len({expert * groups // 16 for expert in row}) <= kept
    if top > 1:
        sums = routing.weights_TK.sum(dim=1)
        torch.testing.assert_close(sums, torch.full_like(sums, config.routed_scaling_factor))


def test_bias_selects_and_does_not_weigh() -> None:
    config = replace(SMALL, n_group=1, topk_group=1, norm_topk_prob=False)
    gate, x = router(config), hidden(config)
    before = gate(x)
    gate.e_score_correction_bias[5] = 10.0
    after = gate(x)
    assert (before.experts_TK == 5).any(dim=1).float().mean() < 0.9
    assert (after.experts_TK == 5).any(dim=1).all()
    scores = (x.flatten(0, 1) @ gate.weight.T).sigmoid() * config.routed_scaling_factor
    torch.testing.assert_close(after.weights_TK, scores.gather(1, after.experts_TK))


def test_one_expert_alone_keeps_its_affinity() -> None:
    config = replace(SMALL, num_experts_per_tok=1, routed_scaling_factor=1.0)
    gate = router(config)
    routing = gate(hidden(config))
    assert (routing.weights_TK < 1).all()
    (grad,) = torch.autograd.grad(routing.weights_TK.sum(), gate.weight)
    assert grad.abs().sum() > 0


def test_load_is_counted_in_training_only() -> None:
    gate, x = router(SMALL), hidden(SMALL)
    gate(x)
    gate(x, Chunk(training=False))
    assert gate.load_E.sum() == 0
    routing = gate(x, Chunk())
    gate(x, Chunk())
    expected = torch.bincount(routing.experts_TK.flatten(), minlength=SMALL.n_routed_experts)
    assert torch.equal(gate.load_E, 2 * expected)
    assert "load_E" not in gate.state_dict()


@pytest.mark.parametrize("config", [SMALL, V2], ids=["v3", "v2"])
def test_balance_loss_is_that_of_a_loop(config: ModelConfig) -> None:
    gate, x = router(config), hidden(config, length=7)
    chunk = Chunk()
    if gate.has_bias:
        gate.e_score_correction_bias.normal_(0, 1, generator=torch.Generator().manual_seed(4))
    routing = gate(x, chunk)
    experts, top, length = config.n_routed_experts, config.num_experts_per_tok, x.shape[1]
    logits = x @ gate.weight.T
    scores = logits.sigmoid() if gate.has_bias else logits.softmax(-1)
    total = 0.0
    for sequence in range(len(x)):
        for e in range(experts):
            hits, share = 0, 0.0
            for t in range(length):
                s = scores[sequence, t].tolist()
                if gate.has_bias:  # eq. 18: among all affinities, without bias and groups
                    chosen = sorted(range(experts), key=lambda i: -s[i])[:top]
                else:
                    chosen = routing.experts_TK[sequence * length + t].tolist()
                hits += e in chosen
                share += s[e] / sum(s)
            total += experts / (top * length) * hits * share / length
    ((name, loss),) = chunk.losses
    assert name == "balance"
    assert loss.item() == pytest.approx(config.aux_loss_alpha * total / len(x), rel=1e-12)


def test_even_load_and_affinity_have_a_balance_loss_of_one() -> None:
    scores = torch.full((3, 8, 4), 0.7)
    chosen = (torch.arange(8).unsqueeze(1) + torch.arange(2)).remainder(4).expand(3, 8, 2)
    assert float(balance_loss(scores, chosen)) == pytest.approx(1.0)


def test_without_alpha_there_is_no_balance_loss() -> None:
    config = replace(SMALL, aux_loss_alpha=0.0)
    chunk = Chunk()
    router(config)(hidden(config), chunk)
    assert chunk.losses == []


def test_bias_follows_the_sign_of_the_missing_load() -> None:
    bias = torch.tensor([0.5, 0.0, -0.5, 0.0])
    load = torch.tensor([10, 2, 8, 4])  # mean 6
    updated = updated_bias(bias, load, 0.25)
    assert updated.tolist() == [0.25, 0.25, -0.75, 0.25]
    assert updated.dtype == bias.dtype
    assert bias.tolist() == [0.5, 0.0, -0.5, 0.0]
    assert updated_bias(bias, torch.full((4,), 7), 0.25).tolist() == bias.tolist()


def test_bias_updates_even_a_skewed_load_out() -> None:
    config = replace(SMALL, n_group=1, topk_group=1)
    gate = router(config)
    x = hidden(config, length=100) + 1.0  # a common direction makes some experts favourites
    violations: list[float] = []
    for _ in range(60):
        gate.load_E.zero_()
        gate(x, Chunk())
        load = gate.load_E.double()
        violations.append(float(load.max() / load.mean() - 1))
        gate.e_score_correction_bias.copy_(
            updated_bias(gate.e_score_correction_bias, gate.load_E, 0.02)
        )
    assert violations[0] > 1.0
    assert max(violations[-5:]) < 0.4 * violations[0]


def test_a_bfloat16_model_routes_in_float32() -> None:
    gate = Router(SMALL, dtype=torch.bfloat16)
    torch.nn.init.normal_(gate.weight)
    routing = gate(hidden(SMALL).bfloat16())
    assert gate.weight.dtype == routing.weights_TK.dtype == torch.float32
