"""Grouped matrix products: each expert's rows times that expert's weight, in one call.

Shapes: N rows grouped by expert, E experts, D input size, K output size. `counts` has the rows of
each expert; zeros are fine, and so is N = 0.

The reference is a loop over experts and serves every device and dtype. On a GPU with compute
capability 8 or more, bfloat16 goes through `torch.nn.functional.grouped_mm`. That kernel writes
bfloat16, so a weight gradient that is added up in float32 is rounded once a micro-batch there; the
loop does not round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..parallel.accumulate import add_product, grad_dtype
from ..parallel.chunk import WeightGradQueue


def grouped_linear(
    rows_ND: Tensor,
    weight_EKD: Tensor,
    counts: Sequence[int],
    queue: WeightGradQueue | None = None,
) -> Tensor:
    """Row n of expert e becomes `rows[n] @ weight[e].T`; differentiable once.

    An expert without rows adds nothing to its slice of the weight's gradient, which is there (as
    zeros) all the same.

    Args:
        rows_ND: [N, D], grouped by expert.
        weight_EKD: [E, K, D], dtype of rows.
        counts: E numbers that add up to N.
        queue: where the weight gradient goes; None, or a weight that is computed and not a leaf,
            takes the ordinary path.

    Returns:
        [N, K].

    Raises:
        ValueError: counts do not match the rows or the experts.
    """
    if len(counts) != len(weight_EKD) or sum(counts) != len(rows_ND):
        raise ValueError(
            f"counts has {len(counts)} experts and {sum(counts)} rows, but there are weights for "
            f"{len(weight_EKD)} experts and {len(rows_ND)} rows"
        )
    if not (weight_EKD.is_leaf and torch.is_grad_enabled()):
        queue = None
    return _GroupedLinear.apply(rows_ND, weight_EKD, list(counts), queue)  # pyright: ignore[reportReturnType]


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        weight_EKD: Tensor,
        counts: list[int],
        queue: WeightGradQueue | None,
    ) -> Tensor:
        ctx.save_for_backward(rows_ND, weight_EKD)
        ctx.counts, ctx.queue = counts, queue
        return _rows_times(rows_ND, weight_EKD.transpose(1, 2), counts)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_NK: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows_ND, weight_EKD = ctx.saved_tensors
        needs_rows, needs_weight, _, _ = ctx.needs_input_grad
        counts: list[int] = ctx.counts
        queue: WeightGradQueue | None = ctx.queue
        grad_rows = _rows_times(grad_NK, weight_EKD, counts) if needs_rows else None
        grad_weight = None
        if needs_weight and queue is None:
            grad_weight = torch.zeros_like(weight_EKD, dtype=grad_dtype(weight_EKD))
            _add_weight_grad(grad_weight, grad_NK, rows_ND, counts)
        elif needs_weight and queue is not None:
            waiting_ND = rows_ND.detach()  # or the graph that made it would wait as well

            def work() -> None:
                if weight_EKD.grad is None:
                    weight_EKD.grad = torch.zeros_like(weight_EKD, dtype=grad_dtype(weight_EKD))
                _add_weight_grad(weight_EKD.grad, grad_NK, waiting_ND, counts)

            queue.put(work)
        return grad_rows, grad_weight, None, None


def _rows_times(rows_NA: Tensor, weight_EAB: Tensor, counts: list[int]) -> Tensor:
    """Each row times its expert's matrix: [N, B]."""
    if _has_kernel(rows_NA, weight_EAB, weight_EAB.shape[1:]):
        return F.grouped_mm(rows_NA.contiguous(), weight_EAB, offs=_ends(counts, rows_NA.device))
    out_NB = rows_NA.new_empty(len(rows_NA), weight_EAB.shape[2])
    for expert, rows in _slices(counts):
        torch.mm(rows_NA[rows], weight_EAB[expert], out=out_NB[rows])
    return out_NB


def _add_weight_grad(into_EKD: Tensor, grad_NK: Tensor, rows_ND: Tensor, counts: list[int]) -> None:
    """into[e] += grad[rows of e].T @ rows[rows of e]; experts without rows are not touched."""
    if _has_kernel(grad_NK, rows_ND, into_EKD.shape[1:]):
        ends = _ends(counts, rows_ND.device)
        product = F.grouped_mm(grad_NK.contiguous().t(), rows_ND.contiguous(), offs=ends)
        # What the kernel leaves in the slice of an empty group is not specified.
        filled = torch.tensor([e for e, _ in _slices(counts)], device=rows_ND.device)
        if len(filled):
            into_EKD.index_add_(0, filled, product.index_select(0, filled).to(into_EKD.dtype))
        return
    for expert, rows in _slices(counts):
        add_product(into_EKD[expert], grad_NK[rows].t(), rows_ND[rows])


def _has_kernel(rows: Tensor, other: Tensor, sizes: Sequence[int]) -> bool:
    """Whether torch's grouped kernel takes these: bfloat16, 16-byte strides, a recent GPU.

    `sizes` are those of one expert's matrix.
    """
    return (
        rows.is_cuda
        and rows.dtype == other.dtype == torch.bfloat16
        and len(rows) > 0
        and all(size % 8 == 0 for size in sizes)
        and torch.cuda.get_device_capability(rows.device) >= (8, 0)
    )


def _ends(counts: list[int], device: torch.device) -> Tensor:
    """Where each expert's rows end: [E] int32, as the kernel wants it."""
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)


def _slices(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, with where those are."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count
