"""What ranks do in tests of what is measured of a step."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from counterflow.comm.collectives import sum_over
from counterflow.comm.waiting import WaitBoard
from counterflow.launch.config import Config
from counterflow.launch.engine import StepResult
from counterflow.launch.telemetry import Telemetry
from counterflow.parallel.mesh import Mesh, MeshShape


def late_rank(rank: int, world: int, late_s: float) -> float:
    """Rank 1 comes later to a sum; how long each has waited."""
    board = WaitBoard()
    sum_over(torch.ones(1), dist.group.WORLD, "a first sum")
    if rank == 1:
        time.sleep(late_s)
    sum_over(torch.ones(1), dist.group.WORLD, "a sum", board=board)
    return board.waited_s


def telling_ranks(rank: int, world: int, more_gib: float, late_s: float) -> list[dict[str, Any]]:
    """What each rank tells of three steps, of which all ranks together tell in the first and third.

    Rank 1 takes `more_gib`, has a wait of 50 ms in its first step, and is late after it.
    """
    config = Config()
    config = replace(config, metrics=replace(config.metrics, gpu_every=3))
    mesh = Mesh.create(MeshShape(pp=1, dp=world), timeout_s=30)
    telemetry = Telemetry(config, mesh, torch.device("cpu"))
    result = StepResult({"main": 2.0, "mtp": 0.0, "balance": 0.0}, 1.0, {})
    taken = torch.ones(int(more_gib * 2**28)) if rank == 1 else None
    found: list[dict[str, Any]] = []
    for step in (1, 2, 3):
        with telemetry.step():
            time.sleep(1e-3)
            if rank == 1 and step == 1:
                with mesh.waits.waiting("a sum", (0,)):
                    time.sleep(0.05)
        if rank == 1 and step == 1:
            time.sleep(late_s)
        found.append(telemetry.values(step, result, 1000))
    del taken
    return found
