"""What ranks do in tests/launch/test_preflight_memory.py and test_preflight_bandwidth.py."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from counterflow.comm.collectives import gather
from counterflow.comm.topology import Machine, ProcessPlace, Seat, Topology
from counterflow.launch import fp8
from counterflow.launch.check import step_schedules
from counterflow.launch.config import load
from counterflow.launch.engine import Engine
from counterflow.launch.experts import make_experts
from counterflow.launch.preflight.baseline import Baseline
from counterflow.launch.preflight.finding import Finding
from counterflow.launch.preflight.measured import Measured
from counterflow.launch.preflight.survey import bandwidth_findings, survey
from counterflow.launch.preflight.together import look_together
from counterflow.parallel.mesh import Mesh


def state_bytes(rank: int, world: int, overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Bytes of a rank's tensors after one step, and of what the world's checkpoint would hold."""
    config = load(None, overrides)
    mesh = Mesh.create(config.mesh, nodes=[0] * world)
    engine = Engine(
        config.model,
        mesh,
        step_schedules(config)[config.schedule.microbatches],
        experts=make_experts(config, mesh),
        dtype=getattr(torch, config.train.dtype),
        recipe=fp8.make_recipe(config),
        recompute=fp8.make_recompute(config),
        moments=getattr(torch, config.moments),
        ema_decay=config.train.ema_decay,
        zero=config.zero.stage,
    )
    rows = config.train.sequences * config.schedule.microbatches
    tokens = torch.randint(0, config.model.vocab_size, (rows, config.data.sequence_length))
    engine.step(tokens, tokens, lr=1e-3)
    engine.settle()
    states = engine.optimizer.state_dict()
    pieces = {name: p.nbytes for name, p in engine.parameters.items()}
    whole: dict[str, int] = {}
    for name, parameter in engine.parameters.items():
        copies = config.mesh.ep if ".experts." in name and parameter.dim() == 3 else 1
        size = pieces[name] + sum(t.nbytes for k, t in states[name].items() if k != "step")
        whole[name] = copies * size
        whole[f"step of {name}"] = 4 * (parameter.shape[0] * copies if parameter.dim() == 3 else 1)
        if engine.ema is not None:
            whole[f"ema of {name}"] = copies * engine.ema.state_dict()["averages"][name].nbytes
    for part in engine.parts.values():
        for name, buffer in part.state_dict(keep_vars=True).items():
            if name not in engine.parameters:
                whole[name] = buffer.nbytes
    averages = {} if engine.ema is None else engine.ema.state_dict()["averages"]
    saved = sum(piece.data.nbytes for piece in engine.optimizer.pieces(engine.held))
    saved += sum(pieces.values()) + sum(t.nbytes for t in averages.values())
    updated = engine.optimizer.parameters | engine.optimizer.masters
    if engine.ema is not None:
        engine.ema.close()
    engine.experts.close()
    return {
        "pp_rank": mesh.pp_rank,
        "parameters": sum(pieces.values()),
        "gradients": sum(p.grad.nbytes for p in engine.parameters.values() if p.grad is not None),
        "optimizer": sum(
            t.nbytes for state in states.values() for key, t in state.items() if key != "step"
        ),
        "updated": sum(t.nbytes for t in updated.values()),
        "averages": sum(t.nbytes for t in averages.values()),
        "saved": saved,
        "count": len(pieces),
        "whole": whole,
    }


def topology_of(world: int, per_node: int) -> Topology:
    seats = [
        Seat(
            ProcessPlace(r, world, r // per_node, r % per_node, per_node, "torchrun"), Machine("h")
        )
        for r in range(world)
    ]
    return Topology.of(seats)


def surveyed(
    rank: int,
    world: int,
    per_node: int,
    size: int,
    baseline: Baseline | None = None,
    least_share: float = 0.6,
) -> tuple[Measured, list[Finding]]:
    """Bandwidths of nodes of `per_node` ranks, and what is wrong with them."""
    topology = topology_of(world, per_node)
    names = [f"n{node}" for node in range(topology.num_nodes)]
    measured = survey(
        topology,
        names,
        torch.device("cpu"),
        "fake",
        [size],
        baseline=baseline,
        source="base.json",
        least_share=least_share,
        timeout_s=60.0,
    )
    return measured, bandwidth_findings(measured, baseline, least_share)


def decided_together(rank: int, world: int, ill: Sequence[int]) -> list[Finding]:
    """What nodes decide of which `ill` have found themselves bad, each with a number of its own."""

    def ask(value: Any, what: str) -> list[Any]:
        return gather(value, dist.group.WORLD, what)

    bad = Finding("gpu", "bad", f"is in use by process {70 + rank}", f"n{rank}", kind="in use")
    return look_together(
        ask,
        rank=rank,
        node=f"n{rank}",
        versions={"torch": "same"},
        findings=[bad] if rank in ill else [],
        folder=None,
    )


def looked(rank: int, world: int, folders: Sequence[str], ahead_s: float) -> list[Finding]:
    """What ranks find out together, each of a node of its own; the last one's clock is ahead."""

    def ask(value: Any, what: str) -> list[Any]:
        return gather(value, dist.group.WORLD, what)

    return look_together(
        ask,
        rank=rank,
        node=f"n{rank}",
        versions={"torch": "old" if rank == 1 else "new"},
        findings=[Finding("gpu", "warning", "is warm", f"n{rank}")],
        folder=Path(folders[rank]),
        clock=lambda: time.time() + (ahead_s if rank == world - 1 else 0),
    )
