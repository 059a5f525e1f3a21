"""An all-to-all with uneven splits, started and finished apart, with a limit on the wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from math import prod
from typing import Generic, TypeVar

import torch.distributed as dist
from torch import Tensor

from ...parallel.mesh import Mesh
from ..errors import CommError, backend_reason
from ..messages import as_bytes
from ..waiting import name_ranks

T = TypeVar("T")
U = TypeVar("U")


class Pending(Generic[T]):
    """Something started; `finish()`, called once, waits for it and returns the result.

    It keeps the tensors in flight alive, so hold it until then.
    """

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish: Callable[[], T] | None = finish

    def finish(self) -> T:
        """Wait within the limit and return the result.

        Raises:
            CommError: a peer died or the limit expired.
            RuntimeError: it was called before.
        """
        if self._finish is None:
            raise RuntimeError("Pending.finish was called twice: its result is handed out once")
        finish, self._finish = self._finish, None
        return finish()

    def then(self, do: Callable[[T], U]) -> Pending[U]:
        """Pending whose `finish` also does `do` with the result."""
        return Pending(lambda: do(self.finish()))


class ExpertGroup:
    """The ranks that share one set of experts, and all-to-alls among them.

    Args:
        mesh: this rank's mesh; its ep_group carries the transfers.
        timeout_s: limit of a wait, seconds.
    """

    def __init__(self, mesh: Mesh, timeout_s: float) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0 seconds, got {timeout_s!r}")
        if mesh.shape.ep > 1 and mesh.ep_group is None:
            raise ValueError(
                f"this mesh has ep={mesh.shape.ep} but no process groups: make it with Mesh.create"
            )
        self.size = mesh.shape.ep
        self._rank = mesh.rank
        self._others = tuple(r for r in mesh.shape.ep_peers(mesh.rank) if r != mesh.rank)
        self._group = mesh.ep_group
        self._board = mesh.waits
        self._timeout_s = timeout_s

    def start(
        self,
        rows: Tensor,
        send_splits: Sequence[int],
        recv_splits: Sequence[int],
        operation: str,
        *,
        for_host: bool = False,
    ) -> Pending[Tensor]:
        """Start sending `send_splits[p]` rows to each peer p and receiving `recv_splits[p]`.

        CPU tensors are waited for within the limit. CUDA tensors are waited for by the current
        stream, so that the host goes on; the limit there is the process group's own, which its
        watchdog keeps.

        Args:
            rows: [sum(send_splits), ...], grouped by destination, of any dtype.
            send_splits, recv_splits: rows a peer, in ep order.
            operation: what to call it in an error.
            for_host: the host will read the result at once: wait on the host, within the limit.

        Returns:
            Pending [sum(recv_splits), ...], grouped by source. With one rank: `rows` itself.
        """
        if self._group is None:
            return Pending(lambda: rows)
        rows = rows.contiguous()
        received = rows.new_empty((sum(recv_splits), *rows.shape[1:]))
        row_bytes = _row_bytes(rows)
        try:
            # Bytes, because gloo does not know every dtype.
            work = dist.all_to_all_single(
                as_bytes(received),
                as_bytes(rows),
                [n * row_bytes for n in recv_splits],
                [n * row_bytes for n in send_splits],
                group=self._group,
                async_op=True,
            )
        except RuntimeError as error:
            raise self._error(operation, error) from error
        assert work is not None  # this rank is a member of its own group

        def finish() -> Tensor:
            try:
                if rows.is_cuda and not for_host:
                    work.wait()
                else:
                    with self._board.waiting(operation, self._others):
                        work.wait(timedelta(seconds=self._timeout_s))
            except RuntimeError as error:
                raise self._error(operation, error) from error
            return received

        return Pending(finish)

    def _error(self, operation: str, error: RuntimeError) -> CommError:
        return CommError(
            f"rank {self._rank}: {operation} failed while waiting for "
            f"{name_ranks(self._others)}: {backend_reason(error, self._timeout_s)}",
            peers=self._others,
        )


def _row_bytes(rows: Tensor) -> int:
    return prod(rows.shape[1:]) * rows.element_size()
