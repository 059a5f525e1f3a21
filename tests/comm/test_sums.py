"""Sums of rows: in order, in float32 at least, rounded once."""

from __future__ import annotations

import pytest
import torch

from counterflow.comm.dispatch.sums import Bags

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SIZES = [3, 0, 1, 8, 2, 0, 5]


def bags(random: torch.Generator, num_rows: int) -> Bags:
    return Bags.of(torch.randint(num_rows, (sum(SIZES),), generator=random), torch.tensor(SIZES))


@pytest.mark.parametrize("width", [1, 7, 64, 129, 513])
@pytest.mark.parametrize("into", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_bag_is_added_row_after_row_and_rounded_once(
    dtype: torch.dtype, into: torch.dtype, width: int
) -> None:
    random = torch.Generator().manual_seed(width)
    # Of very different sizes, so that another order or a narrower sum gives other bits.
    rows = torch.randn(10, width, generator=random, dtype=torch.float64)
    rows = (rows * torch.tensor([2.0**e for e in range(-6, 4)])[:, None]).to(dtype)
    given = bags(random, 10)
    wide = torch.promote_types(torch.promote_types(dtype, into), torch.float32)
    expected, at = torch.zeros(len(SIZES), width, dtype=wide), 0
    for b, size in enumerate(SIZES):
        for index in given.index_M[at : at + size]:
            expected[b] += rows[index].to(wide)
        at += size
    found = given.sum(rows, into)
    assert found.dtype == into
    assert torch.equal(found, expected.to(into))


def test_neighbouring_bags_add_up_as_one() -> None:
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(10, 3, generator=random)
    sizes = torch.tensor([2, 0, 1, 3, 0, 0])
    index = torch.randint(10, (6,), generator=random)
    pairs = Bags.of(index, sizes).every(2)
    assert torch.equal(
        pairs.sum(rows, torch.float32),
        Bags.of(index, torch.tensor([2, 4, 0])).sum(rows, rows.dtype),
    )


def test_no_rows_and_no_bags_are_zeros_of_the_right_shape() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = Bags.of(nothing, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(empty.sum(torch.ones(4, 2), torch.bfloat16), torch.zeros(3, 2).bfloat16())
    assert torch.equal(empty.sum(torch.ones(0, 2), torch.float64), torch.zeros(3, 2).double())
    assert Bags.of(nothing, nothing).sum(torch.ones(4, 2), torch.float32).shape == (0, 2)
