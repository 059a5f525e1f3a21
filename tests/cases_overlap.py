"""What ranks do in tests of overlap: train with and without it, and compare to the last bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.layer_memory import Alive
from counterflow.comm import dispatcher
from counterflow.comm.dispatch.names import PayloadName
from counterflow.fp8.recipe import Recipe
from counterflow.launch.engine import Engine
from counterflow.model import DeepSeekV3
from counterflow.model.build import Recompute
from counterflow.model.stages import Part as StagePart
from counterflow.parallel import Mesh, MeshShape
from counterflow.parallel.overlap import Part, Plan, execute
from counterflow.parallel.schedule import build
from counterflow.parallel.schedule.interleaving import Interleaving
from counterflow.parallel.stage import StageRunner

from .cases_deep_ep import fake
from .cases_training import STEP, TINY, global_batch

OTHER_ORDER = Interleaving(
    pair=(
        "attn(F)",
        "combine(B)",
        "shared(B)",
        "dispatch(F)",
        "mlp(B)",
        "dispatch(B)",
        "shared(F)",
        "attn(B)",
        "mlp(F)",
        "combine(F)",
        "attn(W)",
        "mlp(W)",
        "shared(W)",
    )
)


def with_and_without(
    rank: int,
    world: int,
    schedule: str,
    pp: int,
    ep: int,
    *,
    dtype: torch.dtype = torch.float32,
    layers: int | None = None,
    microbatches: int | None = None,
    way: str = "dedup",
    payload: PayloadName = "exact",
    fp8: bool = False,
    recompute: bool = False,
    shared: int | None = None,
    order: Interleaving | None = None,
    nodes: tuple[int, ...] | None = None,
    hidden: int | None = None,
    device: str = "cpu",
    steps: int = 2,
) -> dict[str, Any]:
    """Names of what differs between training with and without overlap; empty if nothing does."""
    dp = world // pp
    mesh = Mesh.create(MeshShape(pp, dp, ep), nodes=nodes, timeout_s=100)
    plan = build(schedule, ranks=pp, microbatches=microbatches or max(2 * pp, 4))
    config = replace(TINY, num_hidden_layers=layers or max(plan.num_stages, 4))
    if shared is not None:
        config = replace(config, n_shared_experts=shared)
    if hidden is not None:
        config = replace(config, hidden_size=hidden)
    ways = dispatcher(
        way, mesh, num_experts=config.n_routed_experts, payload=payload, timeout_s=100
    )
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    options: dict[str, Any] = {
        "experts": ways,
        "dtype": dtype,
        "device": where,
        "timeout_s": 100,
    }
    if fp8:
        options["recipe"] = Recipe()
    if recompute:
        options["recompute"] = Recompute(norms=True, up_projections=True)
    num = plan.num_microbatches * 2
    share = slice(mesh.dp_rank * num, (mesh.dp_rank + 1) * num)
    seen: list[dict[str, Tensor | float]] = []
    for overlap in (None, order or Interleaving()):
        engine = Engine(config, mesh, plan, overlap=overlap, **options)
        found: dict[str, Tensor | float] = {}
        for step in range(steps):
            inputs, targets = (x.to(where) for x in global_batch(step, plan.num_microbatches, dp))
            result = engine.step(inputs[share], targets[share], **STEP)
            found |= {f"{step} {name}": loss for name, loss in result.losses.items()}
            found[f"{step} norm"] = result.grad_norm
            found |= {
                f"{step} grad {n}": p.grad.clone()
                for n, p in engine.parameters.items()
                if p.grad is not None
            }
        inputs, targets = (x.to(where) for x in global_batch(steps, plan.num_microbatches, dp))
        found["evaluated"] = engine.evaluate(inputs[share], targets[share])
        found |= {f"weight {n}": p.detach().clone() for n, p in engine.parameters.items()}
        seen.append(found)
    without, with_it = seen
    assert without.keys() == with_it.keys()
    differing = [name for name, value in without.items() if not _same(value, with_it[name])]
    return {"differing": differing, "compared": len(without)}


def _same(a: Tensor | float, b: Tensor | float) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return float(a) == float(b)


def over_deep_ep(rank: int, world: int, version: str) -> dict[str, Any]:
    """`with_and_without` over the fake of DeepEP, whose rows are wider and of bfloat16."""
    with fake(version):
        return with_and_without(
            rank,
            world,
            "dualpipev",
            1,
            world,
            way="deep_ep",
            hidden=256,
            dtype=torch.bfloat16,
            steps=1,
        )


def unlike(rank: int, world: int, pp: int = 2) -> str:
    """What a rank is told that overlaps where another one, of its pipeline or not, does not."""
    mesh = Mesh.create(MeshShape(pp, world // pp, world // pp), timeout_s=30)
    plan = build("dualpipev", ranks=pp, microbatches=4)
    ways = dispatcher("flat", mesh, num_experts=TINY.n_routed_experts, timeout_s=30)
    overlap = None if rank == world - 1 else Interleaving()
    try:
        Engine(TINY, mesh, plan, overlap=overlap, experts=ways, timeout_s=30)
    except ValueError as error:
        return str(error)
    return ""


def unlike_needs(rank: int, world: int, overlap: Interleaving | None) -> str:
    """What a rank is told that trains layers which are frozen on rank 0."""
    mesh = Mesh.create(MeshShape(1, world, world), timeout_s=30)
    plan = build("dualpipev", ranks=1, microbatches=4)
    engine = Engine(TINY, mesh, plan, overlap=overlap, timeout_s=30)
    if rank == 0:
        for name, parameter in engine.parameters.items():
            if "embed" in name or "layers.0." in name or "layers.1." in name:
                parameter.requires_grad_(False)
    inputs, targets = global_batch(0, 4, world)
    try:
        engine.pipeline.step(inputs[rank * 8 : rank * 8 + 8], targets[rank * 8 : rank * 8 + 8])
    except ValueError as error:
        return str(error)
    return ""


def kept(cut: bool, *, fp8: bool, recompute: bool) -> tuple[int, int]:
    """Bytes that a stage of two MoE layers keeps from F to I, and from I to W."""
    config = replace(TINY, hidden_size=256, moe_intermediate_size=128, num_nextn_predict_layers=0)
    ways = dispatcher("flat", Mesh(MeshShape()), num_experts=8, payload="fp8" if fp8 else "exact")
    stage = DeepSeekV3(
        config,
        StagePart(range(1, 3), embed=False, head=False),
        ways,
        dtype=torch.bfloat16,
        recipe=Recipe() if fp8 else None,
        recompute=Recompute(norms=True, up_projections=True) if recompute else None,
    )
    runner = StageRunner(1, stage, None, frozenset((0, 1)), cut=cut)
    order, outline = Interleaving(), runner.outline()
    forward = Plan.of(order, outline, None)
    half = Plan.of(order, None, outline, weights=False)
    found = (0, 0)
    for number in range(2):  # the first makes what all share
        x = torch.randn(2, 16, 256, dtype=torch.bfloat16).requires_grad_()
        with Alive() as alive:
            live = runner.begin(number, (x,), None, training=True)
            execute(forward, Part(lambda live=live: live, runner.outcome), None)
            grad = torch.ones_like(x)
            first = alive.nbytes() - grad.nbytes
            live.seed((grad,))
            execute(half, None, Part(lambda live=live: live, lambda live: live.input_grads()))
            found = first, alive.nbytes() - grad.nbytes
            live.all_weights()
            runner.end_backward(number)
    return found
