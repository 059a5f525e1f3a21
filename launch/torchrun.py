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
from collections.abc import Mapping, Sequence

from ..comm.waiting import name_ranks
from .settings import ConfigError


def start(arguments: Sequence[str], *, nproc: int, port: int) -> int:
    """Run `python -m counterflow ARGUMENTS` as `nproc` ranks and wait for them.

    Args:
        arguments: of the command that every rank runs.
        nproc: number of processes, all on this machine.
        port: where they meet, 0 for any free one.

    Returns:
        The exit status: 0 if every rank ended well, of a failed rank its own (1 if a signal ended
        it), 128 + N if signal N ended this process's waiting.

    Raises:
        ConfigError: the port is in use or not allowed.
    """
    port = free_port(port)
    from torch.distributed import DistNetworkError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    command = [
        "--nnodes=1",
        f"--nproc-per-node={nproc}",
        "--master-addr=127.0.0.1",
        f"--master-port={port}",
        "--monitor-interval=0.2",
        *("-m", "counterflow", *arguments),
    ]
    # What torchrun logs about a failure (a table, its own traceback) hides what the rank said.
    logging.disable(logging.ERROR)
    try:
        torchrun.run(torchrun.parse_args(command))
    except ChildFailedError as error:
        failed = {r: (f.exitcode, float(f.timestamp)) for r, f in error.failures.items()}
        message, status = verdict(failed)
        if message:
            sys.stderr.write(f"counterflow: error: {message}\n")  # in one write
        return status
    except SignalException as error:
        return 128 + error.sigval
    except DistNetworkError as error:  # someone took the port after we looked
        raise ConfigError(f"run.port={port} cannot be used: {str(error).splitlines()[0]}") from None
    finally:
        logging.disable(logging.NOTSET)
    return 0


def free_port(port: int) -> int:
    """`port`, or any free one for 0.

    Raises:
        ConfigError: nothing can listen there.
    """
    with socket.socket() as probe:
        # As the rendezvous does it: a port that a run has just left is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError as error:
            raise ConfigError(
                f"run.port={port} cannot be used: {error.strerror}; choose another port, or 0 for "
                "any free one"
            ) from None
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


def verdict(failed: Mapping[int, tuple[int, float]]) -> tuple[str, int]:
    """What to say of a run whose ranks failed, and its exit status.

    torchrun looks at its ranks five times a second, so those that failed because another was gone
    are often found together with it, by the whole second; the rest it has ended itself.

    Args:
        failed: by rank, in the order found: exit status, negative for a signal, and when, seconds.

    Returns:
        One line, or "" where the rank at fault has said what was wrong; and the exit status.
    """
    first = min(when for _, when in failed.values())
    at_once = {r: status for r, (status, when) in failed.items() if when <= first + 1}
    rank = min(at_once, key=lambda r: _consequence(at_once[r]))
    status = at_once[rank]
    # 30 s after SIGTERM torchrun sends SIGKILL.
    stuck = [r for r, (s, when) in failed.items() if s == -signal.SIGKILL and r not in at_once]
    also = f"; {name_ranks(stuck)} did not answer SIGTERM: stopped, or hung" if stuck else ""
    if status < 0:
        return f"rank {rank} was ended by {signal.Signals(-status).name}{also}", 1
    if status == 2 and not also:
        return "", 2
    return f"rank {rank} ended with exit status {status}; what it said is above{also}", status


def _consequence(status: int) -> int:
    """How likely a rank ended like this because of another, from 0 up."""
    if status in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return 4  # as torchrun ends the others
    if status == -signal.SIGABRT:
        return 3  # as a communication library may end when a peer is gone
    if status < 0:
        return 0
    return 1 if status == 2 else 2  # 2: a mistake that it found itself
