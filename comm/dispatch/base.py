"""What every dispatcher is: the interface, its split form, and the checks of what users hand in.

Shapes: T tokens of this rank, K experts a token, D hidden size, E experts, N rows routed to this
rank's experts.

A dispatch goes through three steps, so that each can run beside other work:

    preprocess    which row goes where: start_preprocess -> Pending[Handle]
    communicate   start_dispatch / start_combine -> Pending, and the same for their backwards
    postprocess   Pending.finish(): wait, and put the rows in order

A backend provides `start_preprocess` and two moves: *spread*, a token's row to each of its experts,
and *gather*, the experts' rows back to their token, summed. The four communications are those two:

    dispatch(F)  spread x and weights              combine(F)  gather rows
    dispatch(B)  gather gradients of rows, weights  combine(B)  spread gradients of y
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...fp8 import Quantized
from ...fp8.carried import carry
from ...parallel.mesh import Mesh
from .census import UNKNOWN, Declared
from .exchange import Pending
from .lane import lane_of
from .layout import ExpertLayout
from .payload import Payload


class Handle:
    """The route of one dispatch, opaque but for these sizes.

    It may serve again, for recomputation: only the first dispatch with it carries indices.

    Attributes:
        num_tokens: T.
        top_k: K.
        slots_TK: the slot of each choice, -1 for none.
        counts: rows of each local slot, padding included.
    """

    def __init__(self, owner: object, slots_TK: Tensor, counts: list[int]) -> None:
        self.num_tokens, self.top_k = slots_TK.shape
        self.slots_TK = slots_TK
        self.counts = counts
        self.owner = owner  # the dispatcher that made it
        self.experts_TK: Tensor | None = None  # what it was made for, if `dispatch` made it
        self.was_dispatched = False

    @property
    def num_rows(self) -> int:
        """N, the rows handed to this rank's experts."""
        return sum(self.counts)


@dataclass(frozen=True)
class Dispatched:
    """What arrived at this rank's experts.

    Attributes:
        rows_ND: grouped by local slot, contiguous; within a slot by source rank, then token, then
            padding of zeros.
        weights_N: the router's weight of each row; 0 of padding.
        counts: rows of each local slot, padding included, in order; zeros allowed.
        handle: what `combine` needs.
        tiles: the rows as they travelled, where the payload is "fp8"; `rows_ND` carries them, so
            that an FP8 product takes them as they are (see `fp8.carried`).
    """

    rows_ND: Tensor
    weights_N: Tensor
    counts: list[int]
    handle: Handle
    tiles: Quantized | None = None


class Arrived(NamedTuple):
    """What a spread brought: fields as of `Dispatched`; weights where they were sent."""

    rows_ND: Tensor
    weights_N: Tensor | None
    tiles: Quantized | None


