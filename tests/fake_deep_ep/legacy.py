"""The fake of V1: `Buffer` and `Config`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .shared import (
    EventHandle,
    EventOverlap,
    FakeBuffer,
    Payload,
    Route,
    Sent,
    aligned_counts,
    choices,
    host,
    payload,
    picked,
    require,
    topk_idx_t,
)


class Config:
    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        self.num_sms = num_sms
        self.slots = num_max_nvl_chunked_recv_tokens
        self.rdma_slots = num_max_rdma_chunked_recv_tokens

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        row = hidden_bytes + 128 * (8 + 4 + 4) + 8
        return (
            -(-self.num_sms // 2 * min(num_ranks, Buffer.nvl_peers) * self.slots * row // 128) * 128
        )

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        if num_ranks <= Buffer.nvl_peers:
            return 0
        row = hidden_bytes + 128 * (8 + 4 + 4) + 24
        nodes = num_ranks // Buffer.nvl_peers
        return -(-self.num_sms // 2 * nodes * self.rdma_slots * row * 2 // 128) * 128


class Buffer(FakeBuffer):
    """V1. `nvl_peers` is 8 in the library; a smaller one lets few ranks be several nodes."""

    num_sms: int = 20
    nvl_peers: int = 8

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ) -> None:
        super().__init__(group)
        self.note("Buffer", dict(locals()))
        peers = self.nvl_peers
        require(self.size < peers or self.size % peers == 0, "ranks: below 8, or a multiple of 8")
        require(num_nvl_bytes % 128 == 0 and num_rdma_bytes % 128 == 0, "bytes in steps of 128")
        require(self.size > peers or num_rdma_bytes == 0, "RDMA bytes without a second node")
        self.nodes = max(1, self.size // peers)
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.explicitly_destroy = explicitly_destroy
        self.agree("Buffer", num_nvl_bytes, num_rdma_bytes)

    def destroy(self) -> None:
        require(self.explicitly_destroy, "`explicitly_destroy` flag must be set")
        super().destroy()

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        require(new_num_sms % 2 == 0, "The SM count must be even")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        known = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
        require(num_ranks in known, f"Unsupported number of EP ranks: {num_ranks}")
        return Config(Buffer.num_sms, 6, 256, 12, 144)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        Buffer.get_dispatch_config(num_ranks)
        return Config(Buffer.num_sms, 4, 288, 8, 128)

    @staticmethod
    def is_sm90_compiled() -> bool:
        return host.sm90

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        self.note("get_dispatch_layout", dict(locals()))
        require(topk_idx.dim() == 2 and topk_idx.is_contiguous(), "topk_idx [T, K], contiguous")
        require(topk_idx.dtype == topk_idx_t, f"topk_idx must be {topk_idx_t}")
        require(num_experts % self.size == 0, "experts must divide among the ranks")
        self._check_streams(previous_event, async_finish, allocate_on_comm_stream)
        results = self._layout(topk_idx, num_experts)
        (a, b, c, d), event = self.hand_out(results, [topk_idx], async_finish)
        assert a is not None
        assert c is not None
        assert d is not None
        return a, b, c, d, event

    def dispatch(
        self,
        x: Payload,
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Payload, Tensor | None, Tensor | None, list[int] | None, Any, EventOverlap]:
        self.note("dispatch", dict(locals()))
        require(num_worst_tokens == 0, "the fake always waits for the counts")
        self._check_streams(previous_event, async_finish, allocate_on_comm_stream)
        tokens, scales = self.check_tokens(x)
        self._check_space(tokens, config or self.get_dispatch_config(self.size))
        self.agree("dispatch", handle is None, tokens.shape[1], tokens.dtype, topk_idx is None)
        if handle is not None:
            require(topk_idx is None and topk_weights is None, "a handle, so no top-k")
            route, in_rank = self._unpack(handle)
            require(len(self.value(in_rank)) == len(tokens), "the handle has other tokens")
            every = self.gather_sent(Sent(tokens, scales, None, None))
            results = [*picked(every, route), None, None]
            counts = packed = None
        else:
            require(topk_idx is not None and topk_weights is not None, "the fake wants top-k")
            assert topk_idx is not None
            self.check_choices(tokens, topk_idx, topk_weights)
            given = [num_tokens_per_rank, num_tokens_per_rdma_rank]
            given += [num_tokens_per_expert, is_token_in_rank]
            in_rank, num_experts = self._check_layout(given, topk_idx)
            every, route = self.spread(
                Sent(tokens, scales, topk_idx, topk_weights), num_experts // self.size
            )
            local, weights = choices(every, route, num_experts // self.size, self.me)
            results = [*picked(every, route), local, weights.masked_fill(local < 0, 0)]
            counts = aligned_counts(local, num_experts // self.size, expert_alignment)
            packed = self._pack(route, in_rank, len(tokens))
        inputs = [tokens, scales, topk_idx, topk_weights]
        (rows, row_scales, local, weights), event = self.hand_out(results, inputs, async_finish)
        return payload(rows, row_scales), local, weights, counts, packed, event

    def combine(
        self,
        x: Tensor,
        handle: tuple[Any, ...],
        topk_weights: Tensor | None = None,
        bias: Any = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        self.note("combine", dict(locals()))
        require(bias is None, "the fake has no bias")
        self._check_streams(previous_event, async_finish, allocate_on_comm_stream)
        route, in_rank = self._unpack(handle)
        self.check_rows(x, topk_weights, len(route.ranks))
        require(self.nodes == 1 or x.shape[1] % 256 == 0, "between nodes H % 256 == 0")
        self._check_space(x, config or self.get_combine_config(self.size))
        self.agree("combine", x.shape[1], topk_weights is None)
        back = self.gather_back(self.value(x), topk_weights, route, len(in_rank))
        y = back[0][0]
        for other, _, _ in back[1:]:
            y = y + other
        weights = None
        if topk_weights is not None:
            weights = sum((w for _, w, _ in back if w is not None), topk_weights.new_zeros(()))
            assert isinstance(weights, Tensor)
        results: list[Tensor | None] = [y.to(x.dtype), weights]
        (y_out, w_out), event = self.hand_out(results, [x, topk_weights], async_finish)
        assert y_out is not None
        return y_out, w_out, event

    def _check_streams(
        self, previous: EventOverlap | None, later: bool, on_comm_stream: bool
    ) -> None:
        require(previous is None or isinstance(previous, EventOverlap), "V1 takes EventOverlap")
        has_event = previous is not None and previous.event is not None
        require(
            not on_comm_stream or (has_event and later), "needs previous_event and async_finish"
        )

    def _check_space(self, x: Tensor, config: Config) -> None:
        row = x.shape[1] * max(x.element_size(), 2)
        require(
            config.get_nvl_buffer_size_hint(row, self.size) <= self.num_nvl_bytes
            and config.get_rdma_buffer_size_hint(row, self.size) <= self.num_rdma_bytes,
            "the buffer is too small",
        )

    def _layout(self, topk_idx: Tensor, num_experts: int) -> list[Tensor | None]:
        """What get_dispatch_layout returns."""
        chosen = topk_idx[topk_idx >= 0]
        per_expert = chosen.bincount(minlength=num_experts).int()
        owner = torch.where(topk_idx >= 0, topk_idx // (num_experts // self.size), -1)
        in_rank = torch.stack([(owner == r).any(1) for r in range(self.size)], 1)
        per_node = None
        if self.nodes > 1:
            per_node = in_rank.unflatten(1, (self.nodes, -1)).any(2).sum(0).int()
        return [in_rank.sum(0).int(), per_node, per_expert, in_rank.contiguous()]

    def _check_layout(self, given: list[Tensor | None], topk_idx: Tensor) -> tuple[Tensor, int]:
        """(is_token_in_rank, number of experts); the layout must be that of topk_idx."""
        per_expert, in_rank = given[2], given[3]
        require(per_expert is not None and in_rank is not None, "dispatch without a layout")
        assert per_expert is not None
        assert in_rank is not None
        expected = self._layout(topk_idx, len(per_expert))
        for ours, theirs in zip(expected, given, strict=True):
            if ours is not None:
                require(theirs is not None, "dispatch without a layout")
                assert theirs is not None
                seen = self.value(theirs)
                require(seen.dtype == ours.dtype, f"layout of {seen.dtype}, not {ours.dtype}")
                require(torch.equal(seen, ours), "the layout is of another routing")
        return self.value(in_rank), len(per_expert)

    def _pack(self, route: Route, in_rank: Tensor, num_tokens: int) -> tuple[Any, ...]:
        """V1's handle: six tensors in a node, ten between nodes; those that matter are filled."""
        counts = torch.stack(self.gather(in_rank.sum(0).int()))
        unused = counts.new_zeros(self.size, Buffer.num_sms // 2)
        if self.nodes == 1:
            head = counts.new_zeros(num_tokens, self.size)
            prefix = counts.cumsum(0).int()
            return prefix, unused, unused, route.tokens.int(), in_rank, head
        ends = counts[:, self.me].cumsum(0).int()
        return in_rank, *[unused] * 5, ends, route.tokens, unused, unused

    def _unpack(self, handle: tuple[Any, ...]) -> tuple[Route, Tensor]:
        require(isinstance(handle, tuple) and len(handle) in (6, 10), "not a handle of dispatch")
        if len(handle) == 6:
            ends, tokens, in_rank = handle[0][:, self.me], handle[3], handle[4]
        else:
            ends, tokens, in_rank = handle[6], handle[7], handle[0]
        counts = ends.diff(prepend=ends.new_zeros(1))
        ranks = torch.arange(self.size, device=ends.device).repeat_interleave(counts)
        return Route(ranks, tokens.long()), in_rank
