"""What ranks do in tests of what is measured of a step."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from counterflow.comm.collectives import sum_over
from counterflow.comm.waiting import WaitBoard


def late_rank(rank: int, world: int, late_s: float) -> float:
    """Rank 1 comes later to a sum; how long each has waited."""
    board = WaitBoard()
    sum_over(torch.ones(1), dist.group.WORLD, "a first sum")
    if rank == 1:
        time.sleep(late_s)
    sum_over(torch.ones(1), dist.group.WORLD, "a sum", board=board)
    return board.waited_s