@dataclass(frozen=True)
class Options:
    """What all backends take; see `dispatcher`."""

    payload: Payload = field(default_factory=Payload)
    alignment: int = 1
    node_limit: int | None = None
    chunks: int = 4
    check: bool | None = None
    hidden: int | None = None
    top_k: int | None = None
    timeout_s: float = 300.0
    num_sms: int | None = None

    def __post_init__(self) -> None:
        for name in ("alignment", "chunks", "node_limit", "hidden", "top_k", "num_sms"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number from 1 up, got {value!r}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0 seconds, got {self.timeout_s!r}")


H = TypeVar("H", bound=Handle)
R = TypeVar("R")


class Dispatcher(ABC, Generic[H]):
    """Moves tokens to the ranks of their experts and the experts' rows back.

    Every call is a collective of the expert-parallel group: all its ranks make the same calls in
    the same order, those without tokens or without rows too. So the rows handed to `combine` must
    be computed from `Dispatched.rows_ND` even where N is 0, or the backward of that rank's dispatch
    never runs and its peers wait in vain.

    Attributes:
        name: "flat", "dedup", "two_hop" or "deep_ep".
        why: why this one, in a sentence.
        layout: which expert stands where.
        num_experts: E, over the whole group.
        local_experts: the expert in each slot of this rank.
        sent_bytes: by operation, the payload bytes sent to each ep rank so far.
        lane: where its moves run, in the order of their starts.
    """

    name: str

    def __init__(self, mesh: Mesh, layout: ExpertLayout, options: Options) -> None:
        if layout.num_ranks != mesh.shape.ep:
            raise ValueError(
                f"the layout is for {layout.num_ranks} expert-parallel ranks, the mesh has "
                f"ep={mesh.shape.ep}"
            )
        require_groups(mesh)
        self.why = "asked for by name"
        self.layout = layout
        self.num_experts = layout.num_experts
        self.local_experts: Sequence[int] = layout.experts_of(mesh.ep_rank)
        self.sent_bytes: dict[str, list[int]] = {}
        self.options = options
        self._nodes = [mesh.nodes[r] for r in mesh.shape.ep_peers(mesh.rank)]
        self._ep_rank = mesh.ep_rank
        self.lane = lane_of(mesh)

    @property
    def crossed_bytes(self) -> int:
        """Payload bytes that this rank has sent to other nodes so far."""
        here = self._nodes[self._ep_rank]
        away = [rank for rank, node in enumerate(self._nodes) if node != here]
        return sum(sent[rank] for sent in self.sent_bytes.values() for rank in away)

    def dispatch(
        self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, handle: H | None = None
    ) -> Dispatched:
        """Send each token's row to its experts. Differentiable once, in x and weights.

        Args:
            x_TD: [T, D], any floating dtype; T may be 0 and may differ by rank.
            experts_TK: [T, K] int64, in 0..E-1, or -1 for no expert.
            weights_TK: [T, K], any floating dtype; those of -1 are not looked at.
            handle: from an earlier dispatch of the same `experts_TK` (recomputation): no counts and
                no indices are exchanged then.

        Raises:
            ValueError: a shape, a dtype, a device, an expert's index of any rank (known to all of
                them at once), or a weight is wrong.
            CommError: a peer died or the limit expired.
        """
        from .autograd import dispatch

        if handle is None:
            handle = self.start_checked_preprocess(x_TD, experts_TK, weights_TK).finish()
        else:
            self._check_reused(handle, x_TD, experts_TK)
        rows_ND, weights_N, tiles = dispatch(self, handle, x_TD, weights_TK)
        rows_ND = _with_tiles(rows_ND, tiles)
        return Dispatched(rows_ND, weights_N, handle.counts, handle, tiles)

    def _check_reused(self, handle: H, x_TD: Tensor, experts_TK: Tensor) -> None:
        _check_device(x_TD, experts_TK)
        self._check_owner(handle)
        if (handle.num_tokens, handle.top_k) != tuple(experts_TK.shape):
            raise ValueError(
                f"the handle is of a dispatch of {handle.num_tokens} tokens x {handle.top_k} "
                f"experts, experts_TK is {tuple(experts_TK.shape)}"
            )
        known_TK = handle.experts_TK
        # A GPU would have to stop for a look at the values.
        if known_TK is not None and known_TK.is_cpu and not torch.equal(known_TK, experts_TK):
            raise ValueError(
                "the handle is of a dispatch to other experts; dispatch without it, or with the "
                "experts_TK that it was made for"
            )

    def start_checked_preprocess(
        self,
        x_TD: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        needs: tuple[bool, bool] | None = None,
    ) -> Pending[H]:
        """`start_preprocess` of what `dispatch` takes; if it is wrong, all ranks learn of it.

        `needs` says whether x and the weights need a gradient; None: what autograd says.
        """
        try:
            self._check_experts(experts_TK)
            _check_device(x_TD, experts_TK)
            self._check_tokens(x_TD, weights_TK, *experts_TK.shape)
            self._check_weights(experts_TK, weights_TK)
        except ValueError:
            # Without a word the others would wait, and take the next dispatch for this one.
            devices = [t.device for t in (experts_TK, x_TD, weights_TK) if t.device.type != "meta"]
            nothing = torch.zeros((0, 1), dtype=torch.int64, device=(*devices, "cpu")[0])
            with suppress(ValueError):
                self.start_preprocess(nothing, Declared(refused=1)).finish()
            raise

        def noted(handle: H) -> H:
            handle.experts_TK = experts_TK
            return handle

        return self.start_preprocess(experts_TK, Declared.of(x_TD, weights_TK, needs)).then(noted)

    def combine(self, rows_ND: Tensor, handle: H) -> Tensor:
        """Send each row back to its token and sum a token's K rows, in a fixed order.

        The order is the backend's (see `reference`). Differentiable once. What is narrower than
        float32 is summed in float32, and rounded once in each place where rows are summed.

        Args:
            rows_ND: [N, D], any floating dtype, in the order of `Dispatched.rows_ND`, already
                multiplied by the weights. Padding is not looked at.
            handle: of the dispatch.

        Returns:
            y_TD: [T, D], dtype of rows_ND.

        Raises:
            ValueError: rows of another number or shape.
            CommError: a peer died or the limit expired.
        """
        from .autograd import combine

        return combine(self, handle, rows_ND)

    def close(self) -> None:
        """Give back the memory that is kept for messages; a collective of the group."""
        self.lane.buffers.clear()

    @abstractmethod
    def start_preprocess(self, experts_TK: Tensor, declared: Declared = UNKNOWN) -> Pending[H]:
        """Work out the route and start exchanging the counts.

        `finish` waits on the host for the device, because the sizes of buffers are only known once
        the counts have arrived. Raises as `dispatch` does.

        Args:
            experts_TK: as of `dispatch`.
            declared: of the tensors to come; ranks compare what they know, and refuse together.
        """

    def start_dispatch(self, x_TD: Tensor, weights_TK: Tensor, handle: H) -> Pending[Arrived]:
        """dispatch(F), without autograd: Pending `Arrived`, with weights.

        As with the other three, what is handed in must not change until `finish`.
        """
        self._check_owner(handle)
        self._check_tokens(x_TD, weights_TK, handle.num_tokens, handle.top_k)
        self._check_weights(handle.slots_TK, weights_TK)
        with_slots, handle.was_dispatched = not handle.was_dispatched, True
        return self._start_spread(x_TD, weights_TK, handle, "dispatch(F)", with_slots=with_slots)

    def start_combine(self, rows_ND: Tensor, handle: H) -> Pending[Tensor]:
        """combine(F), without autograd: Pending y_TD."""
        self._check_rows(rows_ND, handle)
        return self._start_gather(rows_ND, None, handle, "combine(F)").then(_first)

    def start_dispatch_backward(
        self, grad_rows_ND: Tensor | None, grad_weights_N: Tensor | None, handle: H
    ) -> Pending[tuple[Tensor | None, Tensor | None]]:
        """dispatch(B): Pending (grad_x_TD, grad_weights_TK).

        A gradient that is None is not sent; all ranks of the group must agree which.
        """
        self._check_dispatched(handle)
        return self._start_gather(grad_rows_ND, grad_weights_N, handle, "dispatch(B)")

    def start_combine_backward(self, grad_y_TD: Tensor, handle: H) -> Pending[Tensor]:
        """combine(B): Pending grad_rows_ND, each token's gradient at every row of it.

        Rows that travelled in FP8 carry their tiles, as those of `dispatch` do.
        """
        self._check_dispatched(handle)
        if grad_y_TD.dim() != 2 or len(grad_y_TD) != handle.num_tokens or not grad_y_TD.shape[1]:
            raise ValueError(
                f"grad_y_TD must be [T, D] = [{handle.num_tokens}, D], got {_like(grad_y_TD)}"
            )
        pending = self._start_spread(grad_y_TD, None, handle, "combine(B)", with_slots=False)
        return pending.then(lambda arrived: _with_tiles(arrived.rows_ND, arrived.tiles))

    @abstractmethod
    def _start_spread(
        self,
        x_TD: Tensor,
        weights_TK: Tensor | None,
        handle: H,
        operation: str,
        *,
        with_slots: bool,
    ) -> Pending[Arrived]:
        """Start sending rows to their experts; the first time for a handle, `with_slots`."""

    @abstractmethod
    def _start_gather(
        self, rows_ND: Tensor | None, weights_N: Tensor | None, handle: H, operation: str
    ) -> Pending[tuple[Tensor | None, Tensor | None]]:
        """Start sending rows back: Pending (y_TD or None, weights_TK or None), y summed."""

    def _start(
        self, move: Callable[[], R], device: torch.device, operation: str, *, for_host: bool = False
    ) -> Pending[R]:
        limit_s = self.options.timeout_s
        return self.lane.start(move, device, operation, timeout_s=limit_s, for_host=for_host)

    def _check_experts(self, experts_TK: Tensor) -> None:
        if experts_TK.dim() != 2 or experts_TK.shape[1] < 1:
            raise ValueError(f"experts_TK must be [T, K] with K >= 1, got {_like(experts_TK)}")
        if experts_TK.dtype != torch.int64:
            raise ValueError(f"experts_TK must be int64, got {experts_TK.dtype}")

    def _check_tokens(self, x_TD: Tensor, weights_TK: Tensor, num_tokens: int, top_k: int) -> None:
        fits = x_TD.dim() == 2 and x_TD.shape[0] == num_tokens and x_TD.shape[1] > 0
        if not fits or not x_TD.is_floating_point():
            raise ValueError(
                f"x_TD must be [T, D] = [{num_tokens}, D] of a floating dtype, D at least 1, got "
                f"{_like(x_TD)}"
            )
        if tuple(weights_TK.shape) != (num_tokens, top_k) or not weights_TK.is_floating_point():
            raise ValueError(
                f"weights_TK must be [T, K] = [{num_tokens}, {top_k}] of a floating dtype, "
                f"got {_like(weights_TK)}"
            )
        if x_TD.device != weights_TK.device:
            raise ValueError(f"x_TD is on {x_TD.device}, weights_TK on {weights_TK.device}")

    def _check_weights(self, chosen_TK: Tensor, weights_TK: Tensor) -> None:
        """Args: chosen_TK: the expert or slot of each choice, -1 for none."""
        check = self.options.check
        if not (weights_TK.is_cpu if check is None else check):
            return
        wrong_TK = ~weights_TK.detach().isfinite() & (chosen_TK >= 0)
        if wrong_TK.any():
            token, choice = (int(i) for i in wrong_TK.nonzero()[0])
            raise ValueError(
                f"weights_TK of ep rank {self._ep_rank} holds {weights_TK[token, choice]} at token "
                f"{token}, choice {choice}: weights must be finite; look at the router's scores"
            )

    def _check_owner(self, handle: H) -> None:
        if not isinstance(handle, Handle):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"a handle is wanted, got a {type(handle).__name__}; take `.handle` of what "
                "`dispatch` returned, or `.finish()` what `start_preprocess` returned"
            )
        if handle.owner is not self:
            raise ValueError(
                "this handle was made by another dispatcher; use it with the one that made it"
            )

    def _check_dispatched(self, handle: H) -> None:
        self._check_owner(handle)
        if not handle.was_dispatched:
            raise ValueError("nothing has been dispatched with this handle yet: dispatch first")

    def _check_rows(self, rows_ND: Tensor, handle: H) -> None:
        self._check_dispatched(handle)
        if rows_ND.dim() != 2 or len(rows_ND) != handle.num_rows or not rows_ND.is_floating_point():
            raise ValueError(
                f"combine: rows_ND must be [N, D] = [{handle.num_rows}, D] of a floating dtype, "
                f"as dispatched; got {_like(rows_ND)}"
            )


def require_groups(mesh: Mesh) -> None:
    """Raise ValueError where an expert group of several ranks has no process group."""
    if mesh.shape.ep > 1 and mesh.ep_group is None:
        raise ValueError(
            f"this mesh has ep={mesh.shape.ep} but no process groups: make it with Mesh.create"
        )


def _check_device(x_TD: Tensor, experts_TK: Tensor) -> None:
    if x_TD.device != experts_TK.device:
        raise ValueError(f"x_TD is on {x_TD.device}, experts_TK on {experts_TK.device}")


def _with_tiles(rows_ND: Tensor, tiles: Quantized | None) -> Tensor:
    return rows_ND if tiles is None else carry(rows_ND, tiles=tiles)


def _like(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {tensor.dtype}"


def _first(pair: tuple[Tensor | None, Any]) -> Tensor:
    assert pair[0] is not None
    return pair[0]
