"""The engine of flat, dedup and two_hop: a token's row goes once to each place that needs it.

The ranks of an expert group are a grid of n nodes with g ranks each. A token's record crosses once
to each node that has an expert of it, to the rank of the source's in-node index (they share a
rail); from there it goes on to each rank of that node that has one (arXiv 2412.19437, section
3.2.2). Rows come back the same way and are summed wherever they meet: over a rank's experts, then
within the node, then over the nodes. On one node, or with one rank a node, there is one hop.

Shapes: T tokens, K experts a token, D hidden, R ranks, P slots, C pieces, M records, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ...parallel.mesh import Mesh
from . import moves
from .base import Arrived, Dispatcher, Handle, Options
from .buffers import Hold
from .census import UNKNOWN, Declared, check_census, take_census
from .exchange import Peers, Pending
from .expand import Expansion, padded, places
from .grid import NodeGrid
from .host import to_host
from .layout import ExpertLayout
from .moves import Hop, Part, Returning
from .pieces import Piece, wanted
from .route import (
    Counts,
    Plan,
    SlotTables,
    count_by_piece,
    count_entries,
    piece_bounds,
)
from .sizes import slot_bytes


@dataclass(frozen=True)
class Route:
    """What comes to light with the first dispatch only, since indices travel with it.

    Attributes:
        pieces: by hop.
        expansion: from the records that arrived to rows.
    """

    pieces: list[list[Piece]]
    expansion: Expansion


class HopHandle(Handle):
    """The route of one dispatch.

    Attributes:
        amounts: how many records and entries go where.
        first_rows: which tokens the first hop takes where (see `Hops.count`); None after that.
        route: the records' way, once the first dispatch has run.
    """

    def __init__(
        self,
        owner: Hops,
        slots_TK: Tensor,
        counts: list[int],
        amounts: Counts,
        first_rows: Tensor,
    ) -> None:
        super().__init__(owner, slots_TK, counts)
        self.amounts = amounts
        self.first_rows: Tensor | None = first_rows
        self.route: Route | None = None


class Hops(Dispatcher[HopHandle]):
    """Dispatch in two hops, in one, or in none where this rank is alone.

    Args:
        name: what it is called.
        mesh, layout, options: as of `Dispatcher`.
        grid: the expert group's ranks.
        everyone: the expert group; it exchanges the counts, and the records where there is one hop.
        rail, node: the peers of the first and the second hop, where there are two.
        each_choice: every choice of a token is a row of its own, sent by itself.
    """

    def __init__(
        self,
        name: str,
        mesh: Mesh,
        layout: ExpertLayout,
        options: Options,
        *,
        grid: NodeGrid,
        everyone: Peers,
        rail: Peers | None = None,
        node: Peers | None = None,
        each_choice: bool = False,
    ) -> None:
        super().__init__(mesh, layout, options)
        self.name = name
        self._grid = grid
        self._everyone = everyone
        # Where nothing is sent, a token's row need not be there once a choice; sums are the same.
        self._each_choice = each_choice and everyone.size > 1
        self._plan = Plan(grid, self._ep_rank, layout.slots_per_rank, options.chunks)
        self._ep_peers = mesh.shape.ep_peers(mesh.rank)
        if self._plan.two_hops:
            assert rail is not None
            assert node is not None
            self._hops = [self._hop(rail), self._hop(node)]
        else:
            self._hops = [self._hop(everyone)] if everyone.size > 1 else []
        self._tables: dict[torch.device, SlotTables] = {}
        self._slot_dtype = torch.int16 if slot_bytes(layout.num_slots) == 2 else torch.int32

    def _hop(self, peers: Peers) -> Hop:
        ep_rank = {rank: e for e, rank in enumerate(self._ep_peers)}
        ranks = tuple(ep_rank[rank] for rank in peers.ranks)
        return Hop(peers, ranks, self.sent_bytes, self._ep_rank)

    # Preprocess

    def start_preprocess(
        self, experts_TK: Tensor, declared: Declared = UNKNOWN
    ) -> Pending[HopHandle]:
        """See `Dispatcher.start_preprocess`."""
        self._check_experts(experts_TK)
        tables = self._tables_on(experts_TK.device)

        def exchange() -> tuple[Tensor, ...]:
            slots_TK, rows, first_CG, lines = self.count(experts_TK, declared, tables)
            told = self._everyone.tell(lines, "dispatch(F)") if self._hops else lines
            return slots_TK, rows, to_host(first_CG), to_host(told)

        def finish(found: tuple[Tensor, ...]) -> HopHandle:
            slots_TK, rows, first_CG, told = found
            amounts = self._plan.read(told, first_CG)
            check_census(amounts.ranks, self._ep_peers, self.num_experts, self.options.node_limit)
            counts = padded(amounts.entries, self.options.alignment)
            return HopHandle(self, slots_TK, counts, amounts, rows)

        pending = self._start(exchange, experts_TK.device, "dispatch(F)", for_host=True)
        return pending.then(finish)

    def count(
        self, experts_TK: Tensor, declared: Declared, tables: SlotTables
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What preprocessing works out before anything is exchanged.

        Returns:
            slots_TK; where each row goes in the first hop, [T, G] bool or, with each choice a row,
            its rank; how many records that makes, [C, G]; what to tell each rank, [R, length].
        """
        grid, pieces = self._grid, self._plan.num_pieces
        slots_TK = tables.slots(experts_TK, self._ep_rank)
        entries_P = count_entries(slots_TK, self.layout.num_slots)
        if self._each_choice:
            rows = tables.rank_P1[slots_TK].reshape(-1)
            first_CG = final_CR = entries_P.view(grid.num_ranks, -1).sum(dim=1).unsqueeze(0)
        else:
            rows = wanted(tables.rank_P1[slots_TK], grid.num_ranks)
            first_CG = final_CR = count_by_piece(rows, pieces)
            if self._plan.two_hops:
                rows = wanted(tables.node_P1[slots_TK], grid.num_nodes)
                first_CG = count_by_piece(rows, pieces)
        asked = None if self.options.node_limit is None else tables.host_P1
        census = take_census(experts_TK, slots_TK, declared, asked, tables.num_hosts)
        lines = self._plan.lines(census, first_CG, final_CR, entries_P, tables)
        return slots_TK, rows, first_CG, lines

    def _tables_on(self, device: torch.device) -> SlotTables:
        if device not in self._tables:
            self._tables[device] = SlotTables(self.layout, self._grid, self._nodes, device)
        return self._tables[device]

    def first_pieces(self, handle: HopHandle) -> list[Piece]:
        """What the first hop sends, of a handle that has not been dispatched with."""
        rows, splits = handle.first_rows, handle.amounts.hops[0]
        assert rows is not None
        if self._each_choice:
            return [Piece.as_they_are(rows, self._grid.num_ranks, splits[0])]
        cuts = pairwise(piece_bounds(len(rows), len(splits)))
        return [
            Piece.once_each(rows[a:b], a, split) for (a, b), split in zip(cuts, splits, strict=True)
        ]

    # Spread

    def _start_spread(
        self,
        x_TD: Tensor,
        weights_TK: Tensor | None,
        handle: HopHandle,
        operation: str,
        *,
        with_slots: bool,
    ) -> Pending[Arrived]:
        payload, dtype, hidden = self.options.payload, x_TD.dtype, x_TD.shape[1]
        self.sent_bytes.setdefault(operation, [0] * len(self._ep_peers))

        def move() -> Arrived:
            repeat = handle.top_k if self._each_choice else 1
            parts = [Part(values, repeat) for values in payload.encode(x_TD)]
            num_row_parts = len(parts)
            if weights_TK is not None:
                parts.append(self._metadata(weights_TK))
            if with_slots:
                parts.append(self._metadata(handle.slots_TK.to(self._slot_dtype)))
            with self.lane.buffers.hold(x_TD.device) as take:
                arrived = self._send(parts, handle, operation, with_slots, take)
                assert handle.route is not None
                expansion = handle.route.expansion
                rows = [expansion.rows(part) for part in arrived[:num_row_parts]]
                weights_N = None
                if weights_TK is not None:
                    weights_N = expansion.choices(arrived[num_row_parts])
            decoded = payload.decode(rows, hidden, dtype)
            return Arrived(decoded, weights_N, payload.tiles(rows))

        return self._start(move, x_TD.device, operation)

    def _metadata(self, values_TK: Tensor) -> Part:
        """By row of the first hop: a token's, or a choice's."""
        return Part(values_TK.reshape(-1, 1) if self._each_choice else values_TK)

    def _send(
        self, parts: list[Part], handle: HopHandle, operation: str, with_slots: bool, take: Hold
    ) -> list[Tensor]:
        """The parts of the records that reach this rank; the first time, finds the route."""
        pieces: list[list[Piece]] = [] if handle.route is None else handle.route.pieces
        if self._hops:
            if with_slots:
                # Here and not when the counts came: what a GPU works out has to be on this stream.
                pieces = [self.first_pieces(handle)]
            arriving, form = moves.send(self._hops[0], pieces[0], parts, take, operation)
            if len(self._hops) == 2:
                second: list[Piece] = []

                def plan(number: int, start: int, records: Tensor) -> Piece:
                    if not with_slots:
                        return pieces[1][number]
                    slots = form.part(records, len(parts) - 1).long()
                    wants = wanted(self._here(slots), self._grid.ranks_per_node)
                    second.append(Piece.once_each(wants, start, handle.amounts.hops[1][number]))
                    return second[-1]

                splits = handle.amounts.hops[1]
                arriving = moves.forward(self._hops[1], arriving, splits, plan, take, operation)
                if with_slots:
                    pieces.append(second)
            for wait in arriving.waits:
                wait()
            arrived = [form.part(arriving.records_MW, i) for i in range(len(parts))]
        else:
            arrived = [part.values for part in parts]
        if with_slots:
            handle.route = Route(pieces, self._expansion(arrived[-1].long(), handle))
            handle.first_rows = None
        return arrived

    def _here(self, slots_MK: Tensor) -> Tensor:
        """The in-node index of each slot on this node, and one past the last of others."""
        tables = self._tables_on(slots_MK.device)
        mine = self._grid.node_of(self._ep_rank)
        return torch.where(
            tables.node_P1[slots_MK] == mine, tables.index_P1[slots_MK], self._grid.ranks_per_node
        )

    def _expansion(self, slots_MK: Tensor, handle: HopHandle) -> Expansion:
        size = self.layout.slots_per_rank
        local_MK = slots_MK - self._ep_rank * size
        local_MK = torch.where(
            (local_MK >= 0) & (local_MK < size) & (slots_MK >= 0), local_MK, size
        )
        amounts = handle.amounts
        place_M = None
        if self._plan.two_hops:
            place_M = places(amounts.from_source, self._plan.arrival, slots_MK.device)
        return Expansion.of(local_MK, amounts.entries, place_M, self.options.alignment)

    # Gather

    def _start_gather(
        self, rows_ND: Tensor | None, weights_N: Tensor | None, handle: HopHandle, operation: str
    ) -> Pending[tuple[Tensor | None, Tensor | None]]:
        given = rows_ND if rows_ND is not None else weights_N
        assert given is not None
        self.sent_bytes.setdefault(operation, [0] * len(self._ep_peers))

        def move() -> tuple[Tensor | None, Tensor | None]:
            assert handle.route is not None  # moves run in the order of their starts
            parts = self._returning(rows_ND, weights_N, handle, handle.route.expansion)
            if self._hops:
                with self.lane.buffers.hold(given.device) as take:
                    found = moves.bring_back(
                        self._hops, handle.route.pieces, parts, take, operation
                    )
            else:
                found = [part.values_M for part in parts]
            y_TD = found[0] if rows_ND is not None else None
            if weights_N is None:
                return y_TD, None
            return y_TD, found[-1].reshape(handle.num_tokens, handle.top_k)

        return self._start(move, given.device, operation)

    def _returning(
        self,
        rows_ND: Tensor | None,
        weights_N: Tensor | None,
        handle: HopHandle,
        expansion: Expansion,
    ) -> list[Returning]:
        """What each record that reached this rank sends back."""
        parts: list[Returning] = []
        top_k, repeat = (1, handle.top_k) if self._each_choice else (handle.top_k, 1)
        if rows_ND is not None:
            dtype, payload = rows_ND.dtype, self.options.payload
            on_the_way = payload.summed(dtype) if self._hops else dtype
            parts.append(Returning(expansion.sum(rows_ND, on_the_way), dtype, repeat, payload))
        if weights_N is not None:
            parts.append(Returning(expansion.unchoose(weights_N, top_k), weights_N.dtype))
        return parts
