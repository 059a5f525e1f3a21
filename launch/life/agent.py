"""The process that starts one machine's ranks and sees them end: torchrun's agent, with our rules.

- A signal to it asks its ranks to stop; they have their time to save.
- A rank that is lost ends all, on every machine. One report says which was at fault.
- All then start again, together, unless that cannot help: a user's mistake, or a request to stop.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.api import WorkerState as State
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from .alarm import board, mark_gone, ring
from .nodes import Council, NodeError, Report
from .status import DONE, FAILED, FINAL, STOPPED
from .stop import ONE_REQUEST_S, hold, let_in
from .verdict import ended_how, verdict

_LOOK_S = 0.2  # between looks at the ranks
_FEW = 256  # machines that may all ask the store at every look; more of them look more seldom
_SETTLE_S = 8.0  # for ranks to say where they stand, once one of them has failed
_SETTLE_OF_RANK_S = 0.003  # more of that for each rank
_MISTAKE_S = 1.0  # the same after a user's mistake: there is nothing to say
_LATER_S = 30.0  # to end after grace_s, before the agent ends ranks
_REPORTS_S = 120.0  # for all machines to tell of an attempt; to end a hung rank takes 40 s


class Agent(LocalElasticAgent):
    """One machine's agent.

    Args:
        command: what every rank runs.
        nproc: ranks on this machine.
        council: of all agents.
        max_restarts: how often all ranks are started again.
        grace_s: what ranks have from a request to stop until they have ended, seconds; 0 ends them
            at once.
        was_stopped: whether rank 0, which has ended well, was stopped before its time.
        nothing_to_lose: a request to stop ends ranks at once, and counts as granted.
    """

    def __init__(
        self,
        command: list[str],
        *,
        nproc: int,
        council: Council,
        max_restarts: int,
        grace_s: float,
        was_stopped: Callable[[], bool],
        nothing_to_lose: bool = False,
    ) -> None:
        nodes = council.nodes
        spec = WorkerSpec(
            role="train",
            local_world_size=nproc,
            rdzv_handler=_Rendezvous(council),
            entrypoint=command[0],
            args=tuple(command[1:]),
            max_restarts=max_restarts,
            monitor_interval=_LOOK_S * max(1.0, nodes.num_nodes / _FEW),
            master_addr=nodes.master_addr,
            master_port=council.port,
        )
        # No log files of torchrun's own.
        logs = DefaultLogsSpecs(log_dir=os.devnull)
        super().__init__(spec, logs, exit_barrier_timeout=10)
        self._council = council
        self._max_restarts = max_restarts
        self._grace_s = grace_s
        self._was_stopped = was_stopped
        self._nothing_to_lose = nothing_to_lose
        self._request: signal.Signals | None = None
        self._sigterm_at: float | None = None
        self._deadline = float("inf")
        self._asked_attempt = -1  # whose ranks have been asked to stop
        self._ended_at: dict[int, float] = {}  # by rank of this attempt
        self._done_told = False
        self.ended_by: signal.Signals | None = None
        self.status = FAILED
        self.stopped = False

    @property
    def attempt(self) -> int:
        """How often the ranks have been started again."""
        return self._max_restarts - self._remaining_restarts

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within this context this agent handles the signals of its process."""
        handled = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
        before = {number: signal.signal(number, self._handle) for number in handled}
        # torch sets handlers of its own for those named here.
        names = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE")
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            let_in()  # what has come since `hold` is heard here
            yield
        except SignalException:
            if self.stopped:
                self._leave()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            if names is None:
                del os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"]
            else:
                os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = names

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.ended_by is not None:  # already ending
            return
        now, name = time.monotonic(), signal.Signals(number)
        again = False
        if name == signal.SIGTERM:
            again = self._sigterm_at is not None and now > self._sigterm_at + ONE_REQUEST_S
            self._sigterm_at = self._sigterm_at or now
        waits = self._grace_s > 0 or (self._nothing_to_lose and self._pcontext is None)
        if self._nothing_to_lose and name != signal.SIGINT and not again:
            self.stopped = not waits
        if name == signal.SIGINT or again or not waits:
            self._end(name)
        if self._request is None:
            self._request, self._deadline = name, now + self._grace_s + _LATER_S

    def _end(self, name: signal.Signals) -> None:
        """End all ranks at once, with the signal where they hear it so."""
        self.ended_by = name
        # Ranks with nothing to lose have no handler of their own: SIGINT would give tracebacks.
        silent = self._nothing_to_lose or (name == signal.SIGTERM and not self._grace_s)
        hand_on = signal.SIGTERM if silent else signal.SIGINT
        raise SignalException(f"ended by {name.name}", hand_on)

    def _leave(self) -> None:
        """Tell the other machines that the run was stopped before there was anything to save."""
        with suppress(NodeError, RuntimeError):
            self._council.end_attempt(self.attempt, mistake=True)
            self._council.report(self.attempt, Report({}, asked=True, early=True))

    # torch's decorator hides the types of these from a checker.
    def _start_workers(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, worker_group: WorkerGroup
    ) -> dict[int, Any]:
        if self._request is not None and self._pcontext is None:  # asked before the first start
            self.stopped = True
            self._end(self._request)
        self._ended_at.clear()
        self._done_told = False
        # A rank that is not ready yet keeps them until it is.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        hold()
        try:
            return super()._start_workers(worker_group)  # pyright: ignore[reportCallIssue]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _monitor_workers(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, worker_group: WorkerGroup
    ) -> RunResult:
        """One look at the ranks; all machines come to the same end of an attempt."""
        self._pass_request_on(worker_group)
        alive = _alive(worker_group)  # first: else a rank may fail after it was looked at
        found = self._failures(worker_group)
        if found or self._council.is_over(self.attempt):
            return self._over(worker_group, found)
        # torch's look, on finding a lost rank, would end the others before they can say where they
        # stand: it is for when none is left.
        if alive:
            return RunResult(State.HEALTHY)
        result = self._look(worker_group)
        assert result.state != State.FAILED, "a rank that failed was found above"
        if result.state == State.SUCCEEDED:
            word = None if self._done_told else "stopped" if self._was_stopped() else "done"
            self._done_told = True
            told = self._council.all_done(self.attempt, word)
            if told is None:
                return RunResult(State.HEALTHY)
            self.status, self.stopped = DONE, told == "stopped"
        return result

    def _look(self, worker_group: WorkerGroup) -> RunResult:
        """torch's own look; where a rank has failed, it ends the others, at last by SIGKILL."""
        return super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]

    def _pass_request_on(self, worker_group: WorkerGroup) -> None:
        if self._request is None:
            return
        if time.monotonic() > self._deadline:
            self._end(self._request)
        if self._asked_attempt < self.attempt:
            self._asked_attempt = self.attempt
            _send(signal.SIGUSR1, worker_group)

    def _failures(self, worker_group: WorkerGroup) -> dict[int, int]:
        """Exit statuses, negative for a signal, of the ranks that have failed so far."""
        found: dict[int, int] = {}
        for worker in worker_group.workers:
            status = _ended(worker.id)
            if status:
                found[worker.global_rank] = status
                self._ended_at.setdefault(worker.global_rank, time.monotonic())
        return found

    def _over(self, worker_group: WorkerGroup, found: dict[int, int]) -> RunResult:
        """This attempt has failed, here or on another machine: end it, and decide how to go on."""
        attempt = self.attempt
        began = time.monotonic()
        final = any(status in FINAL for status in found.values())
        order = self._council.end_attempt(attempt, mistake=final)
        # A machine that finds a failure only after it has heard of another's is less to blame.
        behind = 0.01 * order + (0.0 if found else 0.5)
        self._settle(worker_group, found)
        result = self._look(worker_group)  # ends what is left
        statuses = {rank: failure.exitcode for rank, failure in result.failures.items()}
        now = time.monotonic()
        first = min(self._ended_at.values(), default=began)
        failed = {
            rank: (status, behind + self._ended_at.get(rank, now) - first)
            for rank, status in statuses.items()
        }
        self._council.report(attempt, Report(failed, self._request is not None))
        reports = self._council.reports(attempt, _REPORTS_S)
        self._decide(reports, {worker.global_rank for worker in worker_group.workers})
        return RunResult(State.FAILED, failures=result.failures)

    def _settle(self, worker_group: WorkerGroup, found: dict[int, int]) -> None:
        """Let the other ranks say where they stand, then end those which have not ended."""
        mistake = self._council.is_mistake(self.attempt)
        if found and not mistake:
            alarms = board(self._council.store, self.attempt)
            for rank, status in found.items():
                mark_gone(alarms, rank, ended_how(status))
            rank, status = next(iter(found.items()))
            ring(alarms, f"rank {rank} {ended_how(status)}")
        num_ranks = self._council.nodes.num_nodes * len(worker_group.workers)
        settle_s = _SETTLE_S + _SETTLE_OF_RANK_S * num_ranks
        end = time.monotonic() + (_MISTAKE_S if mistake else settle_s)
        while time.monotonic() < end and _alive(worker_group):
            time.sleep(_LOOK_S / 4)
            self._failures(worker_group)
        _send(signal.SIGINT, worker_group)
        while time.monotonic() < end + 1 and _alive(worker_group):
            time.sleep(_LOOK_S / 4)
            self._failures(worker_group)

    def _decide(self, reports: list[Report], own: set[int]) -> None:
        """Say what failed, on the machine where it did; no restart where that cannot help."""
        if any(report.early for report in reports):
            self._remaining_restarts, self.status = 0, STOPPED
            return
        failed = {r: told for report in reports for r, told in report.failed.items()}
        if not failed:  # nobody's ranks failed: they ended well when told to end
            self._remaining_restarts, self.status = 0, FAILED
            return
        rank, message, status = verdict(failed)
        asked = any(report.asked for report in reports)
        again = self._remaining_restarts > 0 and status not in FINAL and not asked
        if not again:
            self.status = status
        if rank in own and message:
            print_error(message + self._and_now(again, status, asked))
        if not again:
            self._remaining_restarts = 0

    def _and_now(self, again: bool, status: int, asked: bool) -> str:
        if again:
            number = f"restart {self.attempt + 1} of {self._max_restarts}"
            return f"; starting again from the last checkpoint, {number}"
        if asked:
            return "; not started again, because the run was asked to stop"
        if self._max_restarts and status not in FINAL:
            times = "once" if self._max_restarts == 1 else f"{self._max_restarts} times"
            return f"; started again {times} before, so the run ends"
        return ""


class _Rendezvous(RendezvousHandler):
    """The machines have met already: gives their order as it is."""

    def __init__(self, council: Council) -> None:
        self._council = council

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return "council"

    def next_rendezvous(self) -> RendezvousInfo:
        council, nodes = self._council, self._council.nodes
        where = RendezvousStoreInfo(nodes.master_addr, council.port)
        return RendezvousInfo(council.store, nodes.node_rank, nodes.num_nodes, where)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._council.nodes.run_id

    def shutdown(self) -> bool:
        return True


def print_error(message: str) -> None:
    """One line on stderr, in one write."""
    sys.stderr.write(f"counterflow: error: {message}\n")


def _ended(pid: int) -> int | None:
    """Exit status of a child that has ended, negative for a signal; it is left for torch to reap.

    None while it runs, 0 where torch has reaped it, which it does only to those that ended well.
    """
    try:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _alive(worker_group: WorkerGroup) -> bool:
    return any(_ended(worker.id) is None for worker in worker_group.workers)


def _send(number: signal.Signals, worker_group: WorkerGroup) -> None:
    for worker in worker_group.workers:
        if _ended(worker.id) is None:  # so its process id is nobody else's
            os.kill(worker.id, number)
