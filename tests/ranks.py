"""A pool of real processes that act as ranks: started once, many cases run in it.

    def case(rank, world, scale):      # module-level, so that it can be sent by name
        t = torch.ones(1); dist.all_reduce(t); return float(t) * scale

    assert ranks.run(case, world=4, scale=2.0) == [8.0] * 4

Each case gets a fresh gloo world of the size asked for. The processes are forked from a server that
has torch and the training imported already, so eight of them cost one import. A case that takes too
long is ended, with its processes; the next case gets new ones.

A pool can stand on the hosts of a `bench.hosts.network`: its ranks then talk through these hosts'
links and loopbacks, and nothing else.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import socket
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from bench.hosts import LINK, Host, enter

_PRELOAD = [
    "torch",
    "torch.distributed",
    "torch._dynamo",  # which a rank's first optimizer would import
    "counterflow.parallel.chunk",
    "counterflow.launch.checkpoint.store",
    "counterflow.launch.trainer",
]


def free_port() -> int:
    """A port to listen at a while later.

    Below those that the kernel gives to whoever asks for any (from 32768), as others do meanwhile,
    and below those of tests/slurm; not of those that tests in another process choose from.
    """
    rng = random.SystemRandom()  # what tests seed is the same in two processes
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    while True:
        port = 10000 + rng.randrange(process, 7000, processes)
        with socket.socket() as s, suppress(OSError):
            s.bind(("", port))
            return port


class RankError(AssertionError):
    """A rank raised; the message carries its traceback. `errors` maps rank -> exception text."""

    def __init__(self, message: str, errors: dict[int, str]) -> None:
        super().__init__(message)
        self.errors = errors


def _serve(connection: Connection, index: int, host: Host | None) -> None:
    os.environ.setdefault("NCCL_HOSTID", f"counterflow-test-{index}")
    if host is not None:
        enter(host.namespace)  # before there is a socket, and a second thread to stay behind
        os.environ["GLOO_SOCKET_IFNAME"] = LINK
    threading.Thread(target=_end_with_pool, daemon=True).start()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        function, rank, world, master, timeout_s, backend, kwargs = task
        try:
            torch.manual_seed(0)
            dist.init_process_group(
                backend,
                init_method=f"tcp://{master}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=timeout_s),
            )
            try:
                answer = (True, function(rank, world, **kwargs))
            finally:
                dist.destroy_process_group()
        except BaseException as error:
            answer = (False, f"{type(error).__name__}: {error}", traceback.format_exc())
        try:
            connection.send(answer)
        except Exception as error:  # an answer that cannot be pickled
            connection.send((False, repr(error), traceback.format_exc()))


def _end_with_pool() -> None:
    """End this process once the pool's is gone, killed perhaps in the middle of a case."""
    owner = mp.parent_process()
    assert owner is not None
    owner.join()
    os._exit(1)


class RankPool:
    """Processes that take cases. Use as a context manager; `close` ends them all.

    Args:
        hosts: the host of each rank, from a network that outlives the pool; None: the ranks share
            this process's network.
    """

    def __init__(self, hosts: Sequence[Host] | None = None) -> None:
        self._hosts = hosts
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)
        self._members: list[tuple[Any, Connection]] = []

    def run(
        self,
        function: Callable[..., Any],
        *,
        world: int,
        timeout_s: float = 120.0,
        backend: str = "gloo",
        **kwargs: Any,
    ) -> list[Any]:
        """Run `function(rank, world, **kwargs)` on `world` ranks; return their results by rank.

        Each process has an NCCL_HOSTID of its own, so that NCCL takes several ranks on one GPU for
        hosts of their own and connects them by sockets instead of refusing them.

        Raises:
            RankError: a rank raised, died, or did not answer within `timeout_s`.
            ValueError: the pool has hosts, but for fewer ranks.
        """
        if self._hosts is not None and world > len(self._hosts):
            raise ValueError(f"{world} ranks, but hosts for {len(self._hosts)} were given")
        while len(self._members) < world:
            here, there = self._context.Pipe()
            index = len(self._members)
            host = None if self._hosts is None else self._hosts[index]
            process = self._context.Process(target=_serve, args=(there, index, host), daemon=True)
            process.start()
            there.close()
            self._members.append((process, here))
        members = self._members[:world]
        master = f"127.0.0.1:{free_port()}"
        if self._hosts is not None:  # the first rank opens the port, on its host
            master = f"{self._hosts[0].address}:{self._hosts[0].call(free_port)}"
        for rank, (_, connection) in enumerate(members):
            connection.send((function, rank, world, master, timeout_s, backend, kwargs))
        answers: dict[int, Any] = {}
        waiting = {connection: rank for rank, (_, connection) in enumerate(members)}
        while waiting:
            ready = wait(list(waiting), timeout=timeout_s)
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answers[rank] = connection.recv()
                except EOFError:
                    answers[rank] = (False, "the process died", "the process died")
        failed = {r: a for r, a in answers.items() if not a[0]}
        if failed or waiting:
            self.close()  # processes in an unknown state are not used again
            errors = {r: a[1] for r, a in failed.items()}
            errors |= dict.fromkeys(waiting.values(), f"no answer within {timeout_s} s")
            text = "\n".join(
                f"rank {r}: {failed[r][2] if r in failed else e}" for r, e in errors.items()
            )
            raise RankError(text, errors)
        return [answers[r][1] for r in range(world)]

    def close(self) -> None:
        for process, connection in self._members:
            connection.close()
            process.kill()
            process.join(10)
        self._members = []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
