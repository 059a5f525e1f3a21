"""What ranks do in the tests that hold the sharded optimizer against the whole one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from counterflow.comm.errors import CommError
from counterflow.launch.checkpoint.pieces import Piece
from counterflow.launch.engine import Engine
from counterflow.parallel import Mesh, MeshShape
from counterflow.parallel.schedule import build
from counterflow.parallel.zero import Shards
from tests import cases_training as cases

STEPS = 2


def make_engine(mesh: Mesh, schedule: str, **rest: Any) -> Engine:
    """An engine of a small model; equal arguments give equal ones on equal meshes."""
    plan = build(schedule, ranks=mesh.shape.pp, microbatches=2 * mesh.shape.pp)
    config = replace(cases.TINY, num_hidden_layers=max(4, plan.num_stages))
    return Engine(config, mesh, plan, timeout_s=60, **rest)


def train(engine: Engine, steps: Iterable[int], **rest: Any) -> list[tuple[Any, float]]:
    """Losses and loads, and the norm, of steps on this rank's share of each batch."""
    mesh, num = engine.mesh, engine.pipeline.schedule.num_microbatches
    share = slice(mesh.dp_rank * num * 2, (mesh.dp_rank + 1) * num * 2)
    told: list[tuple[Any, float]] = []
    for step in steps:
        inputs, targets = cases.global_batch(step, num, mesh.shape.dp)
        result = engine.step(inputs[share], targets[share], **cases.STEP, **rest)
        told.append(((result.losses, result.loads, result.updated), result.grad_norm))
    return told


def pieces(engine: Engine) -> list[Piece]:
    """Everything that a checkpoint has of this rank's parameters and optimizer."""
    engine.settle()
    found = [*engine.optimizer.pieces(engine.held)]
    for name, parameter in engine.parameters.items():
        flat = parameter.detach().view(-1)
        found += engine.held[name].pieces(f"parameters/{name}", flat)
    if engine.ema is not None:
        found += engine.ema.pieces(engine.held)
    return found


def state_bytes(engine: Engine) -> int:
    """Of moments and masters on this rank."""
    return sum(
        tensor.numel() * tensor.element_size()
        for state in engine.optimizer.state_dict().values()
        for key, tensor in state.items()
        if key != "step"
    )


def difference(name: str, whole: Iterable[Piece], part: Piece) -> float:
    """The largest between a piece and what other pieces have in its place, which cover it."""
    worst, seen = 0.0, 0
    for piece in whole:
        first = max(piece.offset, part.offset)
        last = min(piece.offset + piece.data.numel(), part.offset + part.data.numel())
        if first < last:
            seen += last - first
            mine = part.data[first - part.offset : last - part.offset].double()
            theirs = piece.data[first - piece.offset : last - piece.offset].double()
            worst = max(worst, float((mine - theirs).abs().max()))
    assert seen == part.data.numel(), name
    return worst


