"""How long dispatch and combine take, from bytes, bandwidths and latencies. No torch.

Each rank has two links, both of them used in both directions at once: one to the ranks of its node
(NVLink) and one across nodes (its network card). A hop moves its bytes for as long as its busiest
link needs,

    t = max over ranks, links and directions of bytes / bandwidth,

and its messages travel side by side, so that it waits for one latency L, the larger one of the
links that it uses. Two hops in c chunks overlap, a chunk's second with the next one's first:

    T = sum of L + (sum of t + (c - 1) * max of t) / c

With c = 1 they follow each other; without a limit of c the slower one alone counts. What a larger
number of chunks costs in messages is not part of the model, nor is time of computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .traffic import ACROSS, INSIDE, Matrix, Traffic, across_nodes
from .traffic_sizes import PHASES, RowSizes

if TYPE_CHECKING:
    from .dispatch.grid import NodeGrid

_KEYS = ("inside", "across", "inside_us", "across_us")
# Wide enough for any link, and so narrow that times stay numbers which one can read.
_LEAST_GBPS, _MOST_GBPS, _MOST_US = 1e-6, 1e9, 1e9


@dataclass(frozen=True)
class Links:
    """The two links of a rank.

    Attributes:
        name: what they are called.
        inside_gbps: to the ranks of its node, 1e9 bytes a second in each direction.
        across_gbps: to ranks on other nodes, the same.
        inside_us, across_us: latency of a small message, microseconds.

    Raises:
        ValueError: a bandwidth or a latency that no link has.
    """

    name: str
    inside_gbps: float
    across_gbps: float
    inside_us: float = 0.0
    across_us: float = 0.0

    def __post_init__(self) -> None:
        for key, gbps in (("inside", self.inside_gbps), ("across", self.across_gbps)):
            if not _LEAST_GBPS <= gbps <= _MOST_GBPS:
                raise ValueError(
                    f"{key}={gbps:g} must be a bandwidth from {_LEAST_GBPS:g} to {_MOST_GBPS:g} "
                    "GB/s"
                )
        for key, us in (("inside_us", self.inside_us), ("across_us", self.across_us)):
            if not 0 <= us <= _MOST_US:
                raise ValueError(f"{key}={us:g} must be a latency from 0 to {_MOST_US:g} us")

    @classmethod
    def parse(cls, text: str) -> Links:
        """Links by the name of a preset, or by numbers.

        Args:
            text: "h800", or such as "inside=160,across=50,inside_us=3.33,across_us=3.7";
                latencies that are left out are 0.

        Raises:
            ValueError: neither.
        """
        for preset in PRESETS:
            if preset.name == text:
                return preset
        numbers: dict[str, float] = {}
        for part in text.split(","):
            key, _, value = part.partition("=")
            try:
                if key not in _KEYS or key in numbers:
                    raise ValueError
                numbers[key] = float(value)
            except ValueError:
                known = ", ".join(preset.name for preset in PRESETS)
                raise ValueError(
                    f"{part!r} in {text!r} is not understood; use {known}, or "
                    "inside=GB/s,across=GB/s,inside_us=US,across_us=US, each once"
                ) from None
        if not {"inside", "across"} <= numbers.keys():
            raise ValueError(f"{text!r} needs both inside= and across=, in GB/s")
        return cls(
            text,
            numbers["inside"],
            numbers["across"],
            numbers.get("inside_us", 0.0),
            numbers.get("across_us", 0.0),
        )

    def transfer_ms(self, link: str, num_bytes: float) -> float:
        """Time of so many bytes on the link ACROSS or INSIDE, without latency."""
        gbps = self.across_gbps if link == ACROSS else self.inside_gbps
        return num_bytes / gbps * 1e-6

    def latency_ms(self, link: str) -> float:
        """Latency of the link ACROSS or INSIDE."""
        return (self.across_us if link == ACROSS else self.inside_us) * 1e-3


# Bandwidths: arXiv 2412.19437, section 3.2.2. Latencies: arXiv 2505.09343, table 5, of 64 bytes;
# across nodes that of ranks under different leaf switches (2.8 us under the same one).
PRESETS = (Links("h800", 160.0, 50.0, inside_us=3.33, across_us=3.7),)


@dataclass(frozen=True)
class Load:
    """What one direction of a rank's link carries in a hop.

    Attributes:
        link: ACROSS or INSIDE.
        direction: "sending" or "receiving".
        rank: whose link.
        num_bytes: what it carries.
        ms: how long that takes.
    """

    link: str
    direction: str
    rank: int
    num_bytes: float
    ms: float

    def __str__(self) -> str:
        return f"rank {self.rank} {self.direction} {self.link}"


@dataclass(frozen=True)
class HopCost:
    """What a hop costs.

    Attributes:
        loads: the busiest one of each link and direction in use; empty: nothing is sent.
        latency_ms: L.
    """

    loads: tuple[Load, ...]
    latency_ms: float

    @property
    def transfer_ms(self) -> float:
        """t, the time of the busiest link."""
        return max((load.ms for load in self.loads), default=0.0)


@dataclass(frozen=True)
class Cost:
    """What a communication costs.

    Attributes:
        hops: in the order of its going.
        chunks: c; None: as many as it takes for hops to overlap wholly.
    """

    hops: tuple[HopCost, ...]
    chunks: int | None

    @property
    def latency_ms(self) -> float:
        """Latencies of all hops."""
        return sum(hop.latency_ms for hop in self.hops)

    @property
    def transfer_ms(self) -> float:
        """Time in which bytes move."""
        times = [hop.transfer_ms for hop in self.hops]
        if self.chunks is None:
            return max(times)
        return (sum(times) + (self.chunks - 1) * max(times)) / self.chunks

    @property
    def ms(self) -> float:
        """T, all of it."""
        return self.latency_ms + self.transfer_ms

    @property
    def bound(self) -> Load | None:
        """The busiest link of the slowest hop; None: nothing is sent."""
        loads = [load for hop in self.hops for load in hop.loads]
        return max(loads, key=lambda load: load.ms, default=None)

    @property
    def bound_by(self) -> str:
        """What to make faster first: a link by its rank and direction, or the latency."""
        if self.bound is None:
            return "nothing is sent"
        return "latency" if self.latency_ms > self.transfer_ms else str(self.bound)


def exchange_cost(
    hops: Sequence[Matrix], grid: NodeGrid, links: Links, *, chunks: int | None = None
) -> Cost:
    """What sending these bytes costs.

    Args:
        hops: of each hop the bytes [R, R], row sends, column receives; the diagonal is not sent.
        grid: which ranks share a node.
        links: of each rank.
        chunks: c; None: hops overlap wholly.

    Raises:
        ValueError: chunks below 1.
    """
    if chunks is not None and chunks < 1:
        raise ValueError(f"chunks must be from 1 up, got {chunks}")
    across_RR = across_nodes(grid)
    inside_RR = ~across_RR & ~np.eye(grid.num_ranks, dtype=np.bool_)
    costs: list[HopCost] = []
    for bytes_RR in hops:
        loads: list[Load] = []
        for link, pairs_RR in ((ACROSS, across_RR), (INSIDE, inside_RR)):
            carried_RR = np.where(pairs_RR, bytes_RR, 0)
            for direction, axis in (("sending", 1), ("receiving", 0)):
                carried_R = carried_RR.sum(axis=axis)
                rank = int(carried_R.argmax())
                most = carried_R[rank].item()
                if most:
                    ms = links.transfer_ms(link, most)
                    loads.append(Load(link, direction, rank, most, ms))
        latency = max((links.latency_ms(load.link) for load in loads), default=0.0)
        costs.append(HopCost(tuple(loads), latency))
    return Cost(tuple(costs), chunks)


def phase_cost(
    traffic: Traffic, phase: str, sizes: RowSizes, links: Links, *, chunks: int | None = None
) -> Cost:
    """What one of dispatch(F), combine(F), dispatch(B), combine(B) costs; see `exchange_cost`."""
    hops = traffic.hop_bytes(phase, sizes)
    return exchange_cost(hops, traffic.grid, links, chunks=chunks)


def phase_costs(
    traffic: Traffic, sizes: RowSizes, links: Links, *, chunks: int | None = None
) -> dict[str, Cost]:
    """What each of a layer's communications costs, by the names that `simulate` has for them."""
    return {phase: phase_cost(traffic, phase, sizes, links, chunks=chunks) for phase in PHASES}


def experts_at_same_cost(nodes: int, links: Links) -> float:
    """How many experts a token can have until the links inside its nodes are the slower ones.

    A token crosses once to each of its nodes, and inside them once for each expert (at most: each
    on another rank). Where hops overlap, experts cost nothing until both take as long: at
    nodes * inside / across. For 4 nodes and V3's links that is 12.8, so 12 are free and 13 cost
    1.6 % more; the paper rounds this to 13 (arXiv 2412.19437, section 3.2.2).

    Args:
        nodes: that a token goes to.
        links: of each rank; latencies do not count.
    """
    return nodes * links.inside_gbps / links.across_gbps
