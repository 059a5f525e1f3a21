"""Which rank sends how much to which, for any routing: statistics and byte matrices. No torch.

Counted are message rows ("records") of dispatch and combine and their bytes; the row counts that
ranks tell each other beforehand (a few bytes a peer) are left out. What a rank would send to itself
does not travel: it is counted apart.

Shapes: T tokens of all source ranks, K experts a token, R ranks, S expert slots, n nodes.
A *place* is a rank's position in the grid: node * ranks a node + in-node index.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .traffic_sizes import PHASES, RowSizes

if TYPE_CHECKING:
    from .dispatch.grid import NodeGrid
    from .dispatch.layout import ExpertLayout

Ints = npt.NDArray[np.int64]
Matrix = npt.NDArray[Any]  # int64 where counted, float64 where expected (traffic_expected)
Bools = npt.NDArray[np.bool_]

BACKENDS = ("flat", "dedup", "two_hop")
ACROSS, INSIDE, ALL = "across nodes", "inside nodes", "all ranks"


@dataclass(frozen=True, eq=False)
class Hop:
    """One exchange of a dispatch.

    Attributes:
        name: ACROSS, INSIDE, or ALL where ranks of all nodes exchange at once.
        records_RR: [R, R], records that the row's rank hands to the column's; on the diagonal those
            that stay where they are.
    """

    name: str
    records_RR: Matrix


@dataclass(frozen=True, eq=False)
class Traffic:
    """What a backend sends for a routing.

    Attributes:
        backend: one of BACKENDS.
        grid: which ranks share a node.
        hops: in the order in which a dispatch takes them; a combine goes back the other way.
        experts_per_record: weights and slots that go with a record.
        num_slots: expert slots of the layout, on which the size of a slot's index depends.
    """

    backend: str
    grid: NodeGrid
    hops: tuple[Hop, ...]
    experts_per_record: int
    num_slots: int

    def record_bytes(self, phase: str, sizes: RowSizes) -> int:
        """Bytes of one message row.

        Raises:
            ValueError: there is no such phase.
        """
        if phase not in PHASES:
            raise ValueError(f"there is no phase {phase!r}; use one of {', '.join(PHASES)}")
        return sizes.record_bytes(phase, self.experts_per_record, self.num_slots)

    def hop_bytes(self, phase: str, sizes: RowSizes) -> list[Matrix]:
        """Bytes sent in each hop, [R, R] each: row sends, column receives; the diagonal is 0.

        Args:
            phase: "dispatch(F)", "combine(F)", "dispatch(B)" or "combine(B)". Hops come in the
                order in which this one takes them.
            sizes: of the rows.

        Raises:
            ValueError: there is no such phase.
        """
        return [_without_diagonal(bytes_RR) for bytes_RR in self._bytes(phase, sizes)]

    def rank_bytes(self, phase: str, sizes: RowSizes) -> Matrix:
        """Bytes sent in all hops, [R, R]; see `hop_bytes`."""
        return np.sum(self.hop_bytes(phase, sizes), axis=0)

    def local_bytes(self, phase: str, sizes: RowSizes) -> Matrix:
        """Bytes of the records that stay on their rank, [R]: they are not sent.

        A token that stays in both hops is counted in both.
        """
        return np.sum([bytes_RR.diagonal() for bytes_RR in self._bytes(phase, sizes)], axis=0)

    def _bytes(self, phase: str, sizes: RowSizes) -> list[Matrix]:
        record = self.record_bytes(phase, sizes)
        if PHASES[phase].spread:
            return [hop.records_RR * record for hop in self.hops]
        return [hop.records_RR.T * record for hop in reversed(self.hops)]


@dataclass(frozen=True, eq=False)
class Routes:
    """A routing, and the slots that its tokens go to.

    Attributes:
        layout: which expert each slot has.
        grid: which ranks share a node.
        source_T: [T], the rank that a token starts on; tokens come rank by rank.
        token_T: [T], a token's index on that rank.
        slots_TK: [T, K], the slot of each chosen expert; -1 for no expert.
    """

    layout: ExpertLayout
    grid: NodeGrid
    source_T: Ints
    token_T: Ints
    slots_TK: Ints

    @cached_property
    def nodes_per_token(self) -> Ints:
        """[T], distinct nodes that a token's experts are on."""
        return self._first_of_node.sum(axis=1)

    @cached_property
    def ranks_per_token(self) -> Ints:
        """[T], distinct ranks that a token's experts are on."""
        return self._first_of_rank.sum(axis=1)

    @cached_property
    def remote_nodes_per_token(self) -> Ints:
        """[T], distinct nodes that a token must cross to: all but the one that it starts on."""
        home_T = self._source_places // self.grid.ranks_per_node
        away_TK = self._nodes_of_experts != home_T[:, None]
        return (self._first_of_node & away_TK).sum(axis=1)

    @cached_property
    def rows_per_slot(self) -> Ints:
        """[S], rows for each expert slot."""
        chosen = self.slots_TK[self.slots_TK >= 0]
        return np.bincount(chosen, minlength=self.layout.num_slots)

    @property
    def rows_per_rank(self) -> Ints:
        """[R], rows for each rank's experts."""
        return self.rows_per_slot.reshape(self.grid.num_ranks, -1).sum(axis=1)

    def beyond(self, limit: int) -> Ints:
        """The tokens that reach more than `limit` nodes, [X, 2]: source rank and token index."""
        found = np.flatnonzero(self.nodes_per_token > limit)
        return np.stack([self.source_T[found], self.token_T[found]], axis=1)

    def traffic(self, backend: str) -> Traffic:
        """What one of BACKENDS sends.

        flat sends a record for each (token, expert), dedup one for each (token, rank), both
        straight there. two_hop sends one for each (token, node) to the rank of the source's in-node
        index there, and from it one for each (token, rank).

        Raises:
            ValueError: there is no such backend.
        """
        if backend not in BACKENDS:
            raise ValueError(f"there is no traffic of {backend!r}; use one of {BACKENDS}")
        rows = self.grid.ranks_per_node
        if backend == "flat":
            hops = (self._hop(ALL, *self._sends(self._places_of_experts >= 0)),)
        elif backend == "dedup":
            hops = (self._hop(ALL, *self._sends(self._first_of_rank)),)
        else:
            start, goal = self._sends(self._first_of_node)
            across = self._hop(ACROSS, start, goal // rows * rows + start % rows)
            start, goal = self._sends(self._first_of_rank)
            hops = (across, self._hop(INSIDE, goal // rows * rows + start % rows, goal))
        experts = 1 if backend == "flat" else self.slots_TK.shape[1]
        return Traffic(backend, self.grid, hops, experts, self.layout.num_slots)

    def _sends(self, chosen_TK: Bools) -> tuple[Ints, Ints]:
        """Places where each chosen (token, expert) starts and where it ends."""
        return self._source_places[np.nonzero(chosen_TK)[0]], self._places_of_experts[chosen_TK]

    def _hop(self, name: str, start: Ints, goal: Ints) -> Hop:
        ranks = self.grid.num_ranks
        by_place = np.bincount(start * ranks + goal, minlength=ranks * ranks).reshape(ranks, ranks)
        places = places_of(self.grid)
        return Hop(name, by_place[np.ix_(places, places)])

    @cached_property
    def _source_places(self) -> Ints:
        """[T], the places where tokens start."""
        return places_of(self.grid)[self.source_T]

    @cached_property
    def _places_of_experts(self) -> Ints:
        """[T, K] places of a token's experts, ascending; those of no expert, -1, come first."""
        place_of_slot = np.repeat(places_of(self.grid), self.layout.slots_per_rank)
        places_TK = np.where(self.slots_TK < 0, -1, place_of_slot[self.slots_TK])
        places_TK.sort(axis=1)
        return places_TK

    @cached_property
    def _nodes_of_experts(self) -> Ints:
        """[T, K] nodes, in the order of the places."""
        return self._places_of_experts // self.grid.ranks_per_node  # -1 stays -1

    @cached_property
    def _first_of_rank(self) -> Bools:
        """[T, K], marks one place for each rank of a token."""
        return _firsts(self._places_of_experts)

    @cached_property
    def _first_of_node(self) -> Bools:
        """[T, K], marks one place for each node of a token."""
        return _firsts(self._nodes_of_experts)


def route(experts: Iterable[Any], layout: ExpertLayout, grid: NodeGrid) -> Routes:
    """Find the slots that tokens go to.

    Where an expert has several slots, the token with index t of rank r goes to copy (t + r) modulo
    their number, as it does in the dispatchers.

    Args:
        experts: for each rank, [T, K] integers (anything that numpy takes): the experts that its
            tokens chose, -1 for none. T may differ by rank, and be 0.
        layout: which expert each slot has.
        grid: which ranks share a node.

    Raises:
        ValueError: sizes that do not fit together, or an expert that does not exist.
    """
    arrays = [np.asarray(chosen) for chosen in experts]
    if not len(arrays) == layout.num_ranks == grid.num_ranks:
        raise ValueError(
            f"the routing has {len(arrays)} ranks, the layout {layout.num_ranks} and the grid "
            f"{grid.num_ranks}; all three must be of one expert group"
        )
    for rank, chosen in enumerate(arrays):
        _check(rank, chosen, arrays[0], layout.num_experts)
    experts_TK = np.concatenate(arrays).astype(np.int64, copy=False)
    counts = [len(chosen) for chosen in arrays]
    source_T = np.repeat(np.arange(len(arrays)), counts)
    token_T = np.concatenate([np.arange(count) for count in counts])
    slots_TK = _slots(experts_TK, source_T + token_T, layout)
    return Routes(layout, grid, source_T, token_T, slots_TK)


def node_matrix(matrix_RR: Matrix, grid: NodeGrid) -> Matrix:
    """The same node by node, [n, n]; on the diagonal what ranks of a node send each other."""
    order = list(grid.order)
    nodes, ranks = grid.num_nodes, grid.ranks_per_node
    return matrix_RR[np.ix_(order, order)].reshape(nodes, ranks, nodes, ranks).sum(axis=(1, 3))


def across_nodes(grid: NodeGrid) -> Bools:
    """[R, R], whether two ranks are on different nodes."""
    nodes = places_of(grid) // grid.ranks_per_node
    return nodes[:, None] != nodes


def _check(rank: int, chosen: npt.NDArray[Any], first: npt.NDArray[Any], experts: int) -> None:
    if chosen.ndim != 2 or chosen.shape[1] < 1 or chosen.dtype.kind not in "iu":
        raise ValueError(
            f"the routing of rank {rank} must be [T, K] integers with K from 1 up, got "
            f"{list(chosen.shape)} of {chosen.dtype}"
        )
    if chosen.shape[1] != first.shape[1]:
        raise ValueError(
            f"the routing of rank {rank} has {chosen.shape[1]} experts a token, that of rank 0 has "
            f"{first.shape[1]}; fill up with -1, which is no expert"
        )
    if chosen.size and not (chosen.min() >= -1 and chosen.max() < experts):
        raise ValueError(
            f"the routing of rank {rank} holds experts {chosen.min()}..{chosen.max()}, but there "
            f"are {experts}: 0..{experts - 1}, or -1 for none"
        )


def _slots(experts_TK: Ints, turn_T: Ints, layout: ExpertLayout) -> Ints:
    """The slot of each chosen expert; copies take turns."""
    num_E = np.array([len(slots) for slots in layout.copies])
    copies_EC = np.array([slots + (0,) * (num_E.max() - len(slots)) for slots in layout.copies])
    if copies_EC.shape[1] == 1:
        slots_TK = copies_EC[experts_TK, 0]
    else:
        slots_TK = copies_EC[experts_TK, turn_T[:, None] % num_E[experts_TK]]
    return np.where(experts_TK < 0, -1, slots_TK)


def places_of(grid: NodeGrid) -> Ints:
    """[R], the place of each rank."""
    return np.argsort(np.array(grid.order))


def _firsts(sorted_TK: Ints) -> Bools:
    """Marks the first of equal neighbours in each row; -1 is nothing."""
    first_TK = sorted_TK >= 0
    first_TK[:, 1:] &= sorted_TK[:, 1:] != sorted_TK[:, :-1]
    return first_TK


def _without_diagonal(matrix_RR: Matrix) -> Matrix:
    matrix_RR = matrix_RR.copy()
    np.fill_diagonal(matrix_RR, 0)
    return matrix_RR
