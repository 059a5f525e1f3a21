"""The machines of a run: how their agents meet, and what they tell each other.

Each machine has one agent, which starts its ranks and sees them end. The agents share a store that
node 0's holds; the ranks meet there too. All agents start their ranks the same number of times: an
attempt is over for all as soon as it is for one, and begins for all together.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from ..torchrun import PortError
from .alarm import Lifeline

_RETRY_S = 0.1
_FEW = 64  # machines that may all look that often; more of them look more seldom
_QUIET_S = 5.0  # of machines that all lose node 0: the end of one may end them
_SHOWN = 8
_LEAVE_S = 10.0  # node 0 holds the store for the others this long at most
_STORE_S = 30.0  # limit of one question to the store


class Nodes(NamedTuple):
    """This machine's place among those of a run.

    Attributes:
        num_nodes, node_rank: the ranks of node 0 come first, and so on.
        master_addr: node 0, as the others reach it.
        run_id: tells this run from another one at the same address.
    """

    num_nodes: int
    node_rank: int
    master_addr: str
    run_id: str = "counterflow"


class NodeError(RuntimeError):
    """Another machine has not come, or is gone.

    Attributes:
        missing: node ranks of machines that have not come when the run was to begin.
        told: whether another machine says the same, so that this one need not.
    """

    def __init__(self, message: str, *, missing: Sequence[int] = (), told: bool = False) -> None:
        super().__init__(message)
        self.missing, self.told = tuple(missing), told


class Report(NamedTuple):
    """What one node tells of an attempt that is over.

    Attributes:
        failed: by rank: exit status, negative for a signal, and when, for comparing.
        asked: whether this node was asked to stop.
        early: and has stopped before there was anything to save.
    """

    failed: dict[int, tuple[int, float]]
    asked: bool
    early: bool = False


class Council:
    """The agents' common store, as one of them uses it.

    Args:
        nodes: this machine's place.
        port: where node 0 listens; 0 for any free one, if it is alone.
        limit_s: how long to wait for the other machines to come, seconds.

    Attributes:
        store: of the ranks too.
        port: where that listens.

    Raises:
        PortError: node 0 cannot listen at the port.
        NodeError: not all machines have come in time, or node 0 is gone or does not answer.
    """

    def __init__(self, nodes: Nodes, port: int, *, limit_s: float) -> None:
        self.nodes, self.port = nodes, port
        self._lifeline: Lifeline | None = None
        if nodes.node_rank:
            self._lifeline = self._reach(limit_s)
        late = "has not come to {where} within {limit:g} s"
        with self.naming_the_lost():
            self.store = self._store()
            self.port = self.store.port
            self._own = dist.PrefixStore(  # pyright: ignore[reportPrivateImportUsage]
                f"agents/{nodes.run_id}", self.store
            )
            self._come("come")
            self._await_all("come", limit_s, late, at_start=True)

    def _store(self) -> dist.TCPStore:  # pyright: ignore[reportPrivateImportUsage]
        first = self.nodes.node_rank == 0
        try:
            return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
                self.nodes.master_addr,
                self.port,
                is_master=first,
                timeout=timedelta(seconds=_STORE_S),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except dist.DistNetworkError as error:
            if not first:
                raise
            # Someone took the port after we looked.
            raise PortError(self.port, str(error).splitlines()[0]) from None

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """Within it, torch's errors of a store that goes during a question become NodeError.

        Raises:
            NodeError: node 0 is gone, and the store with it, or does not answer.
        """
        try:
            yield
        except dist.DistError as error:
            if self._lifeline is None:  # the store is this process's own
                raise
            end = time.monotonic() + _QUIET_S
            while time.monotonic() < end:
                self.check()  # a process that is killed closes one connection after the other
                time.sleep(_RETRY_S)
            raise self._lost(f"gives no answer: {str(error).splitlines()[0]}") from None

    def _lost(self, how: str) -> NodeError:
        if self.nodes.node_rank > 1:  # the store cannot tell whether another one says it
            time.sleep(_QUIET_S)
        return NodeError(f"node 0 ({self.nodes.master_addr}) {how}")

    def check(self) -> None:
        """Raises:
        NodeError: node 0 is gone, and the store with it.
        """
        if self._lifeline is not None and self._lifeline.broken():
            raise self._lost("is gone")

    def end_attempt(self, attempt: int, *, mistake: bool) -> int:
        """Tell all that this attempt is over; how many had told so before."""
        self.check()
        if mistake:
            self._own.set(f"{attempt}/mistake", "")
        return self._own.add(f"{attempt}/over", 1) - 1

    def is_mistake(self, attempt: int) -> bool:
        """Whether an attempt is over because of what starting again cannot mend."""
        return self._own.check([f"{attempt}/mistake"])

    def is_over(self, attempt: int) -> bool:
        """Whether somebody has ended this attempt."""
        self.check()
        return self._own.add(f"{attempt}/over", 0) > 0

    def all_done(self, attempt: int, word: str | None) -> str | None:
        """Tell once, by `word`, that this node's ranks have ended well.

        Returns:
            Node 0's word when all nodes have told so, else None.
        """
        self.check()
        if word is not None:
            self._own.set(f"{attempt}/done/{self.nodes.node_rank}", word)
            self._own.add(f"{attempt}/done", 1)
        if self._own.add(f"{attempt}/done", 0) < self.nodes.num_nodes:
            return None
        return self._own.get(f"{attempt}/done/0").decode()

    def report(self, attempt: int, report: Report) -> None:
        """Tell the others of an attempt that is over."""
        text = json.dumps([list(report.failed.items()), report.asked, report.early])
        self._own.set(f"{attempt}/report/{self.nodes.node_rank}", text)
        self._come(f"{attempt}/reports")

    def reports(self, attempt: int, limit_s: float) -> list[Report]:
        """What every node tells of an attempt that is over.

        Raises:
            NodeError: not all have within the limit.
        """
        self._await_all(f"{attempt}/reports", limit_s, "gave no answer within {limit:g} s")
        keys = [f"{attempt}/report/{node}" for node in range(self.nodes.num_nodes)]
        found: list[Report] = []
        for text in self._own.multi_get(keys):
            failed, asked, early = json.loads(text)
            found.append(Report({r: (status, when) for r, (status, when) in failed}, asked, early))
        return found

    def close(self) -> None:
        """Node 0 lets the others read what they need before its store goes."""
        try:
            self.check()
            self._own.add("left", 1)
            if self.nodes.node_rank == 0:
                end = time.monotonic() + _LEAVE_S
                while self._own.add("left", 0) < self.nodes.num_nodes and time.monotonic() < end:
                    time.sleep(_RETRY_S / 2)
        except (NodeError, RuntimeError):  # gone already
            pass
        if self._lifeline is not None:
            self._lifeline.close()

    def _come(self, key: str) -> None:
        self.check()
        self._own.set(f"{key}/{self.nodes.node_rank}", "")
        self._own.add(key, 1)

    def _await_all(self, key: str, limit_s: float, late: str, *, at_start: bool = False) -> None:
        """Wait until every node has come; the first whose time is up says for all who has not."""
        nodes = self.nodes
        pause_s = _RETRY_S * max(1.0, nodes.num_nodes / _FEW)
        end = time.monotonic() + limit_s
        while self._own.add(key, 0) < nodes.num_nodes:
            if self._own.check([f"{key}/late"]) or time.monotonic() > end:
                first = self._own.add(f"{key}/late", 1) == 1
                missing = self._missing(key) if first else []
                if nodes.node_rank == 0:  # its store goes with it: let the others read there
                    time.sleep(5 * pause_s)
                where = f"{nodes.master_addr}:{self.port}"
                raise NodeError(
                    f"{_name(missing)} {late.format(where=where, limit=limit_s)}",
                    missing=missing if at_start else (),
                    told=not first,
                )
            time.sleep(pause_s)
            self.check()

    def _missing(self, key: str) -> list[int]:
        return [n for n in range(self.nodes.num_nodes) if not self._own.check([f"{key}/{n}"])]

    def _reach(self, limit_s: float) -> Lifeline:
        """Wait until node 0 listens: torch's own wait logs pages of C++ frames."""
        address, end = self.nodes.master_addr, time.monotonic() + limit_s
        while True:
            try:
                return Lifeline(address, self.port)
            except OSError as error:
                if time.monotonic() > end:
                    why = error.strerror or error
                    raise NodeError(
                        f"node 0 cannot be reached at {address}:{self.port} within {limit_s:g} s: "
                        f"{why}",
                        missing=(0,),
                    ) from None
            time.sleep(_RETRY_S)


def _name(nodes: Sequence[int]) -> str:
    listed = ", ".join(map(str, nodes[:_SHOWN])) + (", ..." if len(nodes) > _SHOWN else "")
    return f"node {listed}" if len(nodes) == 1 else f"nodes {listed}"
