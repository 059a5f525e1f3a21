"""Where a dispatcher's communication runs: in order, beside the caller's work.

On the CPU that is a thread, because something has to forward what arrived at the first hop while
the caller computes. On a GPU it is a stream: all is enqueued at the start and the host goes on.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...parallel.mesh import Mesh
from ..errors import CommError
from ..marks import current_name, mark
from ..waiting import WaitBoard, name_ranks
from .buffers import Buffers
from .exchange import Pending

T = TypeVar("T")
Job = tuple[Callable[[], Any], str, str, "Future[Any]"]  # move, operation, name in profiles

_LAST_MOMENTS_S = 2.0  # for moves that are still under way when the interpreter ends


class Lane:
    """Runs moves one after another.

    Args:
        rank: this global rank, for errors.
        others: the global ranks that moves wait for; without any, a move runs where it is started.
        board: where the caller's wait is announced.

    Attributes:
        sequence: numbers the exchanges of moves, alike on all ranks that make the same moves.
        buffers: memory for messages, used by one move at a time.
    """

    def __init__(self, rank: int, others: Sequence[int], board: WaitBoard) -> None:
        self.sequence = itertools.count()
        self.buffers = Buffers()
        self._rank = rank
        self._others = tuple(others)
        self._board = board
        self._jobs: queue.SimpleQueue[Job | None] | None = None
        self._thread: threading.Thread | None = None
        self._stream: torch.cuda.Stream | None = None
        self._after: torch.cuda.Event | None = None

    @contextmanager
    def after(self, event: torch.cuda.Event | None) -> Iterator[None]:
        """Moves started within wait for `event` alone, not for all that the caller has enqueued.

        What they read must have been enqueued before the event, or be a move's. None changes
        nothing.
        """
        before, self._after = self._after, event
        try:
            yield
        finally:
            self._after = before

    def start(
        self,
        move: Callable[[], T],
        device: torch.device,
        operation: str,
        *,
        timeout_s: float = 300.0,
        for_host: bool = False,
    ) -> Pending[T]:
        """Start `move`, without autograd; moves run in the order of their starts.

        What a move reads must not change until `finish`. A move may itself start others, which run
        at once.

        Args:
            move: communicates and reorders tensors on `device`; returns tensors of its own, or
                nested tuples of them.
            operation: what it is, for errors and the wait board.
            timeout_s: limit of the host's wait for a GPU, seconds. (On the CPU each wait within a
                move has its own; a wait of a GPU's stream has that of the process group.)
            for_host: the host will read the result, so `finish` waits on the host for a GPU too.

        Raises:
            CommError: from `finish`; what the move raised, or the limit expired.
        """
        if not self._others or threading.current_thread() is self._thread:
            return self._run_here(move, device, for_host)
        if device.type == "cuda":
            return self._start_on_stream(move, device, operation, timeout_s if for_host else None)
        future: Future[T] = Future()
        name = current_name() or operation
        self._thread_jobs().put((move, operation, name, future))

        def finish() -> T:
            with self._board.waiting(operation, self._others), mark(f"wait {name}"):
                return future.result()  # bounded: each wait within a move has its limit

        return Pending(finish)

    def _thread_jobs(self) -> queue.SimpleQueue[Job | None]:
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            self._thread = thread = threading.Thread(
                target=_work,
                args=(self._jobs, self._rank),
                name=f"dispatch-{self._rank}",
                daemon=True,
            )
            thread.start()
            weakref.finalize(self, _end, self._jobs, thread)  # at the interpreter's exit, too
        return self._jobs

    def _run_here(self, move: Callable[[], T], device: torch.device, for_host: bool) -> Pending[T]:
        with _outside_autograd():
            result = move()
        done: torch.cuda.Event | None = None
        if for_host and device.type == "cuda":
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(device))

        def finish() -> T:
            if done is not None:
                done.synchronize()  # the device's own work; nobody else's
            return result

        return Pending(finish)

    def _start_on_stream(
        self, move: Callable[[], T], device: torch.device, operation: str, limit_s: float | None
    ) -> Pending[T]:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        name = current_name() or operation
        lane, caller = self._stream, torch.cuda.current_stream(device)
        if self._after is None:
            lane.wait_stream(caller)
        else:
            lane.wait_event(self._after)
        with _outside_autograd(), torch.cuda.stream(lane), mark(name):
            result = move()
            done = torch.cuda.Event()
            done.record(lane)

        def finish() -> T:
            if limit_s is not None:
                with mark(f"wait {name}"):
                    self._wait_for(done, operation, limit_s)
            caller = torch.cuda.current_stream(device)
            caller.wait_event(done)
            for tensor in _tensors(result):
                if tensor.is_cuda:
                    tensor.record_stream(caller)
            # What the move read stays alive until here, where its stream is waited for.
            _ = move
            return result

        return Pending(finish)

    def _wait_for(self, done: torch.cuda.Event, operation: str, limit_s: float) -> None:
        """Wait on the host for an event on the GPU, within the limit."""
        end = time.monotonic() + limit_s
        with self._board.waiting(operation, self._others):
            while not done.query():
                if time.monotonic() > end:
                    raise CommError(
                        f"rank {self._rank}: {operation} failed while waiting for "
                        f"{name_ranks(self._others)}: no answer within {limit_s:g} s",
                        peers=self._others,
                    )
                time.sleep(20e-6)


def lane_of(mesh: Mesh) -> Lane:
    """The lane of all dispatchers over a mesh."""
    if mesh.dispatch_lane is None:
        others = tuple(rank for rank in mesh.shape.ep_peers(mesh.rank) if rank != mesh.rank)
        mesh.dispatch_lane = Lane(mesh.rank, others, mesh.waits)
    return mesh.dispatch_lane


def _tensors(result: object) -> Iterator[Tensor]:
    """The tensors in a result, which may be nested tuples."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple):
        for item in result:
            yield from _tensors(item)


@contextmanager
def _outside_autograd() -> Iterator[None]:
    """Tensors made within are ordinary ones, in whatever mode the caller is."""
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


def _end(jobs: queue.SimpleQueue[Job | None], thread: threading.Thread) -> None:
    """End the thread after the moves it has; one left inside gloo would abort the interpreter."""
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join(_LAST_MOMENTS_S)


def _work(jobs: queue.SimpleQueue[Job | None], rank: int) -> None:
    """Do the jobs that come. After one has failed no other is begun: ranks may be out of step."""
    failure: CommError | None = None
    while (job := jobs.get()) is not None:
        move, operation, name, future = job
        try:
            if failure is not None:
                raise failure.with_traceback(None)
            with _outside_autograd(), mark(name):
                result = move()
        except BaseException as error:
            future.set_exception(error)
            peers = error.peers if isinstance(error, CommError) else ()
            failure = failure or CommError(
                f"rank {rank}: not started, because an earlier {operation} failed: {error}",
                peers=peers,
            )
        else:
            future.set_result(result)
            del result
        del job, move, future  # or the tensors of the last job would live until the next
