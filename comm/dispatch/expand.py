"""From the records that reached a rank to its experts' rows, and back.

Shapes: M records with K slots each, of which this rank's are called entries (record, choice); N
rows, entries in the order of experts, and padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .host import to_device
from .pieces import inverse
from .sums import Bags


@dataclass(frozen=True)
class Expansion:
    """How records become rows.

    Attributes:
        record_N: the record of each row; 0 of padding.
        entry_N: record * K + choice of each row; 0 of padding.
        entries: record * K + choice of each entry, ascending.
        padding: which rows are padding, or None where none is.
        bags: the rows of each record, in the order of its choices.
    """

    record_N: Tensor
    entry_N: Tensor
    entries: Tensor
    padding: Tensor | None
    bags: Bags

    @classmethod
    def of(
        cls,
        local_MK: Tensor,
        num_entries: Sequence[int],
        place_M: Tensor | None,
        alignment: int,
    ) -> Expansion:
        """Group entries by local slot, then by the record's place, then by choice.

        Args:
            local_MK: int64, the local slot of each choice; where it is elsewhere, their number.
            num_entries: entries of each local slot (what local_MK holds).
            place_M: int64, each record's place in the order that rows are to have; None: as is.
            alignment: each slot's rows are made a multiple of this by padding at their end.
        """
        num_records, top_k = local_MK.shape
        device = local_MK.device
        here_MK = local_MK < len(num_entries)
        total = sum(num_entries)
        entries = torch.nonzero_static(here_MK.view(-1), size=total).view(-1)
        record = entries // top_k
        place = record if place_M is None else place_M[record]
        key = local_MK.reshape(-1)[entries] * num_records + place
        order = torch.argsort(key, stable=True)
        counts = padded(num_entries, alignment)
        row = inverse(order)  # of each entry
        rank_of_row = order
        padding = None
        if counts != list(num_entries):
            shift, at = [], 0
            for count, real in zip(counts, num_entries, strict=True):
                shift += [at]
                at += count - real
            moved = torch.repeat_interleave(
                to_device(shift, device),
                to_device(num_entries, device),
                output_size=total,
            )
            target = torch.arange(total, device=device) + moved
            row = target[row]
            rank_of_row = torch.zeros(sum(counts), dtype=torch.int64, device=device)
            is_padding = torch.ones(sum(counts), dtype=torch.bool, device=device)
            is_padding[target] = False
            rank_of_row[target] = order
            padding = torch.nonzero_static(is_padding, size=sum(counts) - total).view(-1)
        return cls(
            _at(record, rank_of_row, padding),
            _at(entries, rank_of_row, padding),
            entries,
            padding,
            Bags.of(row, here_MK.sum(dim=1)),
        )

    def rows(self, part_M: Tensor) -> Tensor:
        """The records' part [M, columns] at each row: [N, columns]; zeros in padding."""
        return self._blank(part_M.index_select(0, self.record_N))

    def choices(self, part_MK: Tensor) -> Tensor:
        """What each row's own choice has in [M, K]: [N]; zeros in padding."""
        return self._blank(part_MK.reshape(-1).index_select(0, self.entry_N))

    def sum(self, rows_ND: Tensor, dtype: torch.dtype) -> Tensor:
        """Each record's rows summed: [M, D] of `dtype`."""
        return self.bags.sum(rows_ND, dtype)

    def unchoose(self, values_N: Tensor, top_k: int) -> Tensor:
        """[M, K] with each row's value at its choice, and zeros elsewhere."""
        flat = values_N.new_zeros(len(self.bags.offsets_B) * top_k)
        flat.index_copy_(0, self.entries, values_N.index_select(0, self.bags.index_M))
        return flat.view(-1, top_k)

    def _blank(self, rows: Tensor) -> Tensor:
        return rows if self.padding is None else rows.index_fill_(0, self.padding, 0)


def _at(values: Tensor, order: Tensor, padding: Tensor | None) -> Tensor:
    if padding is None or len(values):
        return values[order]
    return torch.zeros_like(order)  # nothing but padding


def padded(counts: Sequence[int], alignment: int) -> list[int]:
    """Each count made a multiple of `alignment`."""
    return [-(-count // alignment) * alignment for count in counts]


def places(sizes: Sequence[Sequence[int]], arrival: Sequence[int], device: torch.device) -> Tensor:
    """Where each record stands once records are ordered by source rank.

    Args:
        sizes: sizes[p][s], the records of piece p from source s. Pieces arrive one after another.
        arrival: the sources in the order in which a piece has them.

    Returns:
        [M] int64, a permutation; a source's records keep their order.
    """
    num_sources = len(arrival)
    start, begin = 0, [[0] * num_sources for _ in sizes]
    for source in range(num_sources):
        for piece, of_source in enumerate(sizes):
            begin[piece][source] = start
            start += of_source[source]
    arrived, shifts, lengths = 0, [], []
    for piece, of_source in enumerate(sizes):
        for source in arrival:
            shifts.append(begin[piece][source] - arrived)
            lengths.append(of_source[source])
            arrived += of_source[source]
    moved = torch.repeat_interleave(
        to_device(shifts, device), to_device(lengths, device), output_size=start
    )
    return moved + torch.arange(start, device=device)
