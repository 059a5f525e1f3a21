"""An expert group's ranks as nodes x ranks a node, the shape of a two-hop exchange. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class NodeGrid:
    """The ep ranks of one expert group, by node and in-node index.

    Ranks of one in-node index make a rail: a token crosses to a node on its source's rail.

    Attributes:
        rows: rows[n][i] is the ep rank with in-node index i on the group's n-th node.
    """

    rows: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        sizes = {len(row) for row in self.rows}
        ranks = sorted(rank for row in self.rows for rank in row)
        if len(sizes) != 1 or not ranks or ranks != list(range(len(ranks))):
            raise ValueError(
                "a node grid needs each ep rank once and the same number of ranks on each node, "
                f"got {self.rows}"
            )

    @classmethod
    def of(cls, nodes: Sequence[int]) -> NodeGrid:
        """The grid of an expert group whose ep rank r is on node nodes[r].

        Nodes come in the order of their first rank, and so do the ranks within a node.

        Raises:
            ValueError: nodes hold different numbers of ranks, so that there are no rails.
        """
        on: dict[int, list[int]] = {}
        for rank, node in enumerate(nodes):
            on.setdefault(node, []).append(rank)
        sizes = {node: len(ranks) for node, ranks in on.items()}
        if len(set(sizes.values())) != 1:
            listed = ", ".join(f"{n} on node {node}" for node, n in sizes.items())
            raise ValueError(
                f"the {len(nodes)} ranks of an expert group lie unevenly on their nodes "
                f"({listed}), so a token has no rank of the same index to cross to; use the same "
                "number of ranks on each node, an ep that fits within nodes, or the dispatcher "
                "'dedup'"
            )
        return cls(tuple(map(tuple, on.values())))

    @classmethod
    def one_node(cls, num_ranks: int) -> NodeGrid:
        """All ranks side by side: a single hop."""
        return cls((tuple(range(num_ranks)),))

    @property
    def num_nodes(self) -> int:
        return len(self.rows)

    @property
    def ranks_per_node(self) -> int:
        return len(self.rows[0])

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def order(self) -> tuple[int, ...]:
        """The ep ranks node by node."""
        return tuple(rank for row in self.rows for rank in row)

    def node_of(self, rank: int) -> int:
        """The group's node (a row) that an ep rank is on."""
        for node, row in enumerate(self.rows):
            if rank in row:
                return node
        raise ValueError(f"ep rank {rank} is not in the grid's 0..{self.num_ranks - 1}")

    def index_of(self, rank: int) -> int:
        """An ep rank's index within its node."""
        return self.rows[self.node_of(rank)].index(rank)
