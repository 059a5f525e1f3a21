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

    guarded(run, group, what, board)


def gather(
    value: T, group: dist.ProcessGroup | None, what: str, *, board: WaitBoard | None = None
) -> list[T]:
    """The `value` of every rank of `group`, in the group's order, on all of them.

    Arguments and errors as of `sum_over`; values must be picklable.
    """
    if group is None:
        return [value]
    gathered: list[Any] = [None] * group.size()
    guarded(lambda: dist.all_gather_object(gathered, value, group=group), group, what, board)
    return gathered


class Pending:
    """A collective that was started; `wait` once. Keeps its tensors until then."""

    def __init__(
        self,
        work: dist.Work | None,
        tensors: tuple[Tensor, ...],
        group: dist.ProcessGroup,
        what: str,
        board: WaitBoard | None,
    ) -> None:
        assert work is not None  # this rank is a member
        self._work, self._tensors = work, tensors
        self._group, self._what, self._board = group, what, board

    def wait(self) -> None:
        """Return when the result is there; on a GPU the stream waits, and this returns at once.

        Raises:
            CommError: a rank of the group is gone or did not answer within the group's limit.
        """
        guarded(self._work.wait, self._group, self._what, self._board)
        self._tensors = ()


def start_reduce_scatter(
    into: Tensor,
    values: Tensor,
    group: dist.ProcessGroup,
    what: str,
    *,
    board: WaitBoard | None = None,
) -> Pending:
    """Start to sum `values` over the group and give rank i the i-th of its equal parts.

    Args:
        into: [n], contiguous; this rank's part of the sum once `Pending.wait` returns.
        values: [group size * n], contiguous; not to be changed until then.
        group, what, board: as of `sum_over`.
    """
    # torch 2.13 renamed it and warns of the older name; 2.11 has only that.
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return _started(
        lambda: reduce_scatter(into, values, group=group, async_op=True),
        (into, values),
        group,
        what,
        board,
    )


def start_all_gather(
    into: Tensor,
    values: Tensor,
    group: dist.ProcessGroup,
    what: str,
    *,
    board: WaitBoard | None = None,
) -> Pending:
    """Start to bring every rank's `values` together, in the order of the group.

    Args:
        into: [group size * n], contiguous; filled once `Pending.wait` returns.
        values: [n], contiguous; not to be changed until then.
        group, what, board: as of `sum_over`.
    """
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return _started(
        lambda: all_gather(into, values, group=group, async_op=True),
        (into, values),
        group,
        what,
        board,
    )


def _started(
    start: Callable[[], dist.Work | None],
    tensors: tuple[Tensor, ...],
    group: dist.ProcessGroup,
    what: str,
    board: WaitBoard | None,
) -> Pending:
    """Start it; a rank that is gone may show already then."""
    started: list[dist.Work | None] = []
    guarded(lambda: started.append(start()), group, what, board)
    return Pending(started[0], tensors, group, what, board)


def guarded(
    run: Callable[[], object], group: dist.ProcessGroup, what: str, board: WaitBoard | None
) -> None:
    """Call `run`, which waits for ranks of the group, with errors and the board as of `sum_over`.

    Raises:
        CommError: for a RuntimeError of the communication library.
    """
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
