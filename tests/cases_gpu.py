"""What ranks do in the GPU tests: several of them on one GPU, over NCCL."""

from __future__ import annotations

from typing import Any

import torch

from counterflow.launch.engine import Engine
from counterflow.model import hf_grads
from counterflow.parallel import Mesh, MeshShape
from counterflow.parallel.schedule import build
from tests.cases_training import TINY, global_batch


def gradients_on_gpu(rank: int, world: int, schedule: str, pp: int, ep: int) -> dict[str, Any]:
    """As `cases_training.gradients`, with CUDA tensors; answers with CPU tensors."""
    torch.cuda.set_device(0)
    device = torch.device("cuda", 0)
    dp = world // pp
    mesh = Mesh.create(MeshShape(pp, dp, ep), timeout_s=100)
    plan = build(schedule, ranks=pp, microbatches=max(2 * pp, 4))
    engine = Engine(TINY, mesh, plan, dtype=torch.float64, device=device, timeout_s=100)
    num = plan.num_microbatches
    inputs, targets = global_batch(0, num, dp)
    share = slice(mesh.dp_rank * num * 2, (mesh.dp_rank + 1) * num * 2)
    engine.gradients(inputs[share].to(device), targets[share].to(device))
    grads = {n: g for part in engine.parts.values() for n, g in hf_grads(part)}
    return {
        "grads": {n: None if g is None else g.cpu() for n, g in grads.items()},
        "microbatches": num,
        "spans": len(engine.pipeline.last_step_spans()),
    }
