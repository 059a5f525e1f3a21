"""Bandwidths as values, in the terms of nccl-tests. No torch.

For a message of `num_bytes` (all that a rank sends to all ranks, or what is summed) among n ranks:

    seconds   of the slowest rank, the median of several rounds
    algbw     num_bytes / seconds
    busbw     algbw (n - 1) / n for all-to-all, algbw 2 (n - 1) / n for all-reduce

in GB/s of 10^9 bytes. busbw is what the slowest link carries, whatever n is, so it can be held
against the hardware's rate.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Collective = Literal["all_to_all", "all_reduce"]
COLLECTIVES: tuple[Collective, ...] = get_args(Collective)
Where = Literal["node", "pair", "all"]


@dataclass(frozen=True)
class Timing:
    """One collective of one size among one group.

    Attributes:
        collective: which.
        num_ranks: n.
        num_bytes: of the message.
        seconds: of the slowest rank, in the median of the rounds.
    """

    collective: Collective
    num_ranks: int
    num_bytes: int
    seconds: float

    @property
    def algbw(self) -> float:
        """GB/s."""
        return self.num_bytes / self.seconds / 1e9

    @property
    def busbw(self) -> float:
        """GB/s."""
        share = (self.num_ranks - 1) / self.num_ranks
        return self.algbw * share * (2 if self.collective == "all_reduce" else 1)


@dataclass(frozen=True)
class Line:
    """One row of what was measured.

    Attributes:
        where: "node" among the ranks of one, "pair" among those of two, "all" among all.
        nodes: names of one, two, or (of all) none.
        collective, num_ranks, num_bytes, seconds: as of `Timing`.
        algbw, busbw: GB/s.
    """

    where: Where
    nodes: tuple[str, ...]
    collective: str
    num_ranks: int
    num_bytes: int
    seconds: float
    algbw: float
    busbw: float

    @classmethod
    def of(cls, where: Where, nodes: Sequence[str], timing: Timing) -> Line:
        return cls(
            where,
            tuple(nodes),
            timing.collective,
            timing.num_ranks,
            timing.num_bytes,
            timing.seconds,
            timing.algbw,
            timing.busbw,
        )


@dataclass(frozen=True)
class Measured:
    """What was measured, and on what.

    Attributes:
        kind: of the devices: a GPU's name, or the processor's.
        backend: "nccl" or "gloo".
        ranks_per_node: of the node that has most.
        nodes: their names, in order.
        lines: the rows.
        again: of pairs that measured once more, to find out which node of two is slow.
    """

    kind: str
    backend: str
    ranks_per_node: int
    nodes: tuple[str, ...]
    lines: tuple[Line, ...]
    again: tuple[Line, ...] = ()

    @property
    def num_nodes(self) -> int:
        return len(self.nodes)

    def typical(self) -> dict[str, float]:
        """busbw by place, collective and size; of several nodes or pairs the median."""
        found: dict[str, list[float]] = {}
        for line in self.lines:
            found.setdefault(key(line), []).append(line.busbw)
        return {name: statistics.median(values) for name, values in found.items()}


def key(line: Line) -> str:
    """What rows of several nodes have in common, such as "node all_to_all 4194304"."""
    return f"{line.where} {line.collective} {line.num_bytes}"
