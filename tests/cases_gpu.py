"""What ranks do in the GPU tests: several of them on one GPU, over NCCL."""

from __future__ import annotations

from typing import Any

import torch

from counterflow.comm import dispatcher
from counterflow.comm.dispatch.names import PayloadName
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


def dispatch_on_both(
    rank: int, world: int, name: str, nodes: list[int], payload: PayloadName
) -> bool:
    """The same dispatch, expert, combine and backward on the CPU and on the GPU, bit for bit.

    The expert is one multiplication and one squaring a value, whose bits no device may choose.
    """
    torch.cuda.set_device(0)
    mesh = Mesh.create(MeshShape(1, world, world), nodes=nodes, timeout_s=100)
    experts, top_k, hidden = 8, 3, 256
    d = dispatcher(name, mesh, num_experts=experts, payload=payload, alignment=16, timeout_s=100)
    random = torch.Generator().manual_seed(rank)
    tokens = 700 + 300 * rank
    x = torch.randn(tokens, hidden, generator=random)
    choice = torch.randint(-1, experts, (tokens, top_k), generator=random)
    weights = torch.rand(tokens, top_k, generator=random)
    grad = torch.randn(tokens, hidden, generator=random)
    results: list[list[torch.Tensor]] = []
    for device in ("cpu", "cuda"):
        x_TD = x.to(device).requires_grad_()
        weights_TK = weights.to(device).requires_grad_()
        out = d.dispatch(x_TD, choice.to(device), weights_TK)
        y_TD = d.combine(out.rows_ND.square() * out.weights_N.unsqueeze(1), out.handle)
        y_TD.backward(grad.to(device))
        assert x_TD.grad is not None
        assert weights_TK.grad is not None
        found = (out.rows_ND, y_TD, x_TD.grad, weights_TK.grad)
        results.append([tensor.detach().cpu() for tensor in found])
    (*exact, cpu_weights), (*same, gpu_weights) = results
    # Each weight's gradient is a sum over a row, in the device's own order.
    torch.testing.assert_close(gpu_weights, cpu_weights, rtol=1e-5, atol=1e-5)
    return all(torch.equal(a, b) for a, b in zip(exact, same, strict=True))
