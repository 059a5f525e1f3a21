"""Where a dispatcher's communication runs: in order, beside the caller's work.

On the CPU that is a thread, because something has to forward what arrived at the first hop while
the caller computes. On a GPU it is a stream: all is enqueued at the start and the host goes on.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import CommError
from ..waiting import WaitBoard, name_ranks
from .exchange import Pending

T = TypeVar("T")
Job = tuple[Callable[[], Any], "Future[Any]"]


class Lane:
    """Runs moves one after another.

    Args:
        rank: this global rank, for errors.
        others: the global ranks that moves wait for; without any, a move runs where it is started.
        board: where the caller's wait is announced.
        timeout_s: limit of the host's wait for a GPU, seconds.
    """

    def __init__(
        self, rank: int, others: Sequence[int], board: WaitBoard, timeout_s: float
    ) -> None:
        self._rank = rank
        self._others = tuple(others)
        self._board = board
        self._timeout_s = timeout_s
        self._jobs: queue.SimpleQueue[Job | None] | None = None
        self._stream: torch.cuda.Stream | None = None

    def start(
        self,
        move: Callable[[], T],
        device: torch.device,
        operation: str,
        *,
        for_host: bool = False,
    ) -> Pending[T]:
        """Start `move`, without autograd; moves run in the order of their starts.

        Args:
            move: communicates and reorders tensors on `device`; returns tensors of its own, or
                nested tuples of them.
            operation: what it is, for errors and the wait board.
            for_host: the host will read the result, so `finish` waits on the host for a GPU too.

        Raises:
            CommError: from `finish`; what the move raised, or the limit expired.
        """
        if not self._others:
            with torch.no_grad():
                result = move()
            return Pending(lambda: result)
        if device.type == "cuda":
            return self._start_on_stream(move, device, operation, for_host)
        future: Future[T] = Future()
        self._thread_jobs().put((move, future))

        def finish() -> T:
            with self._board.waiting(operation, self._others):
                return future.result()  # bounded: each wait within a move has its limit

        return Pending(finish)

    def _thread_jobs(self) -> queue.SimpleQueue[Job | None]:
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            name = f"dispatch-{self._rank}"
            threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True).start()
            weakref.finalize(self, self._jobs.put, None)
        return self._jobs

    def _start_on_stream(
        self, move: Callable[[], T], device: torch.device, operation: str, for_host: bool
    ) -> Pending[T]:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        lane, caller = self._stream, torch.cuda.current_stream(device)
        lane.wait_stream(caller)
        with torch.no_grad(), torch.cuda.stream(lane):
            result = move()
            done = torch.cuda.Event()
            done.record(lane)

        def finish() -> T:
            if for_host:
                self._wait_for(done, operation)
            caller = torch.cuda.current_stream(device)
            caller.wait_event(done)
            for tensor in _tensors(result):
                if tensor.is_cuda:
                    tensor.record_stream(caller)
            # What the move read stays alive until here, where its stream is waited for.
            _ = move
            return result

        return Pending(finish)

    def _wait_for(self, done: torch.cuda.Event, operation: str) -> None:
        """Wait on the host for an event on the GPU, within the limit."""
        end = time.monotonic() + self._timeout_s
        with self._board.waiting(operation, self._others):
            while not done.query():
                if time.monotonic() > end:
                    raise CommError(
                        f"rank {self._rank}: {operation} failed while waiting for "
                        f"{name_ranks(self._others)}: no answer within {self._timeout_s:g} s",
                        peers=self._others,
                    )
                time.sleep(20e-6)


def to_host(counts: Tensor) -> Tensor:
    """Counts on the CPU; from a GPU in its stream's order, to be read once that was waited for."""
    if counts.is_cpu:
        return counts
    host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
    return host.copy_(counts, non_blocking=True)


def _tensors(result: object) -> Iterator[Tensor]:
    """The tensors in a result, which may be nested tuples."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple):
        for item in result:
            yield from _tensors(item)


def _work(jobs: queue.SimpleQueue[Job | None]) -> None:
    """Do the jobs that come. After one has failed, all others fail likewise: ranks would differ."""
    failure: BaseException | None = None
    while (job := jobs.get()) is not None:
        move, future = job
        try:
            if failure is not None:
                raise failure
            with torch.no_grad():
                result = move()
        except BaseException as error:
            failure = error
            future.set_exception(error)
        else:
            future.set_result(result)
            del result
        del job, move, future  # or the tensors of the last job would live until the next
