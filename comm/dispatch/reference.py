"""What dispatch and combine compute, row by row and in one process: for readers, and for tests.

All ranks' tensors are here at once, in lists by ep rank. flat, dedup and two_hop give these bits
exactly: the rows in this order, and sums whose terms are added in this order. Loops over tokens and
choices, nothing clever.

Shapes: R ranks, T tokens of a rank, K choices a token, D hidden, N rows of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...fp8 import dequantize, quantize_tiles
from ...fp8.logfmt import decode_logfmt, encode_logfmt
from .grid import NodeGrid
from .layout import ExpertLayout
from .names import PayloadName
from .payload import LOGFMT_BITS


class Origin(NamedTuple):
    """Which choice of which token a row is of; `source` is the ep rank that has the token."""

    source: int
    token: int
    choice: int


@dataclass(frozen=True)
class Reference:
    """One routing of all ranks of an expert group, and what is moved along it.

    Attributes:
        name: which order of summation.
        layout: which expert stands where.
        grid: the ranks by node; only two_hop minds it.
        experts: experts_TK of each ep rank, int64, -1 for none.
        alignment: rows of each slot are padded to a multiple of this.
        payload: the format of rows on their way.
    """

    name: Literal["flat", "dedup", "two_hop"]
    layout: ExpertLayout
    grid: NodeGrid
    experts: Sequence[Tensor]
    alignment: int = 1
    payload: PayloadName = "exact"

    def slot(self, origin: Origin) -> int:
        """The slot that serves a choice, or -1: an expert's copies serve tokens in turn."""
        expert = int(self.experts[origin.source][origin.token, origin.choice])
        if expert < 0:
            return -1
        copies = self.layout.copies[expert]
        return copies[(origin.token + origin.source) % len(copies)]

    @cached_property
    def origins(self) -> list[list[Origin | None]]:
        """By ep rank, where each of its rows comes from; None for padding.

        Rows are ordered by slot, then source, then token, then choice; each slot ends with padding.
        """
        of_slot: list[list[Origin | None]] = [[] for _ in self.layout.slots]
        for source, experts_TK in enumerate(self.experts):
            for token in range(experts_TK.shape[0]):
                for choice in range(experts_TK.shape[1]):
                    origin = Origin(source, token, choice)
                    if self.slot(origin) >= 0:
                        of_slot[self.slot(origin)].append(origin)
        by_rank: list[list[Origin | None]] = [[] for _ in range(self.layout.num_ranks)]
        for slot, found in enumerate(of_slot):
            padding: list[None] = [None] * (-len(found) % self.alignment)
            by_rank[self.layout.rank_of(slot)] += [*found, *padding]
        return by_rank

    @cached_property
    def counts(self) -> list[list[int]]:
        """By ep rank, the rows of each of its slots, padding included."""
        real = [0] * self.layout.num_slots
        for origins in self.origins:
            for origin in origins:
                if origin is not None:
                    real[self.slot(origin)] += 1
        padded = [-(-n // self.alignment) * self.alignment for n in real]
        size = self.layout.slots_per_rank
        return [padded[i : i + size] for i in range(0, len(padded), size)]

    @cached_property
    def place(self) -> dict[Origin, tuple[int, int]]:
        """The ep rank and the row there of each choice that has an expert."""
        return {
            origin: (rank, n)
            for rank, origins in enumerate(self.origins)
            for n, origin in enumerate(origins)
            if origin is not None
        }

    def spread(self, x: Sequence[Tensor]) -> list[Tensor]:
        """dispatch(F) of rows, and combine(B) of gradients: a token's row at each of its experts.

        Args:
            x: by ep rank, [T, D].

        Returns:
            By ep rank, [N, D] of the same dtype, as it is after travelling in the payload's format
            (which rows that stay where they are go through too); zeros in padding.
        """
        travelled = [self._after_a_spread(x_TD) for x_TD in x]
        found = []
        for origins in self.origins:
            rows_ND = x[0].new_zeros(len(origins), x[0].shape[1])
            for n, origin in enumerate(origins):
                if origin is not None:
                    rows_ND[n] = travelled[origin.source][origin.token]
            found.append(rows_ND)
        return found

    def spread_weights(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The router's weight of each row: by ep rank, [T, K] -> [N]; zeros in padding."""
        found = []
        for origins in self.origins:
            weights_N = weights[0].new_zeros(len(origins))
            for n, origin in enumerate(origins):
                if origin is not None:
                    weights_N[n] = weights[origin.source][origin.token, origin.choice]
            found.append(weights_N)
        return found

    def gather(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """combine(F) of rows, and dispatch(B) of gradients: each token's rows summed.

        Args:
            rows: by ep rank, [N, D].

        Returns:
            By ep rank, [T, D] of the same dtype; zeros for a token without experts.
        """
        found = []
        for source, experts_TK in enumerate(self.experts):
            y_TD = rows[0].new_zeros(len(experts_TK), rows[0].shape[1])
            for token in range(len(experts_TK)):
                y_TD[token] = self._token_sum(rows, source, token)
            found.append(y_TD)
        return found

    def gather_weights(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """dispatch(B) of weights: by ep rank, [N] -> [T, K]; zeros where there is no expert."""
        found = [grads[0].new_zeros(experts_TK.shape) for experts_TK in self.experts]
        for origin, (rank, n) in self.place.items():
            found[origin.source][origin.token, origin.choice] = grads[rank][n]
        return found

    def records(self) -> list[list[int]]:
        """records()[a][b]: records that ep rank a sends to b in a spread, both hops together.

        A gather sends one record back for each, so b sends a as many.
        """
        size = self.layout.num_ranks
        sent = [[0] * size for _ in range(size)]
        for source, experts_TK in enumerate(self.experts):
            for token in range(len(experts_TK)):
                ranks = [rank for rank, _ in self._rows_of(source, token)]
                for a, b in self._ways(source, ranks):
                    sent[a][b] += a != b
        return sent

    def _ways(self, source: int, ranks: list[int]) -> list[tuple[int, int]]:
        """From where to where one token's records go, given the rank of each of its rows."""
        if self.name == "flat":
            return [(source, rank) for rank in ranks]
        if not self._hierarchical:
            return [(source, rank) for rank in sorted(set(ranks))]
        ways = []
        index = self.grid.index_of(source)
        for node in self.grid.rows:
            needed = [rank for rank in node if rank in ranks]
            if needed:
                ways += [(source, node[index])] + [(node[index], rank) for rank in needed]
        return ways

    @property
    def _hierarchical(self) -> bool:
        return self.name == "two_hop" and self.grid.num_nodes > 1 and self.grid.ranks_per_node > 1

    def _rows_of(self, source: int, token: int) -> list[tuple[int, int]]:
        """Rank and row of each choice of a token that has an expert, in order of choice."""
        choices = range(self.experts[source].shape[1])
        origins = [Origin(source, token, choice) for choice in choices]
        return [self.place[origin] for origin in origins if self.slot(origin) >= 0]

    def _after_a_spread(self, x_TD: Tensor) -> Tensor:
        if self.payload == "fp8":
            return dequantize(quantize_tiles(x_TD), x_TD.dtype)
        if self.payload in LOGFMT_BITS:
            return decode_logfmt(encode_logfmt(x_TD, LOGFMT_BITS[self.payload]), x_TD.dtype)
        return x_TD.bfloat16().to(x_TD.dtype) if self.payload == "bf16" else x_TD

    def _token_sum(self, rows: Sequence[Tensor], source: int, token: int) -> Tensor:
        places = self._rows_of(source, token)
        dtype, width = rows[0].dtype, rows[0].shape[1]
        alone = self.layout.num_ranks == 1  # nothing travels then
        travelling = dtype if alone or self.payload == "exact" else torch.bfloat16

        def on_the_way(*terms: Tensor) -> Tensor:
            if self.payload == "logfmt10" and not alone:
                return decode_logfmt(encode_logfmt(_add_up(terms, torch.float32, width), 10))
            return _add_up(terms, travelling, width)

        if self.name == "flat":
            return _add_up([on_the_way(rows[rank][n]) for rank, n in places], dtype, width)
        of_rank = {
            rank: on_the_way(*(rows[rank][n] for other, n in places if other == rank))
            for rank in sorted({rank for rank, _ in places})
        }
        if not self._hierarchical:
            return _add_up(list(of_rank.values()), dtype, width)
        of_node = []
        for node in self.grid.rows:
            terms = [of_rank[rank] for rank in node if rank in of_rank]
            if terms:
                of_node.append(on_the_way(*terms))
        return _add_up(of_node, dtype, width)


def _add_up(terms: Sequence[Tensor], dtype: torch.dtype, width: int) -> Tensor:
    """The sum of [width] tensors, one after another from 0, in float32 at least, rounded once."""
    wide = torch.float32
    for term in terms:
        wide = torch.promote_types(torch.promote_types(wide, term.dtype), dtype)
    total = torch.zeros(width, dtype=wide)
    for term in terms:
        total = total + term.to(wide)
    return total.to(dtype)
