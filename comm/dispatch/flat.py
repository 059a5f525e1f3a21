"""The flat dispatcher: one all-to-all over the whole group, one row for each (token, expert).

Shapes as in `base`; S = T * K slots, slot t * K + k is the k-th choice of token t.

All reordering is by gathers through permutations and their inverses: no atomic additions, so the
order of every sum is fixed and two runs agree bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Dispatcher, Handle
from .exchange import Pending


@dataclass(frozen=True)
class FlatHandle(Handle):
    """The permutations of one dispatch.

    Attributes:
        slots_S: the slot of each row to send; sorted by expert, so by destination, then by slot.
        sent_TK: where in that order each slot stands.
        send_splits, recv_splits: rows a peer, in ep order.
        group_N: received order -> expert-major order; None where they are the same.
        ungroup_N: its inverse.
    """

    slots_S: Tensor
    sent_TK: Tensor
    send_splits: list[int]
    recv_splits: list[int]
    group_N: Tensor | None
    ungroup_N: Tensor | None


class Flat(Dispatcher[FlatHandle]):
    """See `dispatcher("flat", ...)`."""

    def start_preprocess(self, experts_TK: Tensor) -> Pending[FlatHandle]:
        self._check_experts(experts_TK)
        num_tokens, top_k = experts_TK.shape
        ep, num_local = self._group.size, len(self.local_experts)
        sorted_S, slots_S = torch.sort(experts_TK.reshape(-1), stable=True)
        sent_TK = torch.argsort(slots_S).view(num_tokens, top_k)
        # bincount would stop the host on a GPU, to learn the highest value.
        edges = torch.searchsorted(
            sorted_S, torch.arange(self.num_experts + 1, device=experts_TK.device)
        )
        send_counts = edges.diff().view(ep, num_local)
        even = [1] * ep
        exchange = self._group.start(send_counts, even, even, "dispatch(F)", for_host=True)

        def finish(recv_counts: Tensor) -> FlatHandle:
            sent, received = torch.stack([send_counts, recv_counts]).tolist()
            send_splits = [sum(row) for row in sent]
            if sum(send_splits) != num_tokens * top_k:
                raise self._out_of_range("out of range")
            counts = [sum(column) for column in zip(*received, strict=True)]
            group_N = ungroup_N = None
            if ep > 1 and num_local > 1:
                group_N = _grouping(recv_counts, sum(counts))
                ungroup_N = torch.argsort(group_N)
            recv_splits = [sum(row) for row in received]
            return FlatHandle(
                num_tokens, top_k, counts, slots_S, sent_TK, send_splits, recv_splits,
                group_N, ungroup_N,
            )  # fmt: skip

        return exchange.then(finish)

    def _start_spread(
        self, x_TD: Tensor, weights_TK: Tensor | None, handle: FlatHandle, operation: str
    ) -> Pending[tuple[Tensor | None, Tensor | None]]:
        def start(rows: Tensor) -> Pending[Tensor]:
            return self._group.start(rows, handle.send_splits, handle.recv_splits, operation)

        tokens_S = handle.slots_S // handle.top_k
        rows = start(x_TD.index_select(0, tokens_S))
        weights = None
        if weights_TK is not None:
            weights = start(weights_TK.reshape(-1).index_select(0, handle.slots_S))

        def finish() -> tuple[Tensor, Tensor | None]:
            rows_ND = _pick(rows.finish(), handle.group_N)
            return rows_ND, None if weights is None else _pick(weights.finish(), handle.group_N)

        return Pending(finish)

    def _start_gather(
        self,
        rows_ND: Tensor | None,
        weights_N: Tensor | None,
        handle: FlatHandle,
        operation: str,
    ) -> Pending[tuple[Tensor | None, Tensor | None]]:
        def start(rows: Tensor | None) -> Pending[Tensor] | None:
            if rows is None:
                return None
            rows = _pick(rows, handle.ungroup_N)
            return self._group.start(rows, handle.recv_splits, handle.send_splits, operation)

        rows, weights = start(rows_ND), start(weights_N)

        def finish() -> tuple[Tensor | None, Tensor | None]:
            y_TD = None if rows is None else _sum_choices(rows.finish(), handle.sent_TK)
            if weights is None:
                return y_TD, None
            return y_TD, weights.finish()[handle.sent_TK]

        return Pending(finish)


def _grouping(recv_counts: Tensor, num_rows: int) -> Tensor:
    """Gather index [N] from the received order (source, expert) to (expert, source).

    Args:
        recv_counts: [ep, local experts] int64, rows from each source for each local expert.
        num_rows: N, so that the host need not wait to learn it.
    """
    ep, num_local = recv_counts.shape
    expert_of_block = torch.arange(num_local, device=recv_counts.device).repeat(ep)
    expert_N = torch.repeat_interleave(
        expert_of_block, recv_counts.reshape(-1), output_size=num_rows
    )
    return torch.argsort(expert_N, stable=True)


def _pick(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows if index is None else rows.index_select(0, index)


def _sum_choices(rows_SD: Tensor, sent_TK: Tensor) -> Tensor:
    """Sum of each token's K rows, k = 0 first: [T, D]."""
    dtype = rows_SD.dtype
    low = dtype.itemsize < 4
    y_TD: Tensor | None = None
    for index_T in sent_TK.unbind(1):
        choice_TD = rows_SD.index_select(0, index_T)
        if low:
            choice_TD = choice_TD.float()
        y_TD = choice_TD if y_TD is None else y_TD.add_(choice_TD)
    assert y_TD is not None  # K >= 1 was checked
    return y_TD.to(dtype)
