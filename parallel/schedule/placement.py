"""Where the stages are: which rank runs stage s of micro-batch m."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Placement:
    """Maps (stage, micro-batch) to a rank, and so says which ranks hold which stages.

    Micro-batches that visit the same ranks share a *route*. One route is an ordinary pipeline;
    bidirectional DualPipe has two, and then a stage has replicas, whose gradients are summed.

    Attributes:
        routes: one tuple a route, all different and of one length: the rank of each stage.
        route_of: index of the route that each micro-batch takes.

    Raises:
        ValueError: the routes do not describe a pipeline; the message says where.
    """

    routes: tuple[tuple[int, ...], ...]
    route_of: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.routes or not self.routes[0] or not self.route_of:
            raise ValueError("a placement needs at least one route, one stage and one micro-batch")
        for index, route in enumerate(self.routes):
            if len(route) != len(self.routes[0]):
                raise ValueError(
                    f"route {index} has {len(route)} stages and route 0 has {len(self.routes[0])}; "
                    "every micro-batch passes through all stages"
                )
            if route in self.routes[:index]:
                first = self.routes.index(route)
                raise ValueError(
                    f"routes {first} and {index} are the same; give their micro-batches one route"
                )
        for microbatch, index in enumerate(self.route_of):
            if not 0 <= index < len(self.routes):
                raise ValueError(
                    f"micro-batch {microbatch} takes route {index}, but the routes are "
                    f"0 to {len(self.routes) - 1}"
                )
        for index in sorted(set(range(len(self.routes))) - set(self.route_of)):
            raise ValueError(f"no micro-batch takes route {index}; leave it out")
        ranks = {rank for route in self.routes for rank in route}
        if min(ranks) < 0:
            raise ValueError(f"rank {min(ranks)} in a route; ranks count from 0")
        for expected, rank in enumerate(sorted(ranks)):
            if rank != expected:
                raise ValueError(
                    f"rank {expected} holds no stage, and ranks up to {max(ranks)} are in use"
                )

    @classmethod
    def of(cls, paths: Sequence[tuple[int, ...]]) -> Placement:
        """The placement in which micro-batch m visits the ranks `paths[m]`, stage by stage.

        Routes are numbered in the order in which micro-batches first take them.
        """
        routes = tuple(dict.fromkeys(paths))
        index = {route: i for i, route in enumerate(routes)}
        return cls(routes, tuple(index[path] for path in paths))

    def rank(self, stage: int, microbatch: int) -> int:
        """Rank that runs `stage` on `microbatch`."""
        return self.routes[self.route_of[microbatch]][stage]

    def stages(self, rank: int) -> tuple[int, ...]:
        """Stages that `rank` holds, ascending."""
        return self._stages_by_rank[rank]

    def replicas(self, stage: int) -> tuple[int, ...]:
        """Ranks that hold `stage`, ascending; more than one where gradients are to be summed."""
        return tuple(sorted({route[stage] for route in self.routes}))

    @property
    def num_stages(self) -> int:
        return len(self.routes[0])

    @cached_property
    def num_ranks(self) -> int:
        return 1 + max(rank for route in self.routes for rank in route)

    @property
    def num_microbatches(self) -> int:
        return len(self.route_of)

    @cached_property
    def _stages_by_rank(self) -> tuple[tuple[int, ...], ...]:
        held: list[set[int]] = [set() for _ in range(self.num_ranks)]
        for route in self.routes:
            for stage, rank in enumerate(route):
                held[rank].add(stage)
        return tuple(tuple(sorted(stages)) for stages in held)
