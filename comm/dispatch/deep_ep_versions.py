"""DeepEP's two generations behind one small interface: V2's `ElasticBuffer` and V1's `Buffer`.

Both send a token once to each rank that has an expert of it (across nodes, once to each node) and
sum a token's rows on the way back. What differs is hidden here: V1 wants the layout computed
beforehand, drops weights when a handle serves again, and sums weights over ranks; V2 wants to know
the most tokens of any rank. Calls are made without DeepEP's own asynchrony: a `Lane` runs them.

Shapes: T tokens, K choices, H hidden, P slots, R ranks, M tokens received.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import gather

_LOG = logging.getLogger(__name__)

# V2 works out how many SMs it needs from a balanced router's traffic and the links' bandwidth. For
# group-limited routing, and where the bandwidth cannot be found out, this many, as in DeepSeek-V3's
# training (arXiv 2412.19437, section 3.2.2).
DEFAULT_SMS = 20
MOST_CHOICES = 32  # of a token: the lanes of a warp


@dataclass(frozen=True)
class Received:
    """What the first spread of a route brought.

    Attributes:
        parts: tensors [M, ...] as they were sent, by source rank, then token.
        local_MK: int64, the slot on this rank of each choice, or -1 where it is elsewhere.
        weights_MK: float32; what stands beside -1 means nothing.
        route: to be handed back for what follows.
    """

    parts: list[Tensor]
    local_MK: Tensor
    weights_MK: Tensor
    route: Any


class Exchange(ABC):
    """One generation's buffer and its calls, all of them collectives of the group.

    Args:
        library: the module deep_ep.
        group: the expert group, in the order of its ranks.
        num_slots: P.
        timeout_s: limit of its waits, as far as it takes one.
        num_sms: of a GPU, that its kernels take; None leaves it to DeepEP.

    Attributes:
        version: how it is called.
        least_capability: compute capability of a GPU that it runs on.
        most_hidden: the most columns of a row, or None where nothing is known of a limit.
    """

    version: ClassVar[str]
    least_capability: ClassVar[tuple[int, int]]
    most_hidden: ClassVar[int | None] = None

    def __init__(
        self,
        library: Any,
        group: dist.ProcessGroup,
        num_slots: int,
        timeout_s: float,
        *,
        num_sms: int | None = None,
    ) -> None:
        self._library = library
        self._group = group
        self._num_slots = num_slots
        self._timeout_s = timeout_s
        self._wanted_sms = num_sms
        self._index_dtype: torch.dtype = getattr(library, "topk_idx_t", torch.int64)
        self._buffer: Any = None

    @classmethod
    @abstractmethod
    def hidden_multiple(cls, num_ranks: int, payload: str) -> int:
        """H must be a multiple of this."""

    @classmethod
    def refusal(
        cls, num_ranks: int, payload: str, hidden: int | None, top_k: int | None
    ) -> str | None:
        """Why rows of `hidden` columns or `top_k` choices a token cannot be carried, or None.

        Args:
            hidden, top_k: None where it is not known.
        """
        if top_k is not None and top_k > MOST_CHOICES:
            return f"DeepEP takes at most {MOST_CHOICES} experts a token, not {top_k}"
        if hidden is None:
            return None
        multiple = cls.hidden_multiple(num_ranks, payload)
        if hidden % multiple:
            return f"DeepEP ({cls.version}) takes multiples of {multiple} columns, not {hidden}"
        if cls.most_hidden is not None and hidden > cls.most_hidden:
            return f"DeepEP ({cls.version}) takes at most {cls.most_hidden} columns, not {hidden}"
        return None

    @abstractmethod
    def reserve(self, num_tokens: int, hidden: int, top_k: int, payload: str) -> None:
        """Make the buffer that such a dispatch needs, unless it is there.

        Args:
            num_tokens: the most of any rank.
        """

    @abstractmethod
    def spread(self, parts: list[Tensor], slots_TK: Tensor, weights_TK: Tensor) -> Received:
        """Send tokens to the ranks of their slots.

        Args:
            parts: [T, H] bfloat16; or [T, H] float8_e4m3fn and its scales [T, H / 128] float32.
            slots_TK: int64, distinct within a token, or -1.
            weights_TK: float32.
        """

    @abstractmethod
    def spread_again(
        self, parts: list[Tensor], weights_TK: Tensor | None, route: Any
    ) -> tuple[list[Tensor], Tensor | None]:
        """Send other rows, and weights if given, the same way: parts, and weights [M, K]."""

    @abstractmethod
    def gather(
        self, rows_MH: Tensor, weights_MK: Tensor | None, route: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Send rows back: their sums [T, H] bfloat16, and weights [T, K] float32 if given.

        Args:
            rows_MH: bfloat16.
            weights_MK: float32, zero beside what is not this rank's.
        """

    def close(self) -> None:
        """Give the buffer back. Another `reserve` makes a new one."""
        if self._buffer is not None:
            self._buffer.destroy()
            self._buffer = None


