"""What ranks do in the tests that hold distributed training against one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from counterflow.launch.engine import Engine
from counterflow.model import DeepSeekV3, ModelConfig, hf_grads, hf_tensors, updated_bias
from counterflow.model.router import Router
from counterflow.parallel import Chunk, Mesh, MeshShape
from counterflow.parallel.schedule import Schedule, build

SEQUENCE = 9
STEP: dict[str, Any] = {"lr": 1e-3, "max_norm": 0.5, "mtp_weight": 0.3, "bias_update_speed": 1e-2}

TINY = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    moe_intermediate_size=12,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=2,
    max_position_embeddings=16,
    aux_loss_alpha=0.05,  # large, so that a mistake in it shows
    initializer_range=0.2,
)


def global_batch(step: int, microbatches: int, dp: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (dp * microbatches * 2, SEQUENCE + 1)
    tokens = torch.randint(0, TINY.vocab_size, shape, generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


class OneProcess:
    """The same training by plain autograd and torch's own optimizer, in one process."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.model = DeepSeekV3(config, dtype=dtype)
        self.model.mtp_loss_weight = STEP["mtp_weight"]
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        self.adam = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=STEP["lr"],
            betas=(0.9, 0.95),
            eps=1e-8,
        )

    def gradients(self, inputs: Tensor, targets: Tensor, microbatches: int) -> float:
        self.adam.zero_grad()
        total = 0.0
        for x, y in zip(inputs.chunk(microbatches), targets.chunk(microbatches), strict=True):
            chunk = Chunk()
            loss = self.model.loss(self.model(x, chunk), y, chunk)
            loss = (loss + sum(value for _, value in chunk.losses)) / microbatches
            loss.backward()
            total += float(loss.detach())
        return total

    def step(self, inputs: Tensor, targets: Tensor, microbatches: int) -> tuple[float, float]:
        loss = self.gradients(inputs, targets, microbatches)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.cat([g.flatten() for g in grads]).norm()
        if (
            norm > STEP["max_norm"]
        ):  # torch's clip_grad_norm_ adds 1e-6 to the norm, which shows here
            for grad in grads:
                grad.mul_(STEP["max_norm"] / norm)
        self.adam.step()
        for router in (m for m in self.model.modules() if isinstance(m, Router)):
            bias = updated_bias(
                router.e_score_correction_bias, router.load_E, STEP["bias_update_speed"]
            )
            router.e_score_correction_bias.copy_(bias)
            router.load_E.zero_()
        return loss, float(norm)


def plan_for(schedule: str, pp: int) -> Schedule:
    return build(schedule, ranks=pp, microbatches=max(2 * pp, 4))


def make_engine(
    rank_mesh: Mesh,
    config: ModelConfig,
    schedule: str,
    dtype: torch.dtype,
    layers: tuple[int, ...] | None = None,
) -> Engine:
    plan = plan_for(schedule, rank_mesh.shape.pp)
    options = {"dtype": dtype, "weight_decay": 0.1, "layers": layers, "timeout_s": 100}
    return Engine(config, rank_mesh, plan, **options)


def config_for(schedule: str, pp: int) -> ModelConfig:
    return replace(TINY, num_hidden_layers=max(plan_for(schedule, pp).num_stages, 4))


def gradients(
    rank: int, world: int, schedule: str, pp: int, ep: int, dp: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The loss of the global batch, and this rank's gradients by Hugging Face name."""
    mesh = Mesh.create(MeshShape(pp, dp, ep), timeout_s=100)
    engine = make_engine(mesh, config_for(schedule, pp), schedule, dtype)
    num = engine.pipeline.schedule.num_microbatches
    inputs, targets = global_batch(0, num, dp)
    share = slice(mesh.dp_rank * num * 2, (mesh.dp_rank + 1) * num * 2)
    engine.gradients(inputs[share], targets[share])
    grads = {name: grad for part in engine.parts.values() for name, grad in hf_grads(part)}
    loss = sum(engine._mean_over_dp(engine.pipeline.report.losses).values())
    return {"loss": loss, "grads": grads, "microbatches": num}


def one_process_gradients(
    schedule: str, pp: int, dp: int, microbatches: int, dtype: torch.dtype
) -> tuple[float, dict[str, Tensor | None]]:
    single = OneProcess(config_for(schedule, pp), dtype)
    inputs, targets = global_batch(0, microbatches, dp)
    loss = single.gradients(inputs, targets, microbatches * dp)
    return loss, dict(hf_grads(single.model))


def curves(
    rank: int,
    world: int,
    schedule: str,
    pp: int,
    ep: int,
    dp: int,
    steps: int,
    single: bool = False,
    layers: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """Losses, norms and final tensors of this rank, and if `single` of one process (on rank 0)."""
    mesh = Mesh.create(MeshShape(pp, dp, ep), timeout_s=100)
    config = config_for(schedule, pp)
    engine = make_engine(mesh, config, schedule, torch.float64, layers)
    num = engine.pipeline.schedule.num_microbatches
    losses, norms, loads = [], [], []
    for step in range(steps):
        inputs, targets = global_batch(step, num, dp)
        share = slice(mesh.dp_rank * num * 2, (mesh.dp_rank + 1) * num * 2)
        result = engine.step(inputs[share], targets[share], **STEP)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        loads.append(result.loads)
    mine = {n: t.clone() for part in engine.parts.values() for n, t in hf_tensors(part)}
    answer = {"losses": losses, "norms": norms, "loads": loads, "tensors": mine}
    if single and rank == 0:
        alone = OneProcess(config, torch.float64)
        pairs = [alone.step(*global_batch(s, num, dp), num * dp) for s in range(steps)]
        answer["single"] = {
            "losses": [loss for loss, _ in pairs],
            "norms": [norm for _, norm in pairs],
            "tensors": {n: t.clone() for n, t in hf_tensors(alone.model)},
        }
    return answer
