"""A process's place among the ranks of a run, as the environment has it, and how it joins them.

No torch is imported before the ranks join.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from .errors import ToldError
from .settings import ConfigError

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

_NEEDED = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_RETRY_S = 0.2
_READ_S = 2.0  # for the others, on a busy machine, to read who is late
_FEW = 1024  # ranks that may all ask the store that often; more of them ask more seldom
_QUIET_S = 3.0  # of a machine's other ranks, where the first one most likely says the same
_SHOWN = 8  # of the ranks that have not come


class Place(NamedTuple):
    """Where torchrun, or a launcher that sets the same variables, has put this process.

    Attributes:
        rank, world_size: among all processes.
        local_rank, local_world_size: among those of this machine; of one machine if not told.
        master_addr, master_port: where the ranks meet.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> Place:
        """The place that `environ` tells of.

        Raises:
            ConfigError: a variable is missing, is not a number, or does not fit the others.
        """
        missing = [name for name in _NEEDED if not environ.get(name)]
        if missing:
            raise ConfigError(
                f"the environment has RANK, as for one rank of a run, but no {', '.join(missing)}; "
                "start through torchrun, or unset RANK and counterflow starts the ranks itself"
            )

        def number(name: str, default: int, least: int, below: int, why: str = "") -> int:
            text = environ.get(name, str(default))
            if not (text.isascii() and text.isdigit()) or not least <= int(text) < below:
                raise ConfigError(
                    f"the environment's {name}={text!r} is not a whole number from {least} to "
                    f"{below - 1}{why}; start through torchrun, or correct it"
                )
            return int(text)

        world_size = number("WORLD_SIZE", 1, 1, 1 << 31)
        local_size = number("LOCAL_WORLD_SIZE", world_size, 1, world_size + 1, " (WORLD_SIZE)")
        return cls(
            rank=number("RANK", 0, 0, world_size, " (WORLD_SIZE - 1)"),
            world_size=world_size,
            local_rank=number("LOCAL_RANK", 0, 0, local_size, " (LOCAL_WORLD_SIZE - 1)"),
            local_world_size=local_size,
            master_addr=environ["MASTER_ADDR"],
            master_port=number("MASTER_PORT", 0, 1, 1 << 16),
        )


@contextmanager
def joined(place: Place, backend: str, *, timeout_s: float) -> Iterator[None]:
    """torch.distributed's world of all ranks, for the length of a run.

    Args:
        place: this process's.
        backend: of torch.distributed.
        timeout_s: limit of the wait for the others, and later of every collective, seconds.

    Raises:
        CommError: the others have not all come within the limit.
        ToldError: the same, and one of the others says so.
    """
    import torch.distributed as dist

    limit = timedelta(seconds=timeout_s)
    agent_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts = place.rank == 0 and not agent_hosts
    with waiting_to_join(place, timeout_s):
        if not hosts:
            _await_host(place, timeout_s)
        # As torch's env:// makes it, except that the host does not wait for the others here.
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            place.master_addr,
            place.master_port,
            is_master=hosts,
            timeout=limit,
            wait_for_workers=False,
            multi_tenant=hosts,
        )
        # torchrun may start all ranks again after a failure, and its store may be the same.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(  # pyright: ignore[reportPrivateImportUsage]
            f"attempt{attempt}", store
        )
        _await_all(store, place, timeout_s)
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world_size, timeout=limit
        )
    yield
    # Not after an error: a peer may be gone, and taking a group down then waits for it.
    dist.destroy_process_group()


@contextmanager
def waiting_to_join(place: Place, timeout_s: float) -> Iterator[None]:
    """Within this context what torch.distributed raises is told as a wait for the other ranks."""
    from ..comm.errors import CommError, backend_reason

    try:
        yield
    except (CommError, ToldError):
        raise
    except RuntimeError as error:
        raise CommError(_not_joined(place, backend_reason(error, timeout_s))) from error


def _await_host(place: Place, timeout_s: float) -> None:
    """Wait until someone listens where the ranks meet: torch's own wait logs pages of C++ frames.

    Raises:
        CommError: nobody does within the limit.
    """
    from ..comm.errors import CommError

    end = time.monotonic() + timeout_s
    while True:
        left = end - time.monotonic()
        try:
            where = (place.master_addr, place.master_port)
            socket.create_connection(where, timeout=max(left, _RETRY_S)).close()
            return
        except OSError as error:
            if left <= _RETRY_S:
                reason = _late(place, timeout_s, f" ({error.strerror or error})")
                if place.local_rank:  # whoever ends that one ends this one too
                    time.sleep(_QUIET_S)
                raise CommError(_not_joined(place, reason)) from None
        time.sleep(_RETRY_S)


def _await_all(store: Store, place: Place, timeout_s: float) -> None:
    """Wait until every rank has come to the store, so that those which do not can be named.

    Raises:
        CommError: some have not within the limit; of the ranks that have come one raises it.
        ToldError: the others.
    """
    from ..comm.errors import CommError
    from ..comm.waiting import name_ranks

    pause_s = _RETRY_S * max(1.0, place.world_size / _FEW)
    end = time.monotonic() + timeout_s
    store.set(f"joined/{place.rank}", "")
    store.add("joined", 1)
    while store.add("joined", 0) < place.world_size:
        told = store.check(["late"])
        if told or time.monotonic() > end:
            first = store.add("late", 1) == 1
            if first:
                late = [r for r in range(place.world_size) if not store.check([f"joined/{r}"])]
                shown = name_ranks(late[:_SHOWN]) + (", ..." if len(late) > _SHOWN else "")
                store.set("late/ranks", shown)
            shown = store.get("late/ranks").decode()
            # The store may go with this process: let the others read it. And the end of one may end
            # all, so whoever tells it goes first.
            time.sleep(max(_READ_S, 3 * pause_s) * (1 if first else 2))
            message = _not_joined(place, _late(place, timeout_s, f" from {shown}"))
            raise CommError(message) if first else ToldError(message)
        time.sleep(pause_s)


def _late(place: Place, timeout_s: float, what: str) -> str:
    return (
        f"no answer within {timeout_s:g} s{what}; start all {place.world_size} ranks, or raise "
        "the limit (run.timeout_s of a run) if they need longer"
    )


def _not_joined(place: Place, reason: str) -> str:
    others = place.world_size - 1
    return (
        f"rank {place.rank}: waiting for the other {f'{others} ranks' if others > 1 else 'rank'} "
        f"to join at {place.master_addr}:{place.master_port}: {reason}"
    )
