"""All-to-alls with uneven splits among a group of ranks, each wait with a limit and a name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CommError, backend_reason
from ..waiting import name_ranks

T = TypeVar("T")
U = TypeVar("U")

_Work = tuple[tuple[int, ...], dist.Work]  # global ranks that it waits for, and what waits
# Away from 0, torch's own tag, with which others may send over the same group.
_FIRST_TAG, _NUM_TAGS = 1 << 16, 1 << 26
_OPERATIONS = ("dispatch(F)", "combine(F)", "combine(B)", "dispatch(B)")  # what tags tell apart


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


class Peers:
    """Ranks that exchange rows of bytes with each other.

    Args:
        group: carries the transfers; None where this rank is alone.
        ranks: the group's global ranks, in its order.
        rank: this global rank.
        timeout_s: limit of a wait, seconds.
        sequence: numbers the exchanges (of `Lane`). Between CPUs each message carries its number
            and operation, so that ranks out of step wait instead of mixing their rows.

    Attributes:
        size: number of ranks.
        ranks: their global ranks, in the group's order.
        others: the global ranks but this one.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        ranks: Sequence[int],
        rank: int,
        timeout_s: float,
        sequence: Iterator[int],
    ) -> None:
        assert group is not None or len(ranks) == 1
        self.size = len(ranks)
        self.ranks = tuple(ranks)
        self.others = tuple(r for r in ranks if r != rank)
        self._group = group
        self._rank = rank
        self._timeout_s = timeout_s
        self._sequence = sequence

    def start(
        self,
        send: Tensor,
        send_splits: Sequence[int],
        receive: Tensor,
        receive_splits: Sequence[int],
        operation: str,
    ) -> Callable[[], None]:
        """Start exchanging rows, each rank with each; the function returned waits for it.

        On the CPU it waits on the host, within the limit. On a GPU the current stream waits and the
        host goes on; the limit there is the process group's, which its watchdog keeps.

        Args:
            send: [sum(send_splits), W] uint8, contiguous, grouped by destination.
            send_splits, receive_splits: rows a peer, in the group's order.
            receive: [sum(receive_splits), W] uint8, contiguous, to be filled grouped by source.
            operation: what to call it in an error.

        Raises:
            CommError: from here or from the wait; a peer died or the limit expired.
        """
        assert send.dtype == receive.dtype == torch.uint8
        assert (len(send), len(receive)) == (sum(send_splits), sum(receive_splits))
        return self._exchange(
            send, send_splits, receive, receive_splits, operation, _OPERATIONS.index(operation)
        )

    def tell(self, lines: Tensor, operation: str) -> Tensor:
        """Tell each rank one line of numbers; waits for theirs.

        Args:
            lines: [size, length] int64, contiguous, one for each rank in the group's order.
            operation: what to call it in an error.

        Returns:
            [size, length], what each rank told this one.
        """
        told, one_each = torch.empty_like(lines), [1] * self.size
        to, by = lines.view(torch.uint8), told.view(torch.uint8)
        self._exchange(to, one_each, by, one_each, operation, len(_OPERATIONS))()
        return told

    def _exchange(
        self,
        send: Tensor,
        send_splits: Sequence[int],
        receive: Tensor,
        receive_splits: Sequence[int],
        operation: str,
        code: int,
    ) -> Callable[[], None]:
        number = next(self._sequence)
        if send.is_cuda:
            with self._naming(self.others, operation):
                works = self._start_collective(send, send_splits, receive, receive_splits)
        else:
            tag = _FIRST_TAG + number % _NUM_TAGS * (len(_OPERATIONS) + 1) + code
            works = self._start_directly(send, send_splits, receive, receive_splits, tag, operation)

        def wait() -> None:
            end = time.monotonic() + self._timeout_s
            for peers, work in works:
                with self._naming(peers, operation):
                    if send.is_cuda:
                        work.wait()
                    else:
                        left_s = max(end - time.monotonic(), 1e-3)  # 0 would mean no limit
                        work.wait(timedelta(seconds=left_s))

        return wait

    def _start_collective(
        self,
        send: Tensor,
        send_splits: Sequence[int],
        receive: Tensor,
        receive_splits: Sequence[int],
    ) -> list[_Work]:
        if self._group is None:
            receive.copy_(send)
            return []
        work = dist.all_to_all_single(
            receive,
            send,
            list(receive_splits),
            list(send_splits),
            group=self._group,
            async_op=True,
        )
        assert work is not None  # this rank is a member of its own group
        return [(self.others, work)]

    def _start_directly(
        self,
        send: Tensor,
        send_splits: Sequence[int],
        receive: Tensor,
        receive_splits: Sequence[int],
        tag: int,
        operation: str,
    ) -> list[_Work]:
        """Every pair by itself, receives before sends.

        Gloo's all-to-all posts its sends first, so that two ranks with much for each other take
        turns instead of using both directions of their link at once.
        """
        outgoing, incoming = send.split(list(send_splits)), receive.split(list(receive_splits))
        here = self.ranks.index(self._rank)
        incoming[here].copy_(outgoing[here])
        # Each rank begins with the one after it, so that not all of them send to the same.
        turn = [(here + step) % self.size for step in range(1, self.size)]
        works: list[_Work] = []
        for start, rows in ((dist.irecv, incoming), (dist.isend, outgoing)):
            for peer in turn:
                if len(rows[peer]):
                    other = self.ranks[peer]
                    with self._naming((other,), operation):  # one known to be gone fails at once
                        work = start(rows[peer], other, group=self._group, tag=tag)
                    assert work is not None  # this rank is a member of its own group
                    works.append(((other,), work))
        return works

    @contextmanager
    def _naming(self, peers: tuple[int, ...], operation: str) -> Iterator[None]:
        """Errors of the backend within name `operation` and `peers`."""
        try:
            yield
        except RuntimeError as error:
            raise CommError(
                f"rank {self._rank}: {operation} failed while waiting for "
                f"{name_ranks(peers)}: {backend_reason(error, self._timeout_s)}",
                peers=peers,
            ) from error
