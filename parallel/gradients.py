"""Sums gradients over a group of ranks that hold the same parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from ..comm.collectives import sum_over
from ..comm.waiting import WaitBoard

BUCKET_BYTES = 64 << 20  # large enough for full bandwidth, small beside the gradients themselves


def sum_gradients(
    parameters: Sequence[Parameter],
    group: dist.ProcessGroup | None,
    *,
    scale: float = 1.0,
    bucket_bytes: int = BUCKET_BYTES,
    board: WaitBoard | None = None,
) -> None:
    """Replace every `.grad` by its sum over `group`, times `scale`; the same bits on all its ranks.

    Args:
        parameters: the same parameters in the same order on all ranks of the group.
        group: None stands for this rank alone.
        scale: factor, applied after the sum.
        bucket_bytes: gradients travel together in messages of about this size.
        board: where waits are announced.

    A gradient that is None on every rank stays None; where only some have one, the others count as
    zero.

    Raises:
        CommError: a rank of the group is gone or did not answer in time.
    """
    for bucket in _buckets(parameters, bucket_bytes):
        if group is not None:
            _sum_bucket(bucket, group, board)
        if scale != 1.0:
            for parameter in bucket:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)


def _sum_bucket(
    bucket: Sequence[Parameter], group: dist.ProcessGroup, board: WaitBoard | None
) -> None:
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
    have = [float(p.grad is not None) for p in bucket]
    flags = torch.tensor(have, dtype=pieces[0].dtype, device=pieces[0].device)
    flat = torch.cat([*(piece.reshape(-1) for piece in pieces), flags])
    sum_over(flat, group, "a sum of gradients", board=board)
    *sums, flags = flat.split([*(p.numel() for p in bucket), len(bucket)])
    for parameter, total, num_with_grad in zip(bucket, sums, _flags(flags, have), strict=True):
        if num_with_grad:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(total.view_as(parameter))


def _flags(flags: Tensor, have: list[float]) -> list[float]:
    # Reading the sums back would stop a GPU; where all gradients are there, nothing needs deciding.
    return have if all(have) else flags.tolist()


def _buckets(parameters: Sequence[Parameter], limit: int) -> Iterator[list[Parameter]]:
    """Runs of parameters of one dtype and device, of at most `limit` bytes or one parameter."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for alike in kinds.values():
        bucket: list[Parameter] = []
        size = 0
        for parameter in alike:
            size += parameter.numel() * parameter.element_size()
            if bucket and size > limit:
                yield bucket
                bucket, size = [], parameter.numel() * parameter.element_size()
            bucket.append(parameter)
        if bucket:
            yield bucket
