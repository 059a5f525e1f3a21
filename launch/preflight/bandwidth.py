"""All-to-all and all-reduce timed over groups of ranks, as `measured` defines it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...comm.errors import CommError, backend_reason
from ...comm.waiting import name_ranks
from .measured import COLLECTIVES, Collective, Timing

CPU_SIZES = (1 << 16, 1 << 19, 1 << 22)
GPU_SIZES = (1 << 20, 1 << 24, 1 << 28)
_WARM_UP, _ROUNDS = 2, 5


def time_collectives(
    group: dist.ProcessGroup,
    device: torch.device,
    sizes: Sequence[int],
    collectives: Sequence[Collective] = COLLECTIVES,
    *,
    rounds: int = _ROUNDS,
) -> list[Timing]:
    """Time collectives among `group`; a collective of it, and the same result on all its ranks.

    Args:
        group: of two ranks or more.
        device: of the messages; "cuda" goes by NCCL.
        sizes: bytes of messages, rounded down to what every rank can get a like share of.
        collectives: which.
        rounds: that are timed, after two that are not.

    Raises:
        CommError: a rank of the group is gone or does not answer within the group's limit.
    """
    peers = tuple(dist.get_process_group_ranks(group))
    try:
        return [
            _time(group, device, collective, size, rounds)
            for collective in collectives
            for size in sizes
        ]
    except RuntimeError as error:
        others = tuple(rank for rank in peers if rank != dist.get_rank())
        raise CommError(
            f"rank {dist.get_rank()}: measuring bandwidth among {name_ranks(peers)}: "
            f"{backend_reason(error)}",
            peers=others,
        ) from error


def _time(
    group: dist.ProcessGroup, device: torch.device, collective: Collective, size: int, rounds: int
) -> Timing:
    ranks = group.size()
    # Float32, as sums are; every rank's share of an all-to-all is as large.
    numel = max(1, size // 4 // ranks) * ranks
    source = torch.ones(numel, device=device)
    target = torch.empty_like(source)

    def run() -> None:
        if collective == "all_to_all":
            dist.all_to_all_single(target, source, group=group)
        else:
            dist.all_reduce(source, group=group)

    took: list[float] = []
    for index in range(_WARM_UP + rounds):
        source.fill_(1)
        slowest = _slowest(run, group, device)
        if index >= _WARM_UP:
            took.append(slowest)
    return Timing(collective, ranks, numel * 4, statistics.median(took))


def _slowest(run: Callable[[], Any], group: dist.ProcessGroup, device: torch.device) -> float:
    """Seconds that `run` takes on the slowest rank, from a common start."""
    # Not a barrier: over gloo that is as slow as a message to every rank, and so as uneven.
    start = torch.zeros(1, device=device)
    dist.all_reduce(start, group=group)
    _finish(device)
    began = time.perf_counter()
    run()
    _finish(device)
    seconds: Tensor = torch.tensor(
        [time.perf_counter() - began], dtype=torch.float64, device=device
    )
    dist.all_reduce(seconds, dist.ReduceOp.MAX, group=group)
    return float(seconds)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
