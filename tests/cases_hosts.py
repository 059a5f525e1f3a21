"""What ranks on the hosts of a `bench.hosts.network` do to have transfers counted and timed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from bench.hosts import LINK, LOOPBACK, Counters, counters

T = TypeVar("T")


class Seen(NamedTuple):
    """What passed a host's two interfaces."""

    link: Counters
    loopback: Counters

    @classmethod
    def now(cls) -> Seen:
        """Of this rank's host, since it was made."""
        return cls(counters(LINK), counters(LOOPBACK))


def counted(work: Callable[[], T]) -> tuple[T, Seen]:
    """What `work` returns, and what passed the interfaces of this rank's host while all did it.

    A few barriers' bytes are counted as well, some kilobytes at most.
    """
    dist.barrier()
    before = Seen.now()
    dist.barrier()  # nobody starts before everybody has read
    result = work()
    dist.barrier()
    after = Seen.now()
    dist.barrier()  # nobody goes on
    return result, Seen(*(a.since(b) for a, b in zip(after, before, strict=True)))


def timed(work: Callable[[], object]) -> float:
    """Seconds from the first rank's start of `work` to the last rank's end.

    All hosts are on one machine, whose clock they share. A rank's own seconds would say too
    little: others may have sent already when it comes out of the barrier.
    """
    dist.barrier()
    began = time.monotonic()
    work()
    ended = time.monotonic()
    ends = torch.tensor([-began, ended], dtype=torch.float64)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    return float(ends.sum())


def send_and_receive(rank: int, pairs: Sequence[tuple[int, int]], num_bytes: int) -> None:
    """`num_bytes` from the first to the second rank of each pair, all at once."""
    # Receives first: over gloo a pair of ranks that begin with sends takes turns instead.
    works = [
        dist.irecv(torch.empty(num_bytes, dtype=torch.uint8), source)
        for source, target in pairs
        if target == rank
    ]
    data = torch.zeros(num_bytes, dtype=torch.uint8)
    works += [dist.isend(data, target) for source, target in pairs if source == rank]
    for work in works:
        assert work is not None  # this rank is a member of the group
        work.wait()


def transfer(
    rank: int, world: int, pairs: Sequence[tuple[int, int]], num_bytes: int
) -> tuple[float, Seen]:
    """Seconds of `send_and_receive` on the slowest rank, and what passed this rank's host."""
    send_and_receive(rank, pairs, num_bytes)  # the first one finds windows and buffers small
    return counted(lambda: timed(lambda: send_and_receive(rank, pairs, num_bytes)))


def stay(rank: int, world: int, say: str) -> None:
    """Say something once all ranks are here, and then wait for each other far too long."""
    dist.barrier()
    if rank == 0:
        sys.stdout.write(f"{say}\n")
        sys.stdout.flush()
        time.sleep(1000)
    dist.barrier()
