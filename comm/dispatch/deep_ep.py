"""Dispatch by DeepEP (github.com/deepseek-ai/DeepEP), where it is installed, on GPUs.

DeepEP moves tokens between ranks; grouping them by expert, padding and the sums over one rank's
experts are the same as of the other backends (`expand`). It moves bfloat16 and FP8 rows with
float32 weights, so the payload "exact" takes bfloat16 only. Each call runs on the dispatcher's
lane, in order, beside the caller's work.

On a GPU the host waits twice for a handle's first dispatch: in the `finish` of `start_preprocess`,
as with every backend, and within `start_dispatch` itself, where DeepEP waits for counts of its own
before it makes room for what arrives. So does V1 whenever weights are sent again with a handle,
and every call that has to make or enlarge DeepEP's buffer. All else is enqueued at its start.

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
from ..waiting import name_ranks
from . import deep_ep_versions as versions
from .base import Arrived, Dispatcher, Handle, Options
from .census import UNKNOWN, Declared, check_census, take_census
from .deep_ep_fit import agreed, filling, load, usable
from .exchange import Peers, Pending
from .expand import Expansion, padded
from .grid import NodeGrid
from .host import to_host
from .layout import ExpertLayout
from .pieces import wanted
from .route import Counts, Plan, SlotTables, count_by_piece, count_entries

__all__ = ["DeepEP", "DeepEPHandle", "usable"]

DEVICE = "cuda"  # where DeepEP's kernels run
SUMMED = torch.bfloat16  # the dtype in which rows come back


class DeepEPHandle(Handle):
    """The route of one dispatch.

    Attributes:
        amounts: how many tokens go where.
        hidden: columns of its rows, those of its first dispatch.
        route, expansion: DeepEP's handle, and from tokens received to rows; once the first
            dispatch has run.
    """

    def __init__(self, owner: DeepEP, slots_TK: Tensor, counts: list[int], amounts: Counts) -> None:
        super().__init__(owner, slots_TK, counts)
        self.amounts = amounts
        self.hidden = 0
        self.route: Any = None
        self.expansion: Expansion | None = None


class DeepEP(Dispatcher[DeepEPHandle]):
    """Dispatch by DeepEP: V2's `ElasticBuffer` where it is installed and the GPU bears it, else V1.

    Making one is a collective of the group. DeepEP's buffer is made with the first dispatch and
    lasts until `close`. A handle serves rows of one width, that of its first dispatch.

    Raises:
        ValueError: on all ranks; DeepEP is not installed on one of them, or cannot serve it.
    """

    name = "deep_ep"

    def __init__(self, mesh: Mesh, layout: ExpertLayout, options: Options) -> None:
        super().__init__(mesh, layout, options)
        version = agreed(mesh, layout, options)
        assert mesh.ep_group is not None  # ep > 1
        settings = (load(), mesh.ep_group, layout.num_slots, options.timeout_s)
        self._grid = NodeGrid.of(self._nodes)
        if version is versions.Elastic:
            limit = options.node_limit
            limited = limit is not None and limit < self._grid.num_nodes
            self._exchange = versions.Elastic(
                *settings, num_sms=options.num_sms, group_limited=limited
            )
        else:
            self._exchange = versions.Legacy(*settings, num_sms=options.num_sms)
        self._plan = Plan(self._grid, self._ep_rank, layout.slots_per_rank, 1)
        self._rank = mesh.rank
        self._ep_peers = mesh.shape.ep_peers(mesh.rank)
        self._everyone = Peers(
            mesh.ep_group, self._ep_peers, mesh.rank, options.timeout_s, self.lane.sequence
        )
        self._tables: dict[torch.device, SlotTables] = {}

    @property
    def version(self) -> str:
        """Which of DeepEP's buffers serves."""
        return self._exchange.version

    def close(self) -> None:
        """Give DeepEP's buffer back, a collective of the group; a dispatch makes a new one."""

        def move() -> None:
            with self._in_library("close"):
                self._exchange.close()

        self._start(move, torch.device(DEVICE), "close").finish()
        super().close()

    # Preprocess

    def start_preprocess(
        self, experts_TK: Tensor, declared: Declared = UNKNOWN
    ) -> Pending[DeepEPHandle]:
        """See `Dispatcher.start_preprocess`."""
        if declared.refused:  # perhaps because it was elsewhere
            experts_TK = experts_TK.to(DEVICE)
        self._check_experts(experts_TK)
        device = experts_TK.device
        if device not in self._tables:
            self._tables[device] = SlotTables(self.layout, self._grid, self._nodes, device)
        tables = self._tables[device]

        def exchange() -> tuple[Tensor, ...]:
            slots_TK = tables.slots(experts_TK, self._ep_rank)
            first_CG, lines = self._count(experts_TK, slots_TK, declared, tables)
            told = self._everyone.tell(lines, "dispatch(F)")
            return slots_TK, to_host(first_CG), to_host(told)

        def finish(found: tuple[Tensor, ...]) -> DeepEPHandle:
            slots_TK, first_CG, told = found
            amounts = self._plan.read(told[:, :-1], first_CG)
            limit = self.options.node_limit
            check_census(amounts.ranks, self._ep_peers, self.num_experts, limit)
            self._check_distinct(told[:, -1].tolist())
            counts = padded(amounts.entries, self.options.alignment)
            return DeepEPHandle(self, slots_TK, counts, amounts)

        pending = self._start(exchange, device, "dispatch(F)", for_host=True)
        return pending.then(finish)

    def _count(
        self, experts_TK: Tensor, slots_TK: Tensor, declared: Declared, tables: SlotTables
    ) -> tuple[Tensor, Tensor]:
        """Tokens by destination of the first hop, [1, G]; and what to tell each rank, [R, length].

        A line ends with whether a token of this rank names an expert twice.
        """
        grid = self._grid
        final_CR = count_by_piece(wanted(tables.rank_P1[slots_TK], grid.num_ranks), 1)
        first_CG = final_CR
        if self._plan.two_hops:
            first_CG = count_by_piece(wanted(tables.node_P1[slots_TK], grid.num_nodes), 1)
        nodes = None if self.options.node_limit is None else tables.node_P1
        census = take_census(experts_TK, slots_TK, declared, nodes, grid.num_nodes)
        entries_P = count_entries(slots_TK, self.layout.num_slots)
        ordered_TK = slots_TK.sort(dim=1).values
        same_TK = (ordered_TK[:, 1:] == ordered_TK[:, :-1]) & (ordered_TK[:, 1:] >= 0)
        twice = same_TK.any().long().expand(grid.num_ranks, 1)
        lines = self._plan.lines(census, first_CG, final_CR, entries_P, tables)
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
        with_slots: bool,
    ) -> Pending[Arrived]:
        payload, dtype, hidden = self.options.payload, x_TD.dtype, x_TD.shape[1]
        self._check_values(f"{operation}: x_TD", x_TD)
        if with_slots:
            handle.hidden = hidden
        self._check_width(operation, hidden, handle)
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
                if with_slots:
                    assert weights is not None
                    slots_TK = _at_least_one(handle.slots_TK, -1)
                    found = self._exchange.spread(parts, slots_TK, weights.contiguous())
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
            return Arrived(payload.decode(rows, hidden, dtype), weights_N, payload.tiles(rows))

        return self._start(move, x_TD.device, operation)

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
        if rows_ND is not None:
            self._check_values(f"{operation}: rows_ND", rows_ND)
            self._check_width(operation, rows_ND.shape[1], handle)
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

        return self._start(move, given.device, operation)

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
        except Exception as error:  # it asserts, and fails in other ways of its own
            setting = filling()
            if setting is not None:
                raise ValueError(setting) from error
            if isinstance(error, RuntimeError):
                reason = backend_reason(error, self.options.timeout_s)
            else:
                said = str(error).strip().splitlines()
                reason = ": ".join([type(error).__name__, *said[:1]])
            raise CommError(
                f"rank {self._rank}: {operation} with {name_ranks(self._everyone.others)} failed "
                f"in DeepEP ({self.version}): {reason}",
                peers=self._everyone.others,
            ) from error

    def _check_experts(self, experts_TK: Tensor) -> None:
        super()._check_experts(experts_TK)
        self._refuse_sizes("experts_TK", None, experts_TK.shape[1])
        self._check_device("experts_TK", experts_TK)

    def _check_tokens(self, x_TD: Tensor, weights_TK: Tensor, num_tokens: int, top_k: int) -> None:
        super()._check_tokens(x_TD, weights_TK, num_tokens, top_k)
        self._check_values("x_TD", x_TD)
        if weights_TK.dtype == torch.float64:
            raise ValueError(
                "DeepEP carries weights in float32, weights_TK is float64: convert it, or use "
                "'two_hop'"
            )

    def _check_values(self, name: str, values: Tensor) -> None:
        """Refuse rows that DeepEP cannot carry."""
        self._check_device(name, values)
        payload = self.options.payload
        if payload.name == "exact" and values.dtype != SUMMED:
            raise ValueError(
                f"{name} is {values.dtype}, but DeepEP moves bfloat16: ask for payload 'bf16' or "
                "'fp8' to have it rounded, or use 'two_hop'"
            )
        self._refuse_sizes(name, values.shape[1], None)

    def _refuse_sizes(self, name: str, hidden: int | None, top_k: int | None) -> None:
        ranks, payload = len(self._ep_peers), self.options.payload.name
        reason = self._exchange.refusal(ranks, payload, hidden, top_k)
        if reason is not None:
            raise ValueError(f"{name}: {reason}; use 'two_hop'")

    def _check_width(self, operation: str, hidden: int, handle: DeepEPHandle) -> None:
        """What DeepEP keeps of a route depends on the width of its rows."""
        if hidden != handle.hidden:
            raise ValueError(
                f"{operation}: rows have {hidden} columns, but this handle's first dispatch had "
                f"{handle.hidden}, and DeepEP's routes serve one width: dispatch without a handle, "
                "or use 'two_hop'"
            )

    def _check_device(self, name: str, values: Tensor) -> None:
        if values.device.type != DEVICE:
            raise ValueError(
                f"{name} is on {values.device}, but DeepEP's kernels run on a GPU; use 'two_hop'"
            )


def _at_least_one(rows: Tensor, value: int = 0) -> Tensor:
    """`rows`, or one of `value` where there are none: DeepEP promises nothing for no tokens."""
    return rows if len(rows) else rows.new_full((1, *rows.shape[1:]), value)
