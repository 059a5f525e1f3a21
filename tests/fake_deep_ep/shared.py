"""What both fake buffers share: a record of calls, agreement among ranks, results that arrive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

topk_idx_t = torch.int64
Payload = Tensor | tuple[Tensor, Tensor]
made: list[Any] = []  # the buffers made since the fake was installed


@dataclass
class Host:
    """What the library finds where it runs, and how it was compiled.

    Attributes:
        gpu: the GPU's name.
        nvlink_gbs, rdma_gbs: bandwidths, or 0 where the library cannot find them out.
        nodes: over which V2 has its ranks.
        sm90: compiled for GPUs of compute capability 9.0.
    """

    gpu: str = "NVIDIA H800"
    nvlink_gbs: float = 200.0
    rdma_gbs: float = 50.0
    nodes: int = 1
    sm90: bool = True


host = Host()


class FakeAssertionError(AssertionError):
    """The real library would have failed an assertion, on the host or on the device."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise FakeAssertionError(what)


class EventHandle:
    """A CUDA event. In the fake: the moment when results become readable."""

    def __init__(self, arrive: Callable[[], None] | None = None) -> None:
        self._arrive = arrive

    def current_stream_wait(self) -> None:
        if self._arrive is not None:
            self._arrive()
            self._arrive = None


class EventOverlap:
    def __init__(
        self, event: EventHandle | None = None, extra_tensors: tuple[Tensor, ...] | None = None
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self, release_handle: bool = False) -> None:
        require(self.event is not None, "waited for an event that was not asked for")
        assert self.event is not None
        self.event.current_stream_wait()
        if release_handle:
            self.event = None


@dataclass(frozen=True)
class Call:
    """What was asked: the method's name and its arguments by name."""

    name: str
    arguments: dict[str, Any]


@dataclass
class Sent:
    """One rank's part of a dispatch, seen by all."""

    x: Tensor
    scales: Tensor | None
    topk_idx: Tensor | None
    topk_weights: Tensor | None


@dataclass
class Route:
    """Which tokens a rank received: their source ranks and their places there, both [N] int64."""

    ranks: Tensor
    tokens: Tensor


