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
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ...parallel.mesh import Mesh
from .exchange import ExpertGroup, Pending


@dataclass(frozen=True)
class Handle:
    """The route of one dispatch. Opaque but for these sizes; may serve again (recomputation).

    Attributes:
        num_tokens: T.
        top_k: K.
        counts: rows of each local expert; they add up to N.
    """

    num_tokens: int
    top_k: int
    counts: list[int]

    @property
    def num_rows(self) -> int:
        """N, the rows routed to this rank."""
        return sum(self.counts)


@dataclass(frozen=True)
class Dispatched:
    """What arrived at this rank's experts.

    Attributes:
        rows_ND: grouped by local expert, contiguous; within an expert by source rank, then token.
        weights_N: the router's weight of each row.
        counts: rows of each local expert, in order; zeros allowed.
        handle: what `combine` needs.
    """

    rows_ND: Tensor
    weights_N: Tensor
    counts: list[int]
    handle: Handle


H = TypeVar("H", bound=Handle)


class Dispatcher(ABC, Generic[H]):
    """Moves tokens to the ranks of their experts and the experts' rows back.

    Every call is a collective of the expert-parallel group: all its ranks make the same calls in
    the same order, those without tokens or without rows too. So the rows handed to `combine` must
    be computed from `Dispatched.rows_ND` even where N is 0, or the backward of that rank's dispatch
    never runs and its peers wait in vain.

    Attributes:
        num_experts: E, over the whole group.
        local_experts: the experts of this rank.
    """

    def __init__(self, mesh: Mesh, *, num_experts: int, timeout_s: float) -> None:
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        mesh.shape.require_experts(num_experts)
        self.num_experts = num_experts
        share = num_experts // mesh.shape.ep
        self.local_experts = range(mesh.ep_rank * share, (mesh.ep_rank + 1) * share)
        self._group = ExpertGroup(mesh, timeout_s)

    def dispatch(
        self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, handle: H | None = None
    ) -> Dispatched:
        """Send each token's row to its experts. Differentiable once, in x and weights.

        Args:
            x_TD: [T, D], any floating dtype; T may be 0 and may differ by rank.
            experts_TK: [T, K] int64, in 0..E-1. (On a GPU a value out of range is noticed only once
                the counts have been exchanged.)
            weights_TK: [T, K], any floating dtype.
            handle: from an earlier dispatch of the same `experts_TK` (recomputation): no counts are
                exchanged then.

        Raises:
            ValueError: a shape, a dtype, a device or an expert's index is wrong.
            CommError: a peer died or the limit expired.
        """
        from .autograd import dispatch

        self._check_experts(experts_TK)
        if x_TD.device != experts_TK.device:
            raise ValueError(f"x_TD is on {x_TD.device}, experts_TK on {experts_TK.device}")
        if handle is None:
            self._check_tokens(x_TD, weights_TK, *experts_TK.shape)
            handle = self.start_preprocess(experts_TK).finish()
        elif (handle.num_tokens, handle.top_k) != tuple(experts_TK.shape):
            raise ValueError(
                f"the handle is of a dispatch of {handle.num_tokens} tokens x {handle.top_k} "
                f"experts, experts_TK is {tuple(experts_TK.shape)}"
            )
        rows_ND, weights_N = dispatch(self, handle, x_TD, weights_TK)
        return Dispatched(rows_ND, weights_N, handle.counts, handle)

    def combine(self, rows_ND: Tensor, handle: H) -> Tensor:
        """Send each row back to its token and sum a token's K rows, k = 0 first.

        Differentiable once. bfloat16 and float16 are summed in float32 and rounded once.

        Args:
            rows_ND: [N, D], any floating dtype, in the order of `Dispatched.rows_ND`, already
                multiplied by the weights.
            handle: of the dispatch.

        Returns:
            y_TD: [T, D], dtype of rows_ND.

        Raises:
            ValueError: rows of another number or shape.
            CommError: a peer died or the limit expired.
        """
        from .autograd import combine

        return combine(self, handle, rows_ND)

    @abstractmethod
    def start_preprocess(self, experts_TK: Tensor) -> Pending[H]:
        """Work out the route and start exchanging the row counts.

        `finish` is the one place of a dispatch where the host waits for the device: the sizes of
        the buffers are only known once the counts have arrived.
        """

    def start_dispatch(
        self, x_TD: Tensor, weights_TK: Tensor, handle: H
    ) -> Pending[tuple[Tensor, Tensor]]:
        """dispatch(F), without autograd: Pending (rows_ND, weights_N)."""
        self._check_tokens(x_TD, weights_TK, handle.num_tokens, handle.top_k)
        pending = self._start_spread(x_TD, weights_TK, handle, "dispatch(F)")
        return pending.then(_both)

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
        return self._start_gather(grad_rows_ND, grad_weights_N, handle, "dispatch(B)")

    def start_combine_backward(self, grad_y_TD: Tensor, handle: H) -> Pending[Tensor]:
        """combine(B): Pending grad_rows_ND, each token's gradient at every row of it."""
        return self._start_spread(grad_y_TD, None, handle, "combine(B)").then(_first)

    @abstractmethod
    def _start_spread(
        self, x_TD: Tensor, weights_TK: Tensor | None, handle: H, operation: str
    ) -> Pending[tuple[Tensor | None, Tensor | None]]:
        """Start sending rows to their experts: Pending (rows_ND, weights_N or None)."""

    @abstractmethod
    def _start_gather(
        self, rows_ND: Tensor | None, weights_N: Tensor | None, handle: H, operation: str
    ) -> Pending[tuple[Tensor | None, Tensor | None]]:
        """Start sending rows back: Pending (y_TD or None, weights_TK or None), y summed over k."""

    def _check_experts(self, experts_TK: Tensor) -> None:
        if experts_TK.dim() != 2 or experts_TK.shape[1] < 1:
            raise ValueError(f"experts_TK must be [T, K] with K >= 1, got {_like(experts_TK)}")
        if experts_TK.dtype != torch.int64:
            raise ValueError(f"experts_TK must be int64, got {experts_TK.dtype}")
        # On a GPU this would stop the host; there the exchanged counts tell (see start_preprocess).
        if experts_TK.is_cpu and experts_TK.numel():
            low, high = (int(end) for end in experts_TK.aminmax())
            if low < 0 or high >= self.num_experts:
                raise self._out_of_range(f"{low}..{high}")

    def _out_of_range(self, found: str) -> ValueError:
        return ValueError(
            f"experts_TK holds experts {found}, but this dispatcher has {self.num_experts}: "
            f"0..{self.num_experts - 1}"
        )

    def _check_tokens(self, x_TD: Tensor, weights_TK: Tensor, num_tokens: int, top_k: int) -> None:
        if x_TD.dim() != 2 or x_TD.shape[0] != num_tokens or not x_TD.is_floating_point():
            raise ValueError(
                f"x_TD must be [T, D] = [{num_tokens}, D] of a floating dtype, got {_like(x_TD)}"
            )
        if tuple(weights_TK.shape) != (num_tokens, top_k) or not weights_TK.is_floating_point():
            raise ValueError(
                f"weights_TK must be [T, K] = [{num_tokens}, {top_k}] of a floating dtype, "
                f"got {_like(weights_TK)}"
            )
        if x_TD.device != weights_TK.device:
            raise ValueError(f"x_TD is on {x_TD.device}, weights_TK on {weights_TK.device}")

    def _check_rows(self, rows_ND: Tensor, handle: H) -> None:
        if rows_ND.dim() != 2 or len(rows_ND) != handle.num_rows or not rows_ND.is_floating_point():
            raise ValueError(
                f"combine: rows_ND must be [N, D] = [{handle.num_rows}, D] of a floating dtype, "
                f"as dispatched; got {_like(rows_ND)}"
            )


def _like(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {tensor.dtype}"


def _both(pair: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor, Tensor]:
    first, second = pair
    assert first is not None
    assert second is not None
    return first, second


def _first(pair: tuple[Tensor | None, Any]) -> Tensor:
    assert pair[0] is not None
    return pair[0]
