"""What ranks do in the tests of training in FP8, and the same in one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from counterflow.comm.dispatch import dispatcher
from counterflow.comm.dispatch.names import PayloadName
from counterflow.fp8 import Recipe
from counterflow.launch.engine import Engine
from counterflow.model import ModelConfig, hf_grads
from counterflow.model.build import Recompute
from counterflow.parallel import Mesh, MeshShape
from counterflow.parallel.schedule import build
from tests.cases_training import TINY, global_batch

# Two tiles along the hidden size, the second one short.
CONFIG: ModelConfig = replace(
    TINY,
    hidden_size=136,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_nextn_predict_layers=1,
    aux_loss_alpha=0.01,
)


def config_for(layers: int) -> ModelConfig:
    """One layer with experts, and that of multi-token prediction; the others are dense."""
    return replace(CONFIG, num_hidden_layers=layers, first_k_dense_replace=layers - 1)


def make_engine(
    mesh: Mesh,
    schedule: str,
    microbatches: int,
    layers: int = 2,
    payload: PayloadName = "exact",
) -> Engine:
    plan = build(schedule, ranks=mesh.shape.pp, microbatches=microbatches)
    experts = dispatcher("flat", mesh, num_experts=CONFIG.n_routed_experts, payload=payload)
    return Engine(
        config_for(layers),
        mesh,
        plan,
        experts=experts,
        dtype=torch.bfloat16,
        recipe=Recipe(check=True),
        recompute=Recompute(norms=True, up_projections=True),
        timeout_s=100,
    )


def gradients_of(engine: Engine, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """This rank's gradients by Hugging Face name."""
    engine.gradients(inputs, targets)
    return {
        name: grad.clone()
        for part in engine.parts.values()
        for name, grad in hf_grads(part)
        if grad is not None
    }


def gradients(
    rank: int,
    world: int,
    schedule: str,
    pp: int,
    dp: int,
    ep: int,
    microbatches: int,
    payload: PayloadName = "exact",
) -> dict[str, Any]:
    """Losses of this data-parallel rank's micro-batches, and its gradients."""
    mesh = Mesh.create(MeshShape(pp, dp, ep), timeout_s=100)
    engine = make_engine(mesh, schedule, microbatches, max(pp, 2), payload)
    inputs, targets = global_batch(0, microbatches, dp)
    share = slice(mesh.dp_rank * microbatches * 2, (mesh.dp_rank + 1) * microbatches * 2)
    grads = gradients_of(engine, inputs[share], targets[share])
    return {"dp_rank": mesh.dp_rank, "losses": engine.pipeline.report.losses, "grads": grads}


def one_process(
    share: int,
    shares: int,
    microbatches: int,
    *,
    layers: int = 2,
    schedule: str = "1f1b",
    payload: PayloadName = "exact",
) -> dict[str, Any]:
    """The same of one of equal shares of the batch, in this process."""
    engine = make_engine(Mesh(MeshShape()), schedule, microbatches, layers, payload)
    inputs, targets = global_batch(0, microbatches, shares)
    rows = slice(share * microbatches * 2, (share + 1) * microbatches * 2)
    grads = gradients_of(engine, inputs[rows], targets[rows])
    return {"losses": engine.pipeline.report.losses, "grads": grads}
