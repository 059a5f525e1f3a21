"""Preprocessing: where each token's experts are, and how many records go from rank to rank.

Shapes: T tokens, K experts a token, E experts, P slots, R ranks in n nodes of g, C pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .census import LENGTH, Census
from .grid import NodeGrid
from .host import to_device
from .layout import ExpertLayout
from .pieces import Splits
from .sizes import num_pieces


class SlotTables:
    """Tables from experts to slots, and from slots to where they are, on one device.

    The last entry of each, which index -1 finds, stands for "no expert": it is one past the others.

    Attributes:
        rank_P1: the ep rank of each slot, as its place in the grid's order.
        node_P1, index_P1: the grid's node and in-node index of each slot.
        host_P1: the node that each slot is on, whether the grid minds it or not, from 0 up.
        order_R: the grid's order of ep ranks.

    Args:
        nodes: the node of each ep rank.
    """

    def __init__(
        self, layout: ExpertLayout, grid: NodeGrid, nodes: Sequence[int], device: torch.device
    ) -> None:
        def table(values: Sequence[int], last: int) -> Tensor:
            return to_device([*values, last], device)

        place = {rank: p for p, rank in enumerate(grid.order)}
        places = [place[layout.rank_of(slot)] for slot in range(layout.num_slots)]
        width = grid.ranks_per_node
        self.rank_P1 = table(places, grid.num_ranks)
        self.node_P1 = table([p // width for p in places], grid.num_nodes)
        self.index_P1 = table([p % width for p in places], width)
        hosts = {node: n for n, node in enumerate(dict.fromkeys(nodes))}
        self.num_hosts = len(hosts)
        of_slot = [hosts[nodes[layout.rank_of(slot)]] for slot in range(layout.num_slots)]
        self.host_P1 = table(of_slot, self.num_hosts)
        self.order_R = to_device(grid.order, device)
        self._num_experts = layout.num_experts
        self._simple = layout.is_contiguous
        if not self._simple:
            most = max(map(len, layout.copies))
            padded = [c + (c[0],) * (most - len(c)) for c in layout.copies]
            self._copies_E1 = to_device([*padded, (-1,) * most], device)
            self._num_copies_E1 = table([len(c) for c in layout.copies], 1)

    def slots(self, experts_TK: Tensor, source: int) -> Tensor:
        """The slot of each choice, [T, K] int64: -1 for no expert, or for what is out of range.

        A redundant expert's tokens go to its copies in turn: token t of ep rank `source` to copy
        (t + source) modulo their number.
        """
        legal_TK = (experts_TK >= 0) & (experts_TK < self._num_experts)
        experts_TK = torch.where(legal_TK, experts_TK, -1)
        if self._simple:
            return experts_TK
        turn_T1 = torch.arange(len(experts_TK), device=experts_TK.device).unsqueeze(1) + source
        copy_TK = turn_T1 % self._num_copies_E1[experts_TK]
        return self._copies_E1[experts_TK, copy_TK]


def piece_bounds(num_rows: int, num_pieces: int) -> list[int]:
    """Where pieces of nearly equal length begin, and the end."""
    return [num_rows * c // num_pieces for c in range(num_pieces + 1)]


def count_by_piece(wanted_TG: Tensor, num_pieces: int) -> Tensor:
    """[C, G] int64: records that go from each piece to each rank."""
    bounds = piece_bounds(len(wanted_TG), num_pieces)
    # int32: summed as int64, a mask would first be copied to eight times its size.
    counts = [wanted_TG[a:b].sum(dim=0, dtype=torch.int32) for a, b in pairwise(bounds)]
    return torch.stack(counts).long()


def count_entries(slots_TK: Tensor, num_slots: int) -> Tensor:
    """[P] int64: choices of each slot."""
    flat = torch.where(slots_TK < 0, num_slots, slots_TK).reshape(-1)
    counts = torch.zeros(num_slots + 1, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_slots]


@dataclass(frozen=True)
class Counts:
    """How many records and entries go where, as one rank knows it after the exchange.

    Attributes:
        hops: hops[h][c], the splits of piece c in hop h.
        entries: entries of each of this rank's slots.
        from_source: from_source[c][s], records of piece c that reach this rank from ep rank s.
        ranks: what each ep rank says of itself.
    """

    hops: list[list[Splits]]
    entries: list[int]
    from_source: list[list[int]]
    ranks: list[Census]


class Plan:
    """What ranks tell each other before a dispatch, for a grid of ranks and a number of pieces.

    Each rank sends each other one line of numbers: its census; by piece, the records that it sends
    on the first hop to that rank's node; by piece, the records that are for each rank of that node
    (where there are two hops); and the entries of each of that rank's slots.

    Args:
        grid: the expert group's ranks.
        ep_rank: this rank.
        slots_per_rank: of the layout.
        num_pieces: pieces of a rank's tokens at most.
    """

    def __init__(self, grid: NodeGrid, ep_rank: int, slots_per_rank: int, num_pieces: int) -> None:
        self._grid = grid
        self._index = grid.index_of(ep_rank)
        self._slots_per_rank = slots_per_rank
        self.two_hops = grid.num_nodes > 1 and grid.ranks_per_node > 1
        self.num_pieces = num_pieces if self.two_hops else 1
        # The sources of what arrives, in its order: rails one after another, each node by node.
        self.arrival = [row[i] for i in range(grid.ranks_per_node) for row in grid.rows]
        if not self.two_hops:
            self.arrival = sorted(self.arrival)

    def lines(
        self,
        census: Tensor,
        first_CG: Tensor,
        final_CR: Tensor,
        entries_P: Tensor,
        tables: SlotTables,
    ) -> Tensor:
        """What this rank tells each ep rank: [R, length] int64.

        Args:
            census: of this rank, [LENGTH].
            first_CG: records by piece and destination of the first hop: a node where there are two
                hops, otherwise a rank.
            final_CR: records by piece and final rank, in the grid's order.
            entries_P: entries by slot.
            tables: of this grid.
        """
        grid, pieces = self._grid, self.num_pieces
        width = grid.ranks_per_node
        ranks = grid.num_ranks
        parts = [census.expand(ranks, -1)]
        if self.two_hops:
            parts.append(first_CG.t().repeat_interleave(width, dim=0))
            by_node = final_CR.view(pieces, grid.num_nodes, width).transpose(0, 1)
            parts.append(by_node.reshape(grid.num_nodes, -1).repeat_interleave(width, dim=0))
        else:
            parts.append(final_CR.t())
        lines = torch.cat(parts, dim=1)
        if grid.order != tuple(range(ranks)):
            lines = torch.empty_like(lines).index_copy_(0, tables.order_R, lines)
        return torch.cat([lines, entries_P.view(ranks, -1)], dim=1).contiguous()

    def read(self, told: Tensor, first_CG: Tensor) -> Counts:
        """The counts, from what all ep ranks told this one.

        Args:
            told: [R, length] int64 on the CPU, by source.
            first_CG: this rank's own, on the CPU.
        """
        grid, pieces, width = self._grid, self.num_pieces, self._grid.ranks_per_node
        ranks = [Census.read(line) for line in told[:, :LENGTH].tolist()]
        entries = told[:, -self._slots_per_rank :].sum(dim=0).tolist()
        first_RC = told[:, LENGTH : LENGTH + pieces]
        if self.two_hops:
            begin = LENGTH + pieces
            final_RCg = told[:, begin : begin + pieces * width].view(-1, pieces, width)
            from_source_RC = final_RCg[:, :, self._index]
        else:
            final_RCg, from_source_RC = None, first_RC
        if num_pieces(max(rank.num_tokens for rank in ranks), pieces) < pieces:
            first_RC, first_CG = first_RC.sum(1, keepdim=True), first_CG.sum(0, keepdim=True)
            from_source_RC = from_source_RC.sum(1, keepdim=True)
            final_RCg = None if final_RCg is None else final_RCg.sum(1, keepdim=True)
        if final_RCg is None:
            hops = [_splits(first_CG, first_RC.t())]
        else:
            rails = torch.tensor(grid.rows).t()  # [g, n]
            on_rail_gnCg = final_RCg[rails]
            sent_Cg = on_rail_gnCg[self._index].sum(dim=0)
            received_Cg = on_rail_gnCg[..., self._index].sum(dim=1).t()
            mine = first_RC[rails[self._index]].t()
            hops = [_splits(first_CG, mine), _splits(sent_Cg, received_Cg)]
        return Counts(hops, entries, from_source_RC.t().tolist(), ranks)


def _splits(sent_CG: Tensor, received_CG: Tensor) -> list[Splits]:
    return [
        Splits(sent, received)
        for sent, received in zip(sent_CG.tolist(), received_CG.tolist(), strict=True)
    ]
