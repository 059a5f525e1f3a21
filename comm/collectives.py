"""Sums and gathers over a group of ranks, with errors that name who was waited for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from .errors import CommError, backend_reason
from .marks import mark
from .waiting import WaitBoard, name_ranks

T = TypeVar("T")


def sum_over(
    values: Tensor | Sequence[Tensor],
    group: dist.ProcessGroup | None,
    what: str,
    *,
    board: WaitBoard | None = None,
) -> None:
    """Replace `values` by their sums over the ranks of `group`, the same bits on all of them.

    Args:
        values: contiguous tensors of any shapes and dtypes, none of which requires grad; several
            are under way at once.
        group: None stands for this rank alone.
        what: names the sum in an error, such as "the sum of the losses".
        board: where the wait is announced.

    Raises:
        CommError: a rank of the group is gone or did not answer within the group's limit.
    """
    if group is None:
        return
    several = [values] if isinstance(values, Tensor) else values

    def run() -> None:
        works = [dist.all_reduce(value, group=group, async_op=True) for value in several]
        for work in works:
            assert work is not None  # this rank is a member
            work.wait()

    _guarded(run, group, what, board)


def gather(
    value: T, group: dist.ProcessGroup | None, what: str, *, board: WaitBoard | None = None
) -> list[T]:
    """The `value` of every rank of `group`, in the group's order, on all of them.

    Arguments and errors as of `sum_over`; values must be picklable.
    """
    if group is None:
        return [value]
    gathered: list[Any] = [None] * group.size()
    _guarded(lambda: dist.all_gather_object(gathered, value, group=group), group, what, board)
    return gathered


def _guarded(
    run: Callable[[], object], group: dist.ProcessGroup, what: str, board: WaitBoard | None
) -> None:
    me = dist.get_rank()
    others = tuple(r for r in dist.get_process_group_ranks(group) if r != me)
    try:
        with (board or WaitBoard()).waiting(what, others), mark(f"wait {what}"):
            run()
    except RuntimeError as error:
        raise CommError(
            f"rank {me}: waiting for {what} (peers: {name_ranks(others)}): {backend_reason(error)}",
            peers=others,
        ) from error