class Legacy(Exchange):
    """V1, from 1.2 on."""

    version = "V1 Buffer"
    least_capability = (8, 0)
    # A row between nodes, half a row within one, is to fit into a warp's part of shared memory.
    most_hidden = 7936
    RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
    NODE = 8  # it takes this many neighbouring ranks for a node

    @dataclass(frozen=True)
    class Route:
        """Attributes: its handle; the indices and their layout, to send weights once more."""

        handle: Any
        indices_TK: Tensor
        layout: dict[str, Tensor | None]

    @classmethod
    def hidden_multiple(cls, num_ranks: int, payload: str) -> int:
        """Between nodes, a warp sums 32 x 16 bytes at a time; within one, rows are 16 values."""
        if num_ranks > cls.NODE:
            return 256
        return 128 if payload == "fp8" else 16

    def reserve(self, num_tokens: int, hidden: int, top_k: int, payload: str) -> None:
        del num_tokens, top_k, payload  # rows pass through in chunks; FP8 ones are smaller
        row, ranks = hidden * torch.bfloat16.itemsize, self._group.size()
        kind = self._library.Buffer
        if self._wanted_sms is not None:
            kind.set_num_sms(self._wanted_sms)  # what it then proposes is for so many
        configs = (kind.get_dispatch_config(ranks), kind.get_combine_config(ranks))
        self._configs = configs
        nvlink = max(config.get_nvl_buffer_size_hint(row, ranks) for config in configs)
        rdma = max(config.get_rdma_buffer_size_hint(row, ranks) for config in configs)
        buffer = self._buffer
        if buffer and buffer.num_nvl_bytes >= nvlink and buffer.num_rdma_bytes >= rdma:
            return
        self.close()
        self._buffer = kind(self._group, nvlink, rdma, explicitly_destroy=True)

    def spread(self, parts: list[Tensor], slots_TK: Tensor, weights_TK: Tensor) -> Received:
        indices_TK = slots_TK.to(self._index_dtype).contiguous()
        names = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert",
                 "is_token_in_rank")  # fmt: skip
        *tensors, _ = self._buffer.get_dispatch_layout(indices_TK, self._num_slots)
        layout: dict[str, Tensor | None] = dict(zip(names, tensors, strict=True))
        return self._dispatch(parts, indices_TK, weights_TK, layout)

    def _dispatch(
        self,
        parts: list[Tensor],
        indices_TK: Tensor,
        weights_TK: Tensor,
        layout: dict[str, Tensor | None],
    ) -> Received:
        rows, local_MK, weights_MK, _, handle, _ = self._buffer.dispatch(
            _payload(parts),
            topk_idx=indices_TK,
            topk_weights=weights_TK,
            config=self._configs[0],
            **layout,
        )
        route = self.Route(handle, indices_TK, layout)
        return Received(_parts(rows), local_MK.long(), weights_MK, route)

    def spread_again(
        self, parts: list[Tensor], weights_TK: Tensor | None, route: Any
    ) -> tuple[list[Tensor], Tensor | None]:
        if weights_TK is not None:  # a handle carries none
            found = self._dispatch(parts, route.indices_TK, weights_TK, route.layout)
            return found.parts, found.weights_MK
        config = self._configs[0]
        rows, *_ = self._buffer.dispatch(_payload(parts), handle=route.handle, config=config)
        return _parts(rows), None

    def gather(
        self, rows_MH: Tensor, weights_MK: Tensor | None, route: Any
    ) -> tuple[Tensor, Tensor | None]:
        config = self._configs[1]
        y, weights, _ = self._buffer.combine(
            rows_MH, route.handle, topk_weights=weights_MK, config=config
        )
        return y, weights


