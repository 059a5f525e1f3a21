"""Which of the ranks that failed is to blame, and what to say of it."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import NamedTuple

from ...comm.waiting import name_ranks
from .status import FAILED, MISTAKE


class Verdict(NamedTuple):
    """Of a run whose ranks failed.

    Attributes:
        rank: the one at fault.
        message: one line, or "" where that rank has said itself what was wrong.
        status: of the run.
    """

    rank: int
    message: str
    status: int


def verdict(failed: Mapping[int, tuple[int, float]]) -> Verdict:
    """Blames the rank that failed by itself.

    Ranks that failed because another was gone are often found together with it; the rest are ended
    by whoever started them.

    Args:
        failed: by rank: exit status, negative for a signal, and when, seconds.
    """
    first = min(when for _, when in failed.values())
    at_once = {r: status for r, (status, when) in failed.items() if when <= first + 1}
    rank = min(at_once, key=lambda r: (_consequence(at_once[r]), failed[r][1]))
    status = at_once[rank]
    # 30 s after SIGTERM torchrun sends SIGKILL.
    stuck = [r for r, (s, when) in failed.items() if s == -signal.SIGKILL and r not in at_once]
    also = f"; {name_ranks(stuck)} did not answer SIGTERM: stopped, or hung" if stuck else ""
    if status < 0:
        return Verdict(rank, f"rank {rank} {ended_how(status)}{also}", FAILED)
    if status == MISTAKE and not also:
        return Verdict(rank, "", MISTAKE)
    message = f"rank {rank} {ended_how(status)}; what it said is above{also}"
    return Verdict(rank, message, status)


def _consequence(status: int) -> int:
    """How likely a rank ended like this because of another, from 0 up."""
    ended = (signal.SIGTERM, signal.SIGINT)  # as whoever started them ends the others
    if status in (*(-number for number in ended), *(128 + number for number in ended)):
        return 4
    if status == -signal.SIGABRT:
        return 3  # as a communication library may end when a peer is gone
    if status < 0:
        return 0
    return 1 if status == MISTAKE else 2  # a mistake: found by itself


def ended_how(status: int) -> str:
    """An exit status, negative for a signal, in words."""
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
