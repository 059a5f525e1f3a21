"""Small models for tests of the model room, and what several processes do with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from counterflow.comm.dispatch import dispatcher
from counterflow.model import DeepSeekV3, ModelConfig, Yarn, hf_grads, load_hf, write_shard
from counterflow.parallel.chunk import Chunk
from counterflow.parallel.mesh import Mesh, MeshShape

SMALL = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    initializer_range=0.2,  # large, so that no part of the model is lost in rounding
    max_position_embeddings=256,
    num_nextn_predict_layers=0,
    aux_loss_alpha=0.01,
)
# A dense layer, one with experts and one of multi-token prediction, as few as tell them apart.
MTP = replace(
    SMALL,
    num_hidden_layers=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    num_nextn_predict_layers=1,
)
UNCOMPRESSED = replace(MTP, q_lora_rank=None, num_nextn_predict_layers=0)
YARN = Yarn(factor=4.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0)
V2 = replace(
    SMALL,
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
)


def batch(config: ModelConfig, sequences: int = 2, length: int = 24, seed: int = 1) -> list[Tensor]:
    """Tokens and targets [sequences, length] of random text."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(config.vocab_size, (sequences, length + 1), generator=generator)
    return [text[:, :-1].contiguous(), text[:, 1:].contiguous()]


def set_biases(model: DeepSeekV3, seed: int = 2) -> None:
    """Give every router a balancing bias that changes what is selected."""
    for name, moe in model.moe_layers().items():
        generator = torch.Generator().manual_seed(seed + len(name))
        bias = moe.gate.e_score_correction_bias
        bias.copy_(torch.randn(bias.shape, generator=generator) * 0.3)


def total_loss(model: DeepSeekV3, tokens: Tensor, targets: Tensor, chunk: Chunk) -> Tensor:
    """Main loss plus the auxiliary ones, as a pipeline back-propagates them."""
    loss = model.loss(model(tokens, chunk), targets, chunk)
    return loss + sum(value for _, value in chunk.losses)


def grads_by_name(model: DeepSeekV3) -> dict[str, Tensor]:
    """Gradients by Hugging Face name; there must be one of every parameter."""
    grads: dict[str, Tensor] = {}
    for name, grad in hf_grads(model):
        assert grad is not None, name
        grads[name] = grad
    return grads


def grads_of(model: DeepSeekV3, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Gradients by Hugging Face name after one full backward."""
    total_loss(model, tokens, targets, Chunk()).backward()
    return grads_by_name(model)


def expert_parallel_grads(
    rank: int, world: int, config: ModelConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One rank's gradients, by Hugging Face name, of its share of a batch; and its loads."""
    mesh = Mesh.create(MeshShape(dp=world, ep=world))
    exchange = dispatcher("flat", mesh, num_experts=config.n_routed_experts)
    model = DeepSeekV3(config, None, exchange, dtype=torch.float64)
    set_biases(model)
    tokens, targets = (t.chunk(world)[rank] for t in batch(config, sequences=4))
    grads = grads_of(model, tokens, targets)
    loads = {name: moe.gate.load_E.numpy() for name, moe in model.moe_layers().items()}
    return {name: grad.numpy() for name, grad in grads.items()}, loads


def expert_parallel_checkpoint(
    rank: int, world: int, config: ModelConfig, source: str, target: str
) -> int:
    """Load this rank's experts from one folder, write them to another; parameters loaded."""
    mesh = Mesh.create(MeshShape(dp=world, ep=world))
    exchange = dispatcher("flat", mesh, num_experts=config.n_routed_experts)
    model = DeepSeekV3(replace(config, init_seed=99), None, exchange)
    load_hf(model, source)
    write_shard([model], target, f"rank{rank}")
    return sum(p.numel() for p in model.parameters())
