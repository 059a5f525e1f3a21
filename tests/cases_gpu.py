"""What ranks do in the GPU tests: several of them on one GPU, over NCCL."""

from __future__ import annotations

from typing import Any

import torch

from counterflow.comm import Dispatcher, dispatcher
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
    """Several dispatches on the CPU and on the GPU, bit for bit.

    Each has another routing and other sizes. The expert is one multiplication and one squaring a
    value, whose bits no device may choose. The first is under inference mode, whose tensors must
    not come to lie among the buffers of the others.
    """
    torch.cuda.set_device(0)
    mesh = Mesh.create(MeshShape(1, world, world), nodes=nodes, timeout_s=100)
    d = dispatcher(
        name, mesh, num_experts=8, payload=payload, alignment=16, chunks=2, timeout_s=100
    )
    with torch.inference_mode():
        for device in ("cpu", "cuda"):
            given = _given(rank, 0, device)
            d.dispatch(given[0].detach(), given[1], given[2].detach())
    results: list[list[torch.Tensor]] = []
    for device in ("cpu", "cuda"):
        results.append([])
        for step in range(3):
            results[-1] += _whole_form(d, *_given(rank, step, device))
        results[-1] += _split_form(d, *_given(rank, 3, device))
    exact = all(torch.equal(a, b) for a, b in zip(*results, strict=True) if a.dim() > 1)
    for a, b in zip(*results, strict=True):
        if a.dim() == 1:  # each weight's gradient is a sum over a row, in the device's own order
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    return exact


def _given(rank: int, step: int, device: str) -> tuple[torch.Tensor, ...]:
    """x, experts, weights, gradient of y."""
    random = torch.Generator().manual_seed(17 * step + rank)
    tokens, top_k, hidden = 700 + 300 * rank + 50 * step, 3, 256
    x = torch.randn(tokens, hidden, generator=random)
    chosen = torch.randint(-1, 8, (tokens, top_k), generator=random)
    weights = torch.rand(tokens, top_k, generator=random)
    grad = torch.randn(tokens, hidden, generator=random)
    return (
        x.to(device).requires_grad_(),
        chosen.to(device),
        weights.to(device).requires_grad_(),
        grad.to(device),
    )


def _whole_form(
    d: Dispatcher[Any], x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, grad: Any
) -> list[torch.Tensor]:
    out = d.dispatch(x, chosen, weights)
    again = d.dispatch(2 * x.detach(), chosen, weights.detach(), out.handle)
    y = d.combine(out.rows_ND.square() * out.weights_N.unsqueeze(1), out.handle)
    y.backward(grad)
    assert x.grad is not None
    assert weights.grad is not None
    found = (out.rows_ND, again.rows_ND, y, x.grad, weights.grad.flatten())
    return [tensor.detach().cpu() for tensor in found]


def _split_form(
    d: Dispatcher[Any], x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, grad: Any
) -> list[torch.Tensor]:
    """Two under way at once, each move started before the other's is finished."""
    with torch.no_grad():
        handles = [d.start_preprocess(chosen).finish() for _ in range(2)]
        coming = [d.start_dispatch(s * x, weights, h) for s, h in zip((1, 2), handles, strict=True)]
        rows = [pending.finish().rows_ND for pending in coming]
        sums = [d.start_combine(r, h) for r, h in zip(rows, handles, strict=True)]
        back = [d.start_combine_backward(grad, h) for h in handles]
        found = [*rows, *(s.finish() for s in sums), *(b.finish() for b in back)]
    return [tensor.cpu() for tensor in found]