@dataclass
class FakeBuffer:
    """What was asked of a buffer, and how its answers come."""

    group: Any
    calls: list[Call] = field(default_factory=list)
    destroyed: bool = False
    _late: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.me: int = self.group.rank()
        self.size: int = self.group.size()
        require("PCIE" not in host.gpu or self.size <= 2, "PCIe cards have NVLink in pairs only")
        made.append(self)

    def note(self, name: str, arguments: dict[str, Any]) -> None:
        require(not self.destroyed, f"{name} after destroy")
        require(
            not (
                torch.are_deterministic_algorithms_enabled()
                and torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore
            ),
            "torch fills new memory, which would run beside the communication",
        )
        self.calls.append(Call(name, {k: v for k, v in arguments.items() if k != "self"}))

    def gather(self, what: Any) -> list[Any]:
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, what, group=self.group)
        return every

    def gather_sent(self, sent: Sent) -> list[Sent]:
        every: list[Sent] = self.gather(replace(sent, x=sent.x.view(_plain(sent.x.dtype))))
        return [replace(other, x=other.x.view(sent.x.dtype)) for other in every]

    def agree(self, *facts: Any) -> None:
        every = self.gather(facts)
        require(all(other == facts for other in every), f"the ranks disagree: {every}")

    def destroy(self) -> None:
        self.note("destroy", {})
        self.agree("destroy")
        self.destroyed = True

    def value(self, tensor: Tensor) -> Tensor:
        """What the communication stream sees: also results that nobody has waited for."""
        return self._late.get(tensor.data_ptr(), tensor)

    def arrived(self, tensor: Tensor) -> bool:
        return tensor.data_ptr() not in self._late

    def hand_out(
        self, results: list[Tensor | None], inputs: list[Tensor | None], later: bool
    ) -> tuple[list[Tensor | None], EventOverlap]:
        """The results and their event: at once, or unreadable until the event was waited for."""
        if not later:
            return results, EventOverlap()
        outside = [None if r is None else _unreadable(r) for r in results]
        pairs = [(o, r) for o, r in zip(outside, results, strict=True) if o is not None]
        for place, result in pairs:
            assert result is not None
            if place.numel():
                self._late[place.data_ptr()] = result
        before = [(i, i.clone()) for i in inputs if i is not None and self.arrived(i)]

        def arrive() -> None:
            for now, then in before:
                require(_bytes_equal(now, then), "an input changed while it was being sent")
            for place, result in pairs:
                assert result is not None
                self._late.pop(place.data_ptr(), None)
                place.copy_(result)

        return outside, EventOverlap(EventHandle(arrive))

    def spread(self, sent: Sent, per_rank: int) -> tuple[list[Sent], Route]:
        """All ranks' tokens, and which of them come here, by source rank and token."""
        every = self.gather_sent(sent)
        ranks, tokens = [], []
        for rank, other in enumerate(every):
            assert other.topk_idx is not None
            here = ((other.topk_idx >= 0) & (other.topk_idx // per_rank == self.me)).any(1)
            mine = here.nonzero()[:, 0]
            ranks.append(torch.full_like(mine, rank))
            tokens.append(mine)
        return every, Route(torch.cat(ranks), torch.cat(tokens))

    def gather_back(
        self, x: Tensor, weights: Tensor | None, route: Route, num_tokens: int
    ) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        """Of each rank: x [T, H] float32 and weights [T, K] for my tokens, and where it has any."""
        answer = []
        for rows, theirs, way in self.gather((x, weights, route)):
            mine = way.ranks == self.me
            tokens = way.tokens[mine]
            y = rows.new_zeros(num_tokens, rows.shape[1], dtype=torch.float32)
            y[tokens] = rows[mine].float()
            w = None
            if theirs is not None:
                w = theirs.new_zeros(num_tokens, theirs.shape[1])
                w[tokens] = theirs[mine]
            has = rows.new_zeros(num_tokens, dtype=torch.bool)
            has[tokens] = True
            answer.append((y, w, has))
        return answer

    def check_tokens(self, x: Payload) -> tuple[Tensor, Tensor | None]:
        """(x, scales or None) of a dispatch, checked."""
        x, scales = x if isinstance(x, tuple) else (x, None)
        require(x.dim() == 2 and x.is_contiguous(), "x must be [T, H] and contiguous")
        require(len(x) > 0, "no tokens: the library's own tests have at least one on each rank")
        require(x.shape[1] * x.element_size() % 16 == 0, "a row must be a multiple of 16 bytes")
        if scales is None:
            require(x.dtype == torch.bfloat16, f"x without scales must be bfloat16, is {x.dtype}")
        else:
            require(x.dtype == torch.float8_e4m3fn, f"x with scales must be E4M3, is {x.dtype}")
            require(scales.dtype == torch.float32, f"scales must be float32, are {scales.dtype}")
            require(tuple(scales.shape) == (len(x), -(-x.shape[1] // 128)), "scales [T, H / 128]")
            require(scales.device == x.device, "scales on another device")
        return x, scales

    def check_choices(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor | None) -> None:
        require(topk_idx.dim() == 2 and topk_idx.is_contiguous(), "topk_idx [T, K], contiguous")
        require(topk_idx.dtype == topk_idx_t, f"topk_idx must be {topk_idx_t}")
        require(len(topk_idx) == len(x) and topk_idx.shape[1] <= 32, "topk_idx [T, K <= 32]")
        require(topk_idx.device == x.device, "topk_idx on another device")
        if topk_weights is not None:
            require(topk_weights.shape == topk_idx.shape, "topk_weights [T, K]")
            require(topk_weights.dtype == torch.float32, "topk_weights must be float32")
            require(topk_weights.is_contiguous(), "topk_weights must be contiguous")
            require(topk_weights.device == x.device, "topk_weights on another device")

    def check_rows(self, x: Tensor, weights: Tensor | None, num_rows: int) -> None:
        require(x.dim() == 2 and x.is_contiguous(), "x must be [N, H] and contiguous")
        require(x.dtype == torch.bfloat16, f"combine takes bfloat16, not {x.dtype}")
        require(len(x) == num_rows, f"combine: {len(x)} rows, {num_rows} were received")
        require(x.shape[1] * 2 % 16 == 0, "a row must be a multiple of 16 bytes")
        if weights is not None:
            require(weights.dim() == 2 and len(weights) == num_rows, "topk_weights [N, K]")
            require(weights.dtype == torch.float32, "topk_weights must be float32")
            require(weights.is_contiguous(), "topk_weights must be contiguous")


def picked(every: list[Sent], route: Route) -> list[Tensor | None]:
    """(rows, scales or None) received."""
    scales = None
    if every[0].scales is not None:
        scales = _pick([sent.scales for sent in every], route)
    return [_pick([sent.x for sent in every], route), scales]


def choices(every: list[Sent], route: Route, per_rank: int, me: int) -> tuple[Tensor, Tensor]:
    """(local expert or -1, weight) [N, K] of the tokens received."""
    index = _pick([sent.topk_idx for sent in every], route)
    local = torch.where((index >= 0) & (index // per_rank == me), index - me * per_rank, -1)
    if every[0].topk_weights is None:
        return local, local.new_zeros(local.shape, dtype=torch.float32)
    return local, _pick([sent.topk_weights for sent in every], route)


def _pick(parts: list[Tensor] | list[Tensor | None], route: Route) -> Tensor:
    """Of each rank's [T, ...], the rows that the route names."""
    tensors = [part for part in parts if part is not None]
    starts = route.ranks.new_tensor([0, *map(len, tensors)]).cumsum(0)
    where = starts[route.ranks] + route.tokens
    like = tensors[0].dtype
    return torch.cat([t.view(_plain(like)) for t in tensors])[where].view(like)


def _plain(dtype: torch.dtype) -> torch.dtype:
    """A dtype in which tensors of this one can be indexed and pickled."""
    return torch.uint8 if dtype == torch.float8_e4m3fn else dtype


def aligned_counts(local: Tensor, per_rank: int, alignment: int) -> list[int]:
    counts = local[local >= 0].bincount(minlength=per_rank).tolist()
    return [-(-count // alignment) * alignment for count in counts]


def payload(rows: Tensor | None, scales: Tensor | None) -> Payload:
    assert rows is not None
    return rows if scales is None else (rows, scales)


def _unreadable(like: Tensor) -> Tensor:
    """A tensor of this kind, full of what would be noticed."""
    if like.dtype == torch.bool:
        return torch.zeros_like(like)
    if like.dtype == torch.float8_e4m3fn:
        return torch.full_like(like, 0x7F, dtype=torch.uint8).view(like.dtype)
    if like.is_floating_point():
        return torch.full_like(like, torch.nan)
    return torch.full_like(like, -(2**30))


def _bytes_equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