class Elastic(Exchange):
    """V2.

    Args:
        group_limited: each token's experts lie on fewer nodes than a free choice would reach.
    """

    version = "V2 ElasticBuffer"
    least_capability = (9, 0)
    MOST_SLOTS, MOST_SLOTS_A_RANK = 2048, 256

    def __init__(
        self,
        library: Any,
        group: dist.ProcessGroup,
        num_slots: int,
        timeout_s: float,
        *,
        num_sms: int | None = None,
        group_limited: bool,
    ) -> None:
        super().__init__(library, group, num_slots, timeout_s, num_sms=num_sms)
        self._group_limited = group_limited
        self._most_tokens = 0
        self._num_sms: dict[int, int] = {}  # by the number of choices

    @classmethod
    def hidden_multiple(cls, num_ranks: int, payload: str) -> int:
        """The combine kernel has a warp sum 32 x 16 bytes at a time."""
        del num_ranks, payload
        return 256

    def reserve(self, num_tokens: int, hidden: int, top_k: int, payload: str) -> None:
        if num_tokens > self._most_tokens:
            self._most_tokens = _roomy(num_tokens)
        kind = self._library.ElasticBuffer
        sizes: dict[str, Any] = {
            "num_max_tokens_per_rank": self._most_tokens,
            "hidden": hidden,
            "num_topk": top_k,
            "use_fp8_dispatch": payload == "fp8",
        }
        needed = kind.get_buffer_size_hint(self._group, **sizes)
        if self._buffer is not None and self._buffer.num_bytes >= needed:
            return
        self.close()
        seconds = math.ceil(self._timeout_s)
        self._buffer = kind(
            self._group,
            **sizes,
            deterministic=True,  # tokens by source rank, then token, whoever came first
            num_cpu_timeout_secs=seconds,
            num_gpu_timeout_secs=seconds,
            explicitly_destroy=True,
        )

    def spread(self, parts: list[Tensor], slots_TK: Tensor, weights_TK: Tensor) -> Received:
        top_k = slots_TK.shape[1]
        if top_k not in self._num_sms:
            self._num_sms[top_k] = self._wanted_sms or self._agree_on_sms(top_k)
        rows, local_MK, weights_MK, handle, _ = self._buffer.dispatch(
            _payload(parts),
            topk_idx=slots_TK.to(self._index_dtype).contiguous(),
            topk_weights=weights_TK,
            num_experts=self._num_slots,
            num_max_tokens_per_rank=self._most_tokens,
            expert_alignment=1,  # rows are aligned where they are grouped
            num_sms=self._num_sms[top_k],
        )
        return Received(_parts(rows), local_MK.long(), weights_MK, handle)

    def _agree_on_sms(self, top_k: int) -> int:
        """One number for all ranks, whose links may have been found out differently: the largest.

        Raises:
            CommError: a peer died, or did not answer within the process group's limit.
        """
        if self._group_limited:
            return DEFAULT_SMS
        what = "DeepEP's number of SMs"
        most = max(gather(self._estimated_sms(top_k), self._group, what))
        if not most and not self._group.rank():
            _LOG.warning(
                "DeepEP could not find out the links' bandwidth; it gets %d SMs", DEFAULT_SMS
            )
        return most or DEFAULT_SMS

    def _estimated_sms(self, top_k: int) -> int:
        """DeepEP's estimate, or 0 where it does not know the bandwidth of the links."""
        estimate = partial(self._buffer.get_theoretical_num_sms, self._num_slots, top_k)
        try:
            num_sms = estimate()
            # Slower SMs must have to be more; if not, it took the bandwidth for 0.
            return num_sms if estimate(sm_read_gbs=1e-3, sm_write_gbs=1e-3) > num_sms else 0
        except ZeroDivisionError:
            return 0

    def spread_again(
        self, parts: list[Tensor], weights_TK: Tensor | None, route: Any
    ) -> tuple[list[Tensor], Tensor | None]:
        # The number of SMs must be the first dispatch's; left out, it cannot be worked out.
        rows, _, weights_MK, _, _ = self._buffer.dispatch(
            _payload(parts), topk_weights=weights_TK, handle=route, num_sms=route.num_sms
        )
        return _parts(rows), weights_MK

    def gather(
        self, rows_MH: Tensor, weights_MK: Tensor | None, route: Any
    ) -> tuple[Tensor, Tensor | None]:
        y, weights, _ = self._buffer.combine(rows_MH, route, topk_weights=weights_MK)
        return y, weights


def _payload(parts: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return parts[0] if len(parts) == 1 else tuple(parts)


def _parts(rows: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [rows] if isinstance(rows, Tensor) else list(rows)


def _roomy(num_tokens: int) -> int:
    """`num_tokens` and up to an eighth more: each other number is kernels to compile anew."""
    step = max(16, 1 << max(0, num_tokens.bit_length() - 4))
    return -(-num_tokens // step) * step
