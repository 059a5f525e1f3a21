"""Starts the processes of a run on this machine with torchrun, and sees them end.

torchrun is used as a library, in this process: its signal handlers then are this process's, so
Ctrl-C or SIGTERM here end every rank, and its failures can be told in one line.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from .folder import STOPPED_FILE
from .settings import ConfigError

if TYPE_CHECKING:
    from .life.nodes import Nodes


class PortError(ConfigError):
    """Nothing can listen at a port.

    Attributes:
        port: which.
    """

    def __init__(self, port: int, reason: str) -> None:
        super().__init__(
            f"run.port={port} cannot be used: {reason}; choose another port, or 0 for any free one"
        )
        self.port = port


def start(
    arguments: Sequence[str],
    *,
    nproc: int,
    port: int,
    nodes: Nodes | None = None,
    max_restarts: int = 0,
    folder: Path | None = None,
    grace_s: float = 0.0,
    timeout_s: float = 300.0,
    nothing_to_lose: bool = False,
    on_missing: Callable[[Sequence[int]], None] | None = None,
) -> int:
    """Run `python -m counterflow ARGUMENTS` as `nproc` ranks of this machine and wait for them.

    SIGTERM, SIGUSR1 and SIGUSR2 to this process ask every rank to stop, by one SIGUSR1; SIGINT and
    a second SIGTERM end them all. When a rank is lost, all ranks on all machines are started again,
    `max_restarts` times at most; not after a user's mistake, nor when asked to stop.

    Args:
        arguments: of the command that every rank runs.
        nproc: number of processes on this machine.
        port: where they meet, on node 0; 0 for any free one, on one machine.
        nodes: this machine's place among several, each of which calls this; None: it is alone.
        max_restarts: the same on all machines.
        folder: of the run; rank 0 leaves `stopped.json` there when it has stopped before its time.
        grace_s: what ranks have to stop, seconds; 0: nothing is saved, so signals end all at once.
        timeout_s: how long to wait for other machines, seconds.
        nothing_to_lose: ranks do nothing that is worth saving; a request to stop ends them at once.
        on_missing: is given the node ranks of machines that have not come when the run was to
            begin; on one of those that have.

    Returns:
        The exit status (life.status): DONE; STOPPED, also for a request before there was anything
        to save; of a failed rank its own (FAILED if a signal ended it); FAILED if another machine
        is gone or has not come; 128 + N if signal N to this process ended the ranks where they
        stood.

    Raises:
        PortError: the port is in use or not allowed.
    """
    alone = nodes is None
    if port and (alone or not nodes.node_rank):
        free_port(port)  # without the store's traceback; the store finds a free one by itself
    from torch.distributed.elastic.multiprocessing import SignalException

    from .life.agent import Agent, print_error
    from .life.nodes import Council, NodeError, Nodes
    from .life.status import FAILED, STOPPED

    nodes = Nodes(1, 0, "127.0.0.1") if nodes is None else nodes
    stopped = _Changes(None if folder is None else folder / STOPPED_FILE)
    # What torchrun logs about a failure (a table, its own traceback) hides what the rank said.
    logging.disable(logging.ERROR)
    agent: Agent | None = None
    try:
        with closing(Council(nodes, port, limit_s=timeout_s)) as council:
            agent = Agent(
                [sys.executable, "-u", "-m", "counterflow", *arguments],
                nproc=nproc,
                council=council,
                max_restarts=max_restarts,
                grace_s=grace_s,
                was_stopped=stopped,
                nothing_to_lose=nothing_to_lose,
            )
            with agent.signals(), council.naming_the_lost():
                agent.run()
    except SignalException as error:
        if agent is not None and agent.stopped:
            return STOPPED
        ended_by = agent.ended_by if agent is not None else None
        return 128 + (ended_by or error.sigval)
    except NodeError as error:
        if not error.told:
            print_error(f"node {nodes.node_rank}: {error}")
            if error.missing and on_missing is not None:
                on_missing(error.missing)
        return FAILED
    finally:
        logging.disable(logging.NOTSET)
    return STOPPED if agent.stopped else agent.status


class _Changes:
    """Says whether a file has been written since this was made."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._before = self._stamp()

    def __call__(self) -> bool:
        now = self._stamp()
        return now is not None and now != self._before

    def _stamp(self) -> tuple[int, int] | None:
        try:
            found = None if self._path is None else self._path.stat()
        except OSError:
            return None
        return None if found is None else (found.st_mtime_ns, found.st_ino)


def free_port(port: int) -> int:
    """`port`, or any free one for 0.

    Raises:
        PortError: nothing can listen there.
    """
    with socket.socket() as probe:
        # As the rendezvous does it: a port that a run has just left is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError as error:
            raise PortError(port, error.strerror or str(error)) from None
        return probe.getsockname()[1]


def choose_device(wanted: str, local_world_size: int) -> str:
    """Where this machine's processes compute: each on a GPU of its own, or all on the CPU.

    Args:
        wanted: run.device.
        local_world_size: processes on this machine.

    Returns:
        "cuda" or "cpu".

    Raises:
        ConfigError: cuda is wanted, but this machine has too few GPUs.
    """
    if wanted == "cpu":
        return "cpu"
    count = num_gpus()
    if count >= local_world_size:
        return "cuda"
    if wanted == "cuda":
        raise ConfigError(
            f'run.device is "cuda", but this machine has {count} GPUs for {local_world_size} '
            "processes; use a smaller mesh, or run.device cpu"
        )
    return "cpu"


def num_gpus() -> int:
    """CUDA GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


def set_threads(device: str, nproc: int) -> None:
    """Share this machine's cores among `nproc` ranks to be started, unless OMP_NUM_THREADS does."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, (cores or 1) // nproc) if device == "cpu" else 1
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def die_with_launcher(environ: Mapping[str, str] = os.environ) -> None:
    """On Linux, have the kernel end this rank when torchrun is gone, even if that was killed."""
    if "TORCHELASTIC_RUN_ID" in environ and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
