"""Which rows go where in one hop, and how what comes back is summed.

A hop's rows are cut in pieces of neighbouring rows, so that a piece can be forwarded while the next
one still arrives. All reordering is by gathers through permutations: no atomic additions, so the
order of every sum is fixed and two runs agree bit for bit.

Shapes: B rows of the piece, M records sent of them, G ranks of the hop's group, K slots a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .sums import Bags


@dataclass(frozen=True)
class Splits:
    """Records of one piece by peer, in the order of the hop's group."""

    sent: list[int]
    received: list[int]

    @property
    def num_sent(self) -> int:
        return sum(self.sent)

    @property
    def num_received(self) -> int:
        return sum(self.received)


@dataclass(frozen=True)
class Piece:
    """What is sent of one piece.

    Attributes:
        rows_M: the row of each record sent, of all the hop's rows; by destination, then by row.
        bags: which of the piece's records belong to each of its rows, in order of destination.
        splits: records a peer.
    """

    rows_M: Tensor
    bags: Bags
    splits: Splits

    @classmethod
    def once_each(cls, wanted_BG: Tensor, start: int, splits: Splits) -> Piece:
        """Each row once to each rank that wants it.

        Args:
            wanted_BG: bool, the destinations of each row; splits.num_sent of them are True.
            start: the piece's first row among all the hop's rows.
        """
        num_ranks = wanted_BG.shape[1]
        # By row first; its size is known, or a GPU would have to tell the host.
        flat_M = torch.nonzero_static(wanted_BG.reshape(-1), size=splits.num_sent).view(-1)
        rows_M, rank_M = flat_M // num_ranks, flat_M % num_ranks
        return _by_destination(
            rows_M + start, rank_M, wanted_BG.sum(dim=1, dtype=torch.int32).long(), splits
        )

    @classmethod
    def as_they_are(cls, rank_B: Tensor, num_ranks: int, splits: Splits) -> Piece:
        """Each row to the one rank that it has, or, with rank `num_ranks`, to none."""
        wanted_B = rank_B < num_ranks
        rows_M = torch.nonzero_static(wanted_B, size=splits.num_sent).view(-1)
        return _by_destination(rows_M, rank_B[rows_M], wanted_B.long(), splits)


def _by_destination(rows_M: Tensor, rank_M: Tensor, sizes_B: Tensor, splits: Splits) -> Piece:
    order_M = torch.argsort(rank_M.to(torch.int32), stable=True)
    return Piece(rows_M[order_M], Bags.of(inverse(order_M), sizes_B), splits)


def inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation [n] int64."""
    places = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places)


def wanted(destination_BK: Tensor, num_ranks: int) -> Tensor:
    """[B, G] bool: which of G ranks each row's slots are on.

    Args:
        destination_BK: int64, a rank of 0..G-1, or G for none.
    """
    shape = (len(destination_BK), num_ranks + 1)
    mask = torch.zeros(shape, dtype=torch.bool, device=destination_BK.device)
    return mask.scatter_(1, destination_BK, True)[:, :num_ranks]
