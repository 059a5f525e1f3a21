"""Grouped matrix products against one product for each expert."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from counterflow.model.grouped import grouped_linear
from counterflow.parallel.chunk import WeightGradQueue

COUNTS = [3, 0, 5, 1, 0]


def operands(counts: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(counts), 6, generator=generator, dtype=dtype)
    weight = torch.randn(len(counts), 4, 6, generator=generator, dtype=dtype)
    return rows.requires_grad_(), weight.requires_grad_()


def one_by_one(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    pieces = zip(rows.split(counts), weight, strict=True)
    return torch.cat([piece @ w.T for piece, w in pieces])


@pytest.mark.parametrize("counts", [COUNTS, [0, 0, 4], [0, 0], [2]], ids=str)
@pytest.mark.parametrize("queued", [False, True])
def test_values_and_gradients_are_those_of_one_product_each(
    counts: list[int], queued: bool
) -> None:
    rows, weight = operands(counts)
    out = grouped_linear(rows, weight, counts, WeightGradQueue() if queued else None)
    (out**2).sum().backward()
    rows_2, weight_2 = operands(counts)
    expected = one_by_one(rows_2, weight_2, counts)
    (expected**2).sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(rows.grad, rows_2.grad)
    torch.testing.assert_close(weight.grad, weight_2.grad)


def test_gradient_is_that_of_finite_differences() -> None:
    rows, weight = operands(COUNTS)
    assert torch.autograd.gradcheck(lambda r, w: grouped_linear(r, w, COUNTS), (rows, weight))


def test_an_expert_without_rows_has_a_gradient_of_zeros() -> None:
    rows, weight = operands(COUNTS)
    grouped_linear(rows, weight, COUNTS, WeightGradQueue()).sum().backward()
    assert weight.grad is not None
    empty = [count == 0 for count in COUNTS]
    assert [bool((g == 0).all()) for g in weight.grad] == empty


def test_deferred_weight_gradient_is_the_same_bits_and_adds_up() -> None:
    queue = WeightGradQueue()
    rows, weight = operands(COUNTS)
    full_rows, full_weight = operands(COUNTS)
    for _ in range(2):
        grouped_linear(full_rows, full_weight, COUNTS, WeightGradQueue()).sin().sum().backward()
        queue.deferring = True
        before = torch.zeros(0) if weight.grad is None else weight.grad.clone()
        grouped_linear(rows, weight, COUNTS, queue).sin().sum().backward()
        assert len(queue) == 1
        after = torch.zeros(0) if weight.grad is None else weight.grad
        assert torch.equal(after, before)
        queue.run()
    for ours, full in ((weight.grad, full_weight.grad), (rows.grad, full_rows.grad)):
        assert ours is not None
        assert full is not None
        assert torch.equal(ours, full)


def test_flops_are_those_of_the_rows_alone() -> None:
    rows, weight = operands(COUNTS)
    with FlopCounterMode(display=False) as counter:
        grouped_linear(rows, weight, COUNTS).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * sum(COUNTS) * 4 * 6


def test_a_weight_that_is_computed_takes_the_ordinary_path() -> None:
    rows, weight = operands(COUNTS)
    queue = WeightGradQueue()
    queue.deferring = True
    grouped_linear(rows, weight * 2, COUNTS, queue).sum().backward()
    assert len(queue) == 0
    assert weight.grad is not None


def test_counts_that_do_not_fit_are_refused() -> None:
    rows, weight = operands(COUNTS)
    with pytest.raises(ValueError, match="4 experts and 9 rows"):
        grouped_linear(rows, weight, [3, 0, 5, 1])
    with pytest.raises(ValueError, match="5 experts and 8 rows"):
        grouped_linear(rows, weight, [3, 0, 5, 0, 0])
