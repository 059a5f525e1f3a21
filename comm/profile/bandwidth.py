"""Bandwidths of collectives, as nccl-tests defines them (its PERFORMANCE.md).

The algorithm's bandwidth is a collective's size over its time, the bus's that times a factor with
which it compares to the links' whatever the collective and the number of ranks. The size is of what
a rank has when it has most: an all-gather's result, a reduce-scatter's input. A trace tells both of
a rank, so it is the larger.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .trace import Exchange

# By collective: what its size is multiplied with, in n ranks.
_ALL_REDUCE = "all_reduce"
_PARTS = ("all_gather", "reduce_scatter", "all_to_all", "gather", "scatter")
_WHOLE = ("broadcast", "reduce", "send", "recv")
# How c10d spells them, once underscores are gone; of two that fit, the first counts.
_SPELLED = (
    ("reducescatter", "reduce_scatter"),
    ("allreduce", _ALL_REDUCE),
    ("allgather", "all_gather"),
    ("alltoall", "all_to_all"),
    ("broadcast", "broadcast"),
    ("barrier", "barrier"),
    ("sendrecv", "send_recv"),
    ("reduce", "reduce"),
    ("gather", "gather"),
    ("scatter", "scatter"),
    ("send", "send"),
    ("recv", "recv"),
)


class Moved(NamedTuple):
    """Bytes of some collectives; None where not all of them tell.

    Attributes:
        algorithm: sizes, as nccl-tests counts them: the larger of input and output.
        bus: the same, each times the factor of its collective.
    """

    algorithm: int | None
    bus: int | None


def collective_of(told: str) -> str:
    """A collective's usual name, such as "all_gather" for "_allgather_base"."""
    plain = told.lower().replace("_", "")
    return next((name for spelled, name in _SPELLED if spelled in plain), told)


def moved(exchanges: Iterable[Exchange | None]) -> Moved:
    """Bytes of collectives; None stands for one of which nothing is told."""
    algorithm: int | None = 0
    bus: float | None = 0
    for exchange in exchanges:
        size = None if exchange is None else _size(exchange)
        factor = None if exchange is None else _factor(exchange)
        algorithm = None if algorithm is None or size is None else algorithm + size
        bus = None if bus is None or size is None or factor is None else bus + size * factor
    return Moved(algorithm or None, round(bus) if bus else None)


def _size(exchange: Exchange) -> int | None:
    sizes = [size for size in (exchange.sent_bytes, exchange.received_bytes) if size is not None]
    return max(sizes, default=None)


def _factor(exchange: Exchange) -> float | None:
    """What nccl-tests multiplies the algorithm's bandwidth with; None if it is not known."""
    collective, ranks = collective_of(exchange.collective), exchange.group_size
    if collective in _WHOLE:
        return 1
    if not ranks:
        return None
    if collective == _ALL_REDUCE:
        return 2 * (ranks - 1) / ranks
    return (ranks - 1) / ranks if collective in _PARTS else None
