"""Sums over a group of ranks, with errors that name who was waited for."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from .errors import CommError, backend_reason
from .waiting import WaitBoard, name_ranks


def sum_over(
    values: Tensor,
    group: dist.ProcessGroup | None,
    what: str,
    *,
    board: WaitBoard | None = None,
) -> None:
    """Replace `values` by its sum over the ranks of `group`, the same bits on all of them.

    Args:
        values: any shape; must not require grad.
        group: None stands for this rank alone.
        what: names the sum in an error, such as "the sum of the losses".
        board: where the wait is announced.

    Raises:
        CommError: a rank of the group is gone or did not answer within the group's limit.
    """
    if group is None:
        return
    me = dist.get_rank()
    others = tuple(r for r in dist.get_process_group_ranks(group) if r != me)
    try:
        with (board or WaitBoard()).waiting(what, others):
            dist.all_reduce(values, group=group)
    except RuntimeError as error:
        reason = backend_reason(error)
        raise CommError(
            f"rank {me}: waiting for {what} (peers: {name_ranks(others)}): {reason}", peers=others
        ) from error
