"""Records on their way: packed, sent, forwarded, and on the way back summed where they meet.

Shapes: M records of W bytes; a hop's rows are what its records are copies of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .buffers import Hold
from .exchange import Peers
from .payload import Payload
from .pieces import Piece, Splits
from .record import RecordFormat

_UnderWay = tuple[Callable[[], None], Tensor]  # a wait, and where the records then are


@dataclass(frozen=True)
class Part:
    """One part of every record: row r of the first hop has values[r // repeat].

    Attributes:
        values: [rows / repeat, columns].
        repeat: how many neighbouring rows share their values.
    """

    values: Tensor
    repeat: int = 1


@dataclass(frozen=True)
class Hop:
    """One exchange of the way.

    Attributes:
        peers: who takes part.
        ep_ranks: their ep ranks, in the group's order.
        sent_bytes: counts what goes to each ep rank, by operation; this rank's own is left out.
        ep_rank: this rank.
    """

    peers: Peers
    ep_ranks: tuple[int, ...]
    sent_bytes: dict[str, list[int]]
    ep_rank: int

    def start(
        self, send: Tensor, receive: Tensor, splits: Splits, operation: str
    ) -> Callable[[], None]:
        """Start sending records [num_sent, W] and receiving [num_received, W]; returns the wait."""
        for rank, count in zip(self.ep_ranks, splits.sent, strict=True):
            if rank != self.ep_rank:
                self.sent_bytes[operation][rank] += count * send.shape[1]
        return self.peers.start(send, splits.sent, receive, splits.received, operation)


@dataclass(frozen=True)
class Arriving:
    """Records under way to this rank.

    Attributes:
        records_MW: where they come to lie, piece after piece.
        waits: one for each piece.
        splits: of each piece.
    """

    records_MW: Tensor
    waits: list[Callable[[], None]]
    splits: list[Splits]

    @property
    def slices(self) -> list[slice]:
        """Where each piece lies in records_MW."""
        ends = accumulate(split.num_received for split in self.splits)
        return [slice(a, b) for a, b in pairwise([0, *ends])]


def send(
    hop: Hop, pieces: Sequence[Piece], parts: Sequence[Part], take: Hold, operation: str
) -> tuple[Arriving, RecordFormat]:
    """Start the first hop of records made of `parts`."""
    form = RecordFormat.of([part.values for part in parts])

    def pack(piece: Piece) -> Tensor:
        packed = take(piece.splits.num_sent, form.width)
        for i, part in enumerate(parts):
            rows_M = piece.rows_M if part.repeat == 1 else piece.rows_M // part.repeat
            torch.index_select(part.values, 0, rows_M, out=form.part(packed, i))
        return packed

    splits = [piece.splits for piece in pieces]
    arriving = Arriving(take(sum(s.num_received for s in splits), form.width), [], splits)
    for piece, where in zip(pieces, arriving.slices, strict=True):
        packed, into = pack(piece), arriving.records_MW[where]
        wait = hop.start(packed, into, piece.splits, operation)
        arriving.waits.append(_giving_back(packed, wait, take))
    return arriving, form


def forward(
    hop: Hop,
    arriving: Arriving,
    splits: Sequence[Splits],
    plan: Callable[[int, int, Tensor], Piece],
    take: Hold,
    operation: str,
) -> Arriving:
    """Start the next hop: each piece as soon as it is here, while the next one still arrives.

    Args:
        splits: of the next hop, by piece.
        plan: (number of the piece, its first record, its records) -> what to send on.
    """
    width = arriving.records_MW.shape[1]
    onward = Arriving(take(sum(s.num_received for s in splits), width), [], list(splits))
    for number, (here, there) in enumerate(zip(arriving.slices, onward.slices, strict=True)):
        arriving.waits[number]()
        piece = plan(number, here.start, arriving.records_MW[here])
        packed = take(piece.splits.num_sent, width)
        torch.index_select(arriving.records_MW, 0, piece.rows_M, out=packed)
        wait = hop.start(packed, onward.records_MW[there], piece.splits, operation)
        onward.waits.append(_giving_back(packed, wait, take))
    take.give_back(arriving.records_MW)
    return onward


def _giving_back(packed: Tensor, wait: Callable[[], None], take: Hold) -> Callable[[], None]:
    """`wait`, after which what was sent from `packed` is gone."""

    def finish() -> None:
        wait()
        take.give_back(packed)

    return finish


@dataclass(frozen=True)
class Returning:
    """One part of what goes back.

    Attributes:
        values_M: [M, columns], of each record that reached this rank.
        dtype: of the sums at the end.
        repeat: how many neighbouring rows of the first hop are one sum at the end.
        payload: how values_M and their sums travel; the default is as they are.
    """

    values_M: Tensor
    dtype: torch.dtype
    repeat: int = 1
    payload: Payload = field(default_factory=Payload)

    def encode(self, values: Tensor) -> list[Tensor]:
        """Some of the values as what is sent of them."""
        return self.payload.encode_sums(values)

    def decode(self, sent: list[Tensor]) -> Tensor:
        """Those values again."""
        return self.payload.decode_sums(sent, self.values_M.shape[1])

    def sum(self, piece: Piece, back: Tensor, *, at_the_end: bool) -> Tensor:
        """The sums by row of a piece, from what came `back` of this part."""
        if at_the_end:
            return piece.bags.every(self.repeat).sum(back, self.dtype)
        return piece.bags.sum(back, self.values_M.dtype)


def bring_back(
    hops: Sequence[Hop],
    pieces: Sequence[Sequence[Piece]],
    parts: Sequence[Returning],
    take: Hold,
    operation: str,
) -> list[Tensor]:
    """Send records back over the hops, and sum them where they were sent from.

    Args:
        hops, pieces: of the way there, by hop; both are walked backwards.

    Returns:
        The sums of each part, by row of the first hop.
    """
    nothing = [part.encode(part.values_M[:0]) for part in parts]  # tells dtypes and columns
    form = RecordFormat.of([sent for of in nothing for sent in of])
    slices = [range(a, b) for a, b in pairwise([0, *accumulate(map(len, nothing))])]

    def send_back(number: int, piece: Piece, rows: Sequence[Tensor]) -> _UnderWay:
        packed = take(len(rows[0]), form.width)
        for part, values, where in zip(parts, rows, slices, strict=True):
            for i, sent in zip(where, part.encode(values), strict=True):
                form.part(packed, i).copy_(sent)
        there = piece.splits
        back = take(there.num_sent, form.width)
        reverse = Splits(there.received, there.sent)
        wait = hops[number].start(packed, back, reverse, operation)
        return _giving_back(packed, wait, take), back

    def arrive(number: int, piece: Piece, under_way: _UnderWay) -> list[Tensor]:
        wait, back = under_way
        wait()
        sums = [
            part.sum(
                piece, part.decode([form.part(back, i) for i in where]), at_the_end=number == 0
            )
            for part, where in zip(parts, slices, strict=True)
        ]
        take.give_back(back)
        return sums

    last = len(hops) - 1
    ends = accumulate(piece.splits.num_received for piece in pieces[last])
    under_way = [
        send_back(last, piece, [part.values_M[a:b] for part in parts])
        for piece, (a, b) in zip(pieces[last], pairwise([0, *ends]), strict=True)
    ]
    # A piece goes on as soon as it is summed, while the next one is still coming to this rank.
    for number in range(last, 0, -1):
        under_way = [
            send_back(number - 1, earlier, arrive(number, piece, coming))
            for earlier, piece, coming in zip(
                pieces[number - 1], pieces[number], under_way, strict=True
            )
        ]
    found = [arrive(0, piece, coming) for piece, coming in zip(pieces[0], under_way, strict=True)]
    return found[0] if len(found) == 1 else [torch.cat(of) for of in zip(*found, strict=True)]
