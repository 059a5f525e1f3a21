"""Dispatch by DeepEP (github.com/deepseek-ai/DeepEP), where it is installed, on GPUs.

DeepEP moves tokens between ranks; grouping them by expert, padding and the sums over one rank's
experts are the same as of the other backends (`expand`). It moves bfloat16 and FP8 rows with
float32 weights, so the payload "exact" takes bfloat16 only. Each call runs on the dispatcher's
lane, in order, beside the caller's work.

Shapes: T tokens, K experts a token, D hidden, M tokens received, N rows, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...parallel.mesh import Mesh
from ..errors import CommError, backend_reason
from . import deep_ep_versions as versions
from .base import Arrived, Dispatcher, Handle, Options
from .deep_ep_fit import load, obstacle, usable
from .exchange import Peers, Pending
from .expand import Expansion
from .grid import NodeGrid
from .lane import Lane, to_host
from .layout import ExpertLayout
from .pieces import wanted
from .route import Counts, Plan, SlotTables, check_census, count_entries, take_census

__all__ = ["DeepEP", "DeepEPHandle", "usable"]

DEVICE = "cuda"  # where DeepEP's kernels run
MOST_CHOICES = 32  # the lanes of a warp
SUMMED = torch.bfloat16  # the dtype in which rows come back


class DeepEPHandle(Handle):
    """The route of one dispatch.

    Attributes:
        slots_TK: the slot of each choice, -1 for none; one token without choices where T is 0.
        amounts: how many tokens go where.
        route, expansion: DeepEP's handle, and from tokens received to rows; once the first
            dispatch has run.
    """

    def __init__(self, num_tokens: int, slots_TK: Tensor, amounts: Counts, alignment: int) -> None:
        super().__init__(num_tokens, slots_TK.shape[1])
        self.slots_TK = slots_TK
        self.amounts = amounts
        self.route: Any = None
        self.expansion: Expansion | None = None
        self.counts = [-(-n // alignment) * alignment for n in amounts.entries]


class DeepEP(Dispatcher[DeepEPHandle]):
    """Dispatch by DeepEP: V2's `ElasticBuffer` where the installed version has it, else V1's.

    Its buffer is made with the first dispatch and lasts until `close`.

    Raises:
        ValueError: DeepEP is not installed, or cannot serve this mesh and layout.
    """

    name = "deep_ep"

    def __init__(self, mesh: Mesh, layout: ExpertLayout, options: Options) -> None:
        super().__init__(mesh, layout, options)
        reason = obstacle(mesh, layout)
        if reason is not None:
            advice = "" if "two_hop" in reason else "; use 'two_hop'"
            raise ValueError(f"the dispatcher 'deep_ep' cannot serve here: {reason}{advice}")
        assert mesh.ep_group is not None  # ep > 1
        library = load()
        settings = (library, mesh.ep_group, layout.num_slots, options.timeout_s)
        self._grid = NodeGrid.of(self._nodes)
        if hasattr(library, "ElasticBuffer"):
            limit = options.node_limit
            limited = limit is not None and limit < self._grid.num_nodes
            self._exchange = versions.Elastic(*settings, group_limited=limited)
        else:
            self._exchange = versions.Legacy(*settings)
        self._plan = Plan(self._grid, self._ep_rank, layout.slots_per_rank, 1)
        self._rank = mesh.rank
        self._ep_peers = mesh.shape.ep_peers(mesh.rank)
        self._everyone = Peers(mesh.ep_group, self._ep_peers, mesh.rank, options.timeout_s)
        self._lane = mesh.dispatch_lane or Lane(
            mesh.rank, self._everyone.others, mesh.waits, options.timeout_s
        )
        mesh.dispatch_lane = self._lane
        self._tables: dict[torch.device, SlotTables] = {}

    @property
    def version(self) -> str:
        """Which of DeepEP's buffers serves."""
        return self._exchange.version

    def close(self) -> None:
        """Give DeepEP's buffer back, a collective of the group; a dispatch makes a new one."""
        self._lane.start(self._exchange.close, torch.device(DEVICE), "close").finish()

    # Preprocess

    def start_preprocess(self, experts_TK: Tensor) -> Pending[DeepEPHandle]:
        """See `Dispatcher.start_preprocess`."""
        self._check_experts(experts_TK)
        num_tokens, device = len(experts_TK), experts_TK.device
        if device not in self._tables:
            self._tables[device] = SlotTables(self.layout, self._grid, device)
        tables = self._tables[device]

        def exchange() -> tuple[Tensor, ...]:
            slots_TK = tables.slots(experts_TK, self._ep_rank)
            first_CG, lines = self._count(experts_TK, slots_TK, tables)
            told = torch.empty_like(lines)
            even = [1] * self._everyone.size
            to, by = lines.view(torch.uint8), told.view(torch.uint8)
            self._everyone.start(to, even, by, even, "dispatch(F)")()
            return slots_TK, to_host(first_CG), to_host(told)

        def finish(found: tuple[Tensor, ...]) -> DeepEPHandle:
            slots_TK, first_CG, told = found
            amounts = self._plan.read(told[:, :-1], first_CG)
            limit = self.options.node_limit
            check_census(amounts.ranks, self._ep_peers, self.num_experts, limit)
            self._check_distinct(told[:, -1].tolist())
            if not num_tokens:  # DeepEP promises nothing for no tokens at all
                slots_TK = torch.full((1, experts_TK.shape[1]), -1, device=device)
            return DeepEPHandle(num_tokens, slots_TK, amounts, self.options.alignment)

        pending = self._lane.start(exchange, device, "dispatch(F)", for_host=True)
        return pending.then(finish)

    def _count(
        self, experts_TK: Tensor, slots_TK: Tensor, tables: SlotTables
    ) -> tuple[Tensor, Tensor]:
        """Tokens by destination of the first hop, [1, G]; and what to tell each rank, [R, length].

        A line ends with whether a token of this rank names an expert twice.
        """
        grid = self._grid
        final_CR = wanted(tables.rank_P1[slots_TK], grid.num_ranks).sum(dim=0, keepdim=True)
        first_CG = final_CR
        if self._plan.two_hops:
            first_CG = wanted(tables.node_P1[slots_TK], grid.num_nodes).sum(dim=0, keepdim=True)
        nodes = None if self.options.node_limit is None else tables.node_P1
        census = take_census(experts_TK, slots_TK, nodes, grid.num_nodes)
        entries_P = count_entries(slots_TK, self.layout.num_slots)
        ordered_TK = slots_TK.sort(dim=1).values
        same_TK = (ordered_TK[:, 1:] == ordered_TK[:, :-1]) & (ordered_TK[:, 1:] >= 0)
        twice = same_TK.any().long().expand(grid.num_ranks, 1)
        lines = self._plan.lines(census, first_CG, final_CR, entries_P)
        return first_CG, torch.cat([lines, twice], dim=1).contiguous()

    def _check_distinct(self, twice: list[int]) -> None:
        if any(twice):
            rank = self._ep_peers[twice.index(1)]
            raise ValueError(
                f"a token of rank {rank} names one expert twice, which DeepEP does not take: let "
                "the router choose distinct experts, or use 'two_hop'"
            )

    # Spread

    def _start_spread(
        self,
        x_TD: Tensor,
        weights_TK: Tensor | None,
        handle: DeepEPHandle,
        operation: str,
        *,
        first: bool,
    ) -> Pending[Arrived]:
        payload, dtype, hidden = self.options.payload, x_TD.dtype, x_TD.shape[1]
        # Indices travel with weights.
        choice_bytes = 0 if weights_TK is None else 12 * handle.top_k
        self._count_bytes(operation, handle, payload.row_bytes(hidden, dtype) + choice_bytes)

        def move() -> Arrived:
            parts = payload.encode(_at_least_one(x_TD))
            if payload.name == "fp8":
                parts[0] = parts[0].view(torch.float8_e4m3fn)
            weights = None if weights_TK is None else _at_least_one(weights_TK).float()
            with self._in_library(operation):
                self._reserve(hidden, handle)
                if first:
                    assert weights is not None
                    found = self._exchange.spread(parts, handle.slots_TK, weights.contiguous())
                    handle.route, parts, weights = found.route, found.parts, found.weights_MK
                    handle.expansion = self._expansion(found.local_MK, handle)
                else:
                    parts, weights = self._exchange.spread_again(parts, weights, handle.route)
            expansion = handle.expansion
            assert expansion is not None  # moves run in the order of their starts
            if payload.name == "fp8":
                parts[0] = parts[0].view(torch.uint8)
            rows = [expansion.rows(part) for part in parts]
            weights_N = None
            if weights_TK is not None:
                assert weights is not None
                weights_N = expansion.choices(weights).to(weights_TK.dtype)
            return Arrived(payload.decode(rows, dtype), weights_N, payload.tiles(rows))

        return self._lane.start(move, x_TD.device, operation)

    def _reserve(self, hidden: int, handle: DeepEPHandle) -> None:
        most = max(1, *(census.num_tokens for census in handle.amounts.ranks))
        self._exchange.reserve(most, hidden, handle.top_k, self.options.payload.name)

    def _expansion(self, local_MK: Tensor, handle: DeepEPHandle) -> Expansion:
        elsewhere = self.layout.slots_per_rank
        local_MK = torch.where(local_MK < 0, elsewhere, local_MK)
        return Expansion.of(local_MK, handle.amounts.entries, None, self.options.alignment)

    # Gather

    def _start_gather(
        self,
        rows_ND: Tensor | None,
        weights_N: Tensor | None,
        handle: DeepEPHandle,
        operation: str,
    ) -> Pending[tuple[Tensor | None, Tensor | None]]:
        given = rows_ND if rows_ND is not None else weights_N
        assert given is not None
        # DeepEP sends no weights without rows; the narrowest that any version takes.
        hidden = 256 if rows_ND is None else rows_ND.shape[1]
        width = SUMMED.itemsize * hidden + (0 if weights_N is None else 4 * handle.top_k)
        self._count_bytes(operation, handle, width, back=True)

        def move() -> tuple[Tensor | None, Tensor | None]:
            expansion = handle.expansion
            assert expansion is not None  # moves run in the order of their starts
            if rows_ND is None:
                records = len(expansion.bags.offsets_B)
                rows = torch.zeros(records, hidden, dtype=SUMMED, device=given.device)
            else:
                rows = expansion.sum(rows_ND, SUMMED)
            weights = None
            if weights_N is not None:
                weights = expansion.unchoose(weights_N.float(), handle.top_k)
            with self._in_library(operation):
                self._reserve(hidden, handle)
                y, weights = self._exchange.gather(rows.contiguous(), weights, handle.route)
            y_TD = None if rows_ND is None else y[: handle.num_tokens].to(rows_ND.dtype)
            if weights_N is None:
                return y_TD, None
            assert weights is not None
            return y_TD, weights[: handle.num_tokens].to(weights_N.dtype)

        return self._lane.start(move, given.device, operation)

    # What both share

    def _count_bytes(
        self, operation: str, handle: DeepEPHandle, width: int, *, back: bool = False
    ) -> None:
        """Count what this rank sends: rows of `width` bytes along the hops, or `back` over them."""
        sent = self.sent_bytes.setdefault(operation, [0] * len(self._ep_peers))
        node, index = self._grid.node_of(self._ep_rank), self._grid.index_of(self._ep_rank)
        ways = [self._grid.order]
        if self._plan.two_hops:
            ways = [tuple(row[index] for row in self._grid.rows), self._grid.rows[node]]
        for ranks, (splits,) in zip(ways, handle.amounts.hops, strict=True):
            rows = splits.received if back else splits.sent
            for rank, count in zip(ranks, rows, strict=True):
                if rank != self._ep_rank:
                    sent[rank] += count * width

    @contextmanager
    def _in_library(self, operation: str) -> Iterator[None]:
        """Give an error from within DeepEP this rank's and its peers' names."""
        try:
            yield
        except CommError:
            raise
        except RuntimeError as error:
            raise CommError(
                f"rank {self._rank}: {operation} failed in DeepEP ({self.version}): "
                f"{backend_reason(error, self.options.timeout_s)}",
                peers=self._everyone.others,
            ) from error

    def _check_experts(self, experts_TK: Tensor) -> None:
        super()._check_experts(experts_TK)
        if experts_TK.shape[1] > MOST_CHOICES:
            raise ValueError(
                f"DeepEP takes at most {MOST_CHOICES} experts a token, experts_TK has "
                f"{experts_TK.shape[1]}; use 'two_hop'"
            )
        self._check_device("experts_TK", experts_TK)

    def _check_tokens(self, x_TD: Tensor, weights_TK: Tensor, num_tokens: int, top_k: int) -> None:
        super()._check_tokens(x_TD, weights_TK, num_tokens, top_k)
        self._check_values("x_TD", x_TD)
        if weights_TK.dtype == torch.float64:
            raise ValueError(
                "DeepEP carries weights in float32, weights_TK is float64: convert it, or use "
                "'two_hop'"
            )

    def _check_rows(self, rows_ND: Tensor, handle: DeepEPHandle) -> None:
        super()._check_rows(rows_ND, handle)
        self._check_values("combine: rows_ND", rows_ND)

    def _check_values(self, name: str, values: Tensor) -> None:
        """Refuse rows that DeepEP cannot carry."""
        self._check_device(name, values)
        payload = self.options.payload
        if payload.name == "exact" and values.dtype != SUMMED:
            raise ValueError(
                f"{name} is {values.dtype}, but DeepEP moves bfloat16: ask for payload 'bf16' or "
                "'fp8' to have it rounded, or use 'two_hop'"
            )
        multiple = self._exchange.hidden_multiple(payload.name)
        if values.shape[1] % multiple:
            raise ValueError(
                f"{name} has {values.shape[1]} columns, but DeepEP ({self.version}) takes "
                f"multiples of {multiple}; use 'two_hop'"
            )

    def _check_device(self, name: str, values: Tensor) -> None:
        if values.device.type != DEVICE:
            raise ValueError(
                f"{name} is on {values.device}, but DeepEP's kernels run on a GPU; use 'two_hop'"
            )


def _at_least_one(rows: Tensor) -> Tensor:
    """`rows`, or a row of zeros where there are none."""
    return rows if len(rows) else rows.new_zeros(1, *rows.shape[1:])