def against_whole(
    rank: int, world: int, schedule: str, pp: int, ep: int, kinds: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """For each kind of engine: what both optimizers told, how they differ, what each holds."""
    mesh = Mesh.create(MeshShape(pp, world // pp, ep), timeout_s=60)
    answers: list[dict[str, Any]] = []
    for kind in kinds:
        engines = [make_engine(mesh, schedule, zero=zero, **kind) for zero in (0, 1)]
        told = [train(engine, range(STEPS)) for engine in engines]
        whole: dict[str, list[Piece]] = {}
        for piece in pieces(engines[0]):
            whole.setdefault(piece.name, []).append(piece)
        parts = pieces(engines[1])
        found = {(p.name, p.offset): difference(p.name, whole[p.name], p) for p in parts}
        loss = [evaluated(engine) for engine in engines]
        for engine in engines:
            if engine.ema is not None:
                engine.ema.close()
        answers.append(
            {
                "told": told,
                "differ": {where: worst for where, worst in found.items() if worst},
                "loss": loss,
                "bytes": [state_bytes(engine) for engine in engines],
                "places": [(p.name, p.shape, p.offset, p.data.numel()) for p in parts],
            }
        )
    return answers


def evaluated(engine: Engine) -> tuple[float, ...]:
    """The loss of a batch; where there are averages, with them too, and without them again."""
    mesh, num = engine.mesh, engine.pipeline.schedule.num_microbatches
    share = slice(mesh.dp_rank * num * 2, (mesh.dp_rank + 1) * num * 2)
    inputs, targets = (t[share] for t in cases.global_batch(9, num, mesh.shape.dp))
    losses = [engine.evaluate(inputs, targets)]
    if engine.ema is not None:
        with engine.ema.swapped():
            losses.append(engine.evaluate(inputs, targets))
        losses.append(engine.evaluate(inputs, targets))
    return tuple(losses)


def rejected(rank: int, world: int) -> bool:
    """Whether a step that is judged to be none leaves everything as it was."""
    engine = make_engine(Mesh.create(MeshShape(1, world), timeout_s=60), "1f1b", zero=1)
    train(engine, range(2))
    before = [piece.data.clone() for piece in pieces(engine)]
    ((_, _, updated), _) = train(engine, [7], judge=lambda loss, norm: False)[0]
    after = [piece.data for piece in pieces(engine)]
    return not updated and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def resumed(rank: int, world: int) -> list[list[tuple[Any, float]]]:
    """What a sharded run tells, and what others tell that go on from its pieces, or theirs."""
    mesh = Mesh.create(MeshShape(1, world, 2), timeout_s=60)
    told: list[list[tuple[Any, float]]] = []
    for zero, others in ((1, (0, 1)), (0, (1,))):
        first = make_engine(mesh, "1f1b", zero=zero, dtype=torch.bfloat16)
        train(first, range(2))
        saved = everyones(pieces(first))
        engines = [make_engine(mesh, "1f1b", zero=z, dtype=torch.bfloat16) for z in others]
        for engine in engines:
            load(pieces(engine), saved)
            engine.loaded()
            for name, router in engine._routers.items():
                bias = first._routers[name].e_score_correction_bias
                router.e_score_correction_bias.copy_(bias)
        told += [train(engine, [2, 3]) for engine in (first, *engines)]
    return told


def other_layouts(rank: int, world: int) -> list[str]:
    """Names of pieces that come out of another layout other than they went in."""
    schedules = {1: "1f1b", 2: "dualpipe", 4: "1f1b"}
    meshes = [Mesh.create(MeshShape(*s), timeout_s=60) for s in ((1, 4, 2), (2, 2, 1), (4, 1, 1))]
    made = [
        make_engine(mesh, schedules[mesh.shape.pp], zero=1, ema_decay=0.9, moments=torch.bfloat16)
        for mesh in meshes
    ]
    train(made[0], range(2))
    saved = everyones(pieces(made[0]))
    wrong: list[str] = []
    for engine in made[1:]:
        load(pieces(engine), saved)
        engine.loaded()
        together: dict[str, list[Piece]] = {}
        for name, offset, data in everyones(pieces(engine)):
            together.setdefault(name, []).append(Piece(name, (), offset, data))
        wrong += [
            name
            for name, offset, data in saved
            if difference(name, _once(together[name]), Piece(name, (), offset, data))
        ]
    for engine in made:
        assert engine.ema is not None
        engine.ema.close()
    return wrong


def everyones(mine: list[Piece]) -> list[tuple[str, int, Tensor]]:
    """What all ranks hold, as a checkpoint would give it back."""
    saved: list[Any] = [None] * dist.get_world_size()
    told = [(p.name, p.offset, p.data.float().numpy()) for p in mine]
    dist.all_gather_object(saved, told)
    return [(name, at, torch.from_numpy(data)) for of in saved for name, at, data in of]


def _once(found: list[Piece]) -> list[Piece]:
    """Replicas left out, so that each place is covered once."""
    kept: dict[int, Piece] = {}
    end = 0
    for piece in sorted(found, key=lambda piece: piece.offset):
        if piece.offset >= end:
            kept[piece.offset] = piece
            end = piece.offset + piece.data.numel()
    return list(kept.values())


def load(into: Iterable[Piece], saved: list[tuple[str, int, Tensor]]) -> None:
    """Fill pieces from those of other layouts."""
    by_name: dict[str, list[tuple[int, Tensor]]] = {}
    for name, offset, data in saved:
        by_name.setdefault(name, []).append((offset, data))
    for piece in into:
        filled = torch.zeros(piece.data.numel(), dtype=torch.bool)
        for offset, data in by_name[piece.name]:
            first = max(piece.offset, offset)
            last = min(piece.offset + piece.data.numel(), offset + data.numel())
            if first < last:
                here = slice(first - piece.offset, last - piece.offset)
                piece.data[here] = data[first - offset : last - offset]
                filled[here] = True
        assert bool(filled.all()), piece.name


def reduced_and_gathered(
    rank: int, world: int, sizes: list[int], bucket_bytes: int
) -> list[tuple[list[float] | None, list[float]]]:
    """Of each parameter, this rank's mean gradient, and the whole after each added 1 to its share.

    Parameter i has a gradient on ranks from i on only.
    """
    named = {str(i): Parameter(torch.zeros(size)) for i, size in enumerate(sizes)}
    group = dist.group.WORLD
    shards = Shards({0: named}, lambda p: group, scale=1 / world, bucket_bytes=bucket_bytes)
    for i, parameter in enumerate(named.values()):
        if rank >= i:
            parameter.grad = torch.arange(sizes[i]).float() * (rank + 1)
    shards.end_stage(0)
    shards.finish_gradients()
    with torch.no_grad():
        for share in shards.shares.values():
            share.parameter.add_(1 + rank)
    shards.start_gather()
    shards.finish_gather(0)
    grads = [share.parameter.grad for share in shards.shares.values()]
    return [
        (None if grad is None else grad.tolist(), parameter.tolist())
        for grad, parameter in zip(grads, named.values(), strict=True)
    ]


def without_a_peer(rank: int, world: int) -> str:
    """What a rank is told whose peer reduces and then never gathers."""
    # The limit of what succeeds; at the end nobody waits for it, as the peer's connections close.
    group = dist.new_group(list(range(world)), timeout=timedelta(seconds=10))
    assert isinstance(group, dist.ProcessGroup)
    parameter = Parameter(torch.zeros(5))
    shards = Shards({0: {"model.norm": parameter}}, lambda p: group)
    parameter.grad = torch.ones(5)
    shards.end_stage(0)
    shards.finish_gradients()
    if rank:
        return ""
    shards.start_gather()
    try:
        shards.finish_gather()
    except CommError as error:
        return str(error)
    return "no error"


def by_deepspeed(rank: int, world: int, schedule: str, pp: int, ep: int) -> None:
    """Make an engine with DeepSpeed's optimizer."""
    mesh = Mesh.create(MeshShape(pp, world // pp, ep), timeout_s=60)
    make_engine(mesh, schedule, zero=1, zero_backend="deepspeed")


def against_deepspeed(rank: int, world: int, kind: dict[str, Any]) -> dict[str, Any]:
    """What both backends tell, and the names of tensors in whose values they differ."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    mesh = Mesh.create(MeshShape(1, world), timeout_s=60)
    backends = ("counterflow", "deepspeed")
    engines = [make_engine(mesh, "1f1b", zero=1, zero_backend=b, **kind) for b in backends]
    told = [train(engine, range(STEPS)) for engine in engines]
    loss = [evaluated(engine) for engine in engines]
    ours, theirs = (everyones(pieces(engine)) for engine in engines)
    by_name: dict[str, list[Piece]] = {}
    for name, offset, data in ours:
        by_name.setdefault(name, []).append(Piece(name, (), offset, data))
    assert by_name.keys() == {name for name, _, _ in theirs}
    differ = [
        name
        for name, offset, data in theirs
        if difference(name, _once(by_name[name]), Piece(name, (), offset, data))
    ]
    for engine in engines:
        if engine.ema is not None:
            engine.ema.close()
    return {"told": told, "loss": loss, "differ": differ}
