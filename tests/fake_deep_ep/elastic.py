"""The fake of V2: `ElasticBuffer` and `EPHandle`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

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
)

_MIB = 2**20


class Sizes(NamedTuple):
    """What a dispatch with a handle must share with the one that made it."""

    num_experts: int
    limit: int
    alignment: int
    num_sms: int
    hidden: int
    itemsize: int
    packs: int


@dataclass
class EPHandle:
    """V2's handle: some of its documented attributes, and the fake's `sizes`."""

    topk_idx: Tensor
    num_sms: int
    num_recv_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    recv_src_metadata: Tensor
    sizes: Sizes


class ElasticBuffer(FakeBuffer):
    """V2."""

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        super().__init__(group)
        self.note("ElasticBuffer", dict(locals()))
        if num_bytes is None:
            num_bytes = self.get_buffer_size_hint(
                group, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch
            )
        require(num_bytes > 0 and num_bytes % (2 * _MIB) == 0, "bytes in steps of 2 MiB")
        self.num_bytes = num_bytes
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.deterministic = deterministic
        self.explicitly_destroy = explicitly_destroy
        self.agree("ElasticBuffer", num_bytes, num_max_tokens_per_rank, deterministic)

    def destroy(self) -> None:
        require(self.explicitly_destroy, "explicitly_destroy was not set")
        super().destroy()

    @staticmethod
    def get_buffer_size_hint(
        group: Any,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        require(num_max_tokens_per_rank > 0 and hidden > 0, "sizes must be given")
        item, packs = (1, -(-hidden // 32)) if use_fp8_dispatch else (2, 0)
        need = _elastic_bytes(group.size(), num_max_tokens_per_rank, hidden, item, packs, num_topk)
        return -(-need // (2 * _MIB)) * 2 * _MIB

    @staticmethod
    def capture() -> EventHandle:
        return EventHandle()

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        require(num_scaleout_topk == 0, "num_scaleout_topk is reserved")
        if num_experts % self.size:
            raise AssertionError("experts must divide among the ranks")
        gbs = nvlink_gbs or host.nvlink_gbs
        rdma_gbs = rdma_gbs or host.rdma_gbs
        if host.nodes > 1 and 1 / rdma_gbs > 1 / gbs:
            gbs = rdma_gbs
        needed = 1.25 * gbs * max(0.2 / sm_read_gbs, 1 / sm_write_gbs)
        return min(2 * math.ceil(max(4, needed) / 2), 132)

    def dispatch(
        self,
        x: Payload,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Payload, Tensor | None, Tensor | None, EPHandle, EventOverlap]:
        self.note("dispatch", dict(locals()))
        require(not do_expand and not use_tma_aligned_col_major_sf, "the fake has one row a token")
        self._check_streams(previous_event, allocate_on_comm_stream)
        tokens, scales = self.check_tokens(x)
        packs = 0 if scales is None else scales.shape[1]
        form = (tokens.shape[1], tokens.element_size(), packs)
        if handle is None:
            require(do_cpu_sync in (None, True), "the fake always waits for the counts")
            require(topk_idx is not None and num_experts is not None, "no topk_idx, no handle")
            assert topk_idx is not None
            assert num_experts is not None
            limit = num_max_tokens_per_rank or self.num_max_tokens_per_rank
            sms = num_sms or self.get_theoretical_num_sms(num_experts, topk_idx.shape[1])
            sizes = Sizes(num_experts, limit, expert_alignment or 1, sms, *form)
        else:
            require(topk_idx is None and not do_cpu_sync, "a handle: no topk_idx, no CPU sync")
            self._check_handle(handle)
            topk_idx, sizes = handle.topk_idx, handle.sizes
            given = (num_experts, num_max_tokens_per_rank, expert_alignment)
            same = all(g in (None, s) for g, s in zip(given, sizes, strict=False))
            require(same, "sizes other than the handle's")
            require(num_sms == sizes.num_sms, "the SM count must be the handle's, and be given")
            require(form == sizes[-len(form) :], "rows of another width or format than before")
        self.check_choices(tokens, topk_idx, topk_weights)
        require(sizes.num_experts % self.size == 0, "experts must divide among the ranks")
        require(len(tokens) <= sizes.limit, f"{len(tokens)} tokens, announced: {sizes.limit}")
        self._check_space(sizes.limit, tokens, packs, topk_idx.shape[1])
        self.agree("dispatch", sizes, tokens.shape[1], tokens.dtype)

        per_rank = sizes.num_experts // self.size
        every, route = self.spread(Sent(tokens, scales, topk_idx, topk_weights), per_rank)
        if handle is None:
            handle = self._handle(sizes, topk_idx, every, route)
        route = self._route(handle)
        local, weights = choices(every, route, per_rank, self.me)
        sent_weights = None if topk_weights is None else weights
        results = [*picked(every, route), local, sent_weights, handle.recv_src_metadata]
        inputs = [tokens, scales, topk_idx, topk_weights]
        later = async_with_compute_stream
        (rows, row_scales, local, weights, meta), event = self.hand_out(results, inputs, later)
        assert meta is not None
        handle.recv_src_metadata = meta
        return payload(rows, row_scales), local, weights, handle, event

    def _handle(self, sizes: Sizes, topk_idx: Tensor, every: list[Sent], route: Route) -> EPHandle:
        """The handle of a first dispatch; says in which order tokens are handed out."""
        per_rank = sizes.num_experts // self.size
        local, _ = choices(every, route, per_rank, self.me)
        once = local.sort(1).values
        twice = (once[:, 1:] == once[:, :-1]) & (once[:, 1:] >= 0)
        require(not bool(twice.any()), "a token names an expert twice (an assertion on the device)")
        if not self.deterministic:
            random = torch.Generator().manual_seed(1000 * len(self.calls) + self.me)
            order = torch.randperm(len(local), generator=random).to(local.device)
            route = Route(route.ranks[order], route.tokens[order])
        meta = topk_idx.new_full((len(local), topk_idx.shape[1] + 2), -1, dtype=torch.int32)
        meta[:, 0] = route.ranks * sizes.limit + route.tokens
        counts = aligned_counts(local, per_rank, sizes.alignment)
        return EPHandle(topk_idx.clone(), sizes.num_sms, len(local), counts, meta, sizes)

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        self.note("combine", dict(locals()))
        require(bias is None, "the fake has no bias")
        self._check_streams(previous_event, allocate_on_comm_stream)
        self._check_handle(handle)
        route = self._route(handle)
        self.check_rows(x, topk_weights, len(route.ranks))
        require(x.shape[1] % 256 == 0, "H % 256 == 0 (a static assertion of the kernel)")
        top_k = handle.topk_idx.shape[1]
        require(topk_weights is None or topk_weights.shape[1] == top_k, "topk_weights [N, K]")
        self._check_space(handle.sizes.limit, x, 0, top_k)
        self.agree("combine", x.shape[1], topk_weights is None)
        num_tokens = len(handle.topk_idx)
        back = self.gather_back(self.value(x), topk_weights, route, num_tokens)
        owner = torch.where(
            handle.topk_idx >= 0, handle.topk_idx // (handle.sizes.num_experts // self.size), -1
        )
        y = x.new_zeros(num_tokens, x.shape[1], dtype=torch.float32)
        weights = None if topk_weights is None else topk_weights.new_zeros(num_tokens, top_k)
        for k in range(top_k):
            for rank, (rows, theirs, _) in enumerate(back):
                here = owner[:, k] == rank
                first = here & ~(owner[:, :k] == rank).any(1)
                y[first] += rows[first]
                if weights is not None:
                    assert theirs is not None
                    weights[here, k] = theirs[here, k]
        results: list[Tensor | None] = [y.to(x.dtype), weights]
        inputs = [x, topk_weights]
        (y_out, w_out), event = self.hand_out(results, inputs, async_with_compute_stream)
        assert y_out is not None
        return y_out, w_out, event

    def _check_streams(self, previous: EventHandle | None, on_comm_stream: bool) -> None:
        require(previous is None or isinstance(previous, EventHandle), "V2 takes EventHandle")
        require(previous is None or on_comm_stream, "previous_event: allocate_on_comm_stream, too")

    def _check_handle(self, handle: EPHandle) -> None:
        require(isinstance(handle, EPHandle), "not a handle of dispatch")
        require(
            self.arrived(handle.recv_src_metadata) or not self.deterministic,
            "the handle is sorted only once the event of its dispatch was waited for",
        )

    def _check_space(self, limit: int, x: Tensor, packs: int, num_topk: int) -> None:
        need = _elastic_bytes(self.size, limit, x.shape[1], x.element_size(), packs, num_topk)
        require(need <= self.num_bytes, f"{need} bytes, the buffer has {self.num_bytes}")

    def _route(self, handle: EPHandle) -> Route:
        source = self.value(handle.recv_src_metadata)[:, 0].long()
        limit = handle.sizes.limit
        return Route(source // limit, source % limit)


def _elastic_bytes(
    ranks: int, limit: int, hidden: int, item: int, packs: int, num_topk: int
) -> int:
    """Room for a dispatch of such rows, and for combining in bfloat16."""
    num_topk = num_topk or 32
    dispatch = ranks * limit * (hidden * item + packs * 4 + num_topk * 8)
    combine = min(ranks, num_topk) * limit * (hidden * 2 + num_topk * 4)
    return max(dispatch, combine)
