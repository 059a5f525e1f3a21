"""The grouped product's kernel against its reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterflow.model.grouped import grouped_linear
from counterflow.parallel.chunk import WeightGradQueue


@pytest.mark.parametrize("counts", [[17, 0, 40, 7], [0, 0, 3], [0, 0]], ids=str)
def test_the_kernel_agrees_with_the_reference(counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(counts), 64, generator=generator)
    weight = torch.randn(len(counts), 32, 64, generator=generator)
    grad = torch.randn(sum(counts), 32, generator=generator)
    results: list[list[Tensor]] = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        r, w, g = (t.bfloat16().to(device, dtype) for t in (rows, weight, grad))
        r.requires_grad_()
        w.requires_grad_()
        out = grouped_linear(r, w, counts, WeightGradQueue())
        out.backward(g)
        assert r.grad is not None
        assert w.grad is not None
        results.append([t.detach().cpu().double() for t in (out, r.grad, w.grad)])
    for expected, actual in zip(*results, strict=True):
        # one rounding to bfloat16 of sums kept in float32
        torch.testing.assert_close(actual, expected, rtol=2**-8, atol=1e-3)
