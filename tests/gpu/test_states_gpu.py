"""Gradients, moments and averages on a GPU against the CPU's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from counterflow.fp8.adamw import AdamW
from counterflow.launch.ema import EMA
from counterflow.model.grouped import grouped_linear
from counterflow.parallel.accumulate import accumulate_in_float32
from counterflow.parallel.chunk import WeightGradQueue
from counterflow.parallel.deferred import linear


def whole_numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 10, shape, generator=generator).float()


def test_float32_gradients_of_bfloat16_products_are_exact_where_float32_is() -> None:
    """Whole numbers: their products and sums are exact in float32, and not in bfloat16."""
    found: list[Tensor] = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        weight = nn.Parameter(whole_numbers(48, 32, seed=0).to(device, dtype))
        accumulate_in_float32([weight])
        for number in range(8):
            x = whole_numbers(64, 32, seed=2 * number + 1).to(device, dtype)
            grad = whole_numbers(64, 48, seed=2 * number + 2).to(device, dtype)
            linear(x, weight, None, WeightGradQueue()).backward(grad)
        assert weight.grad is not None
        found.append(weight.grad.cpu().double())
    assert torch.equal(*found)


def test_grouped_gradients_are_rounded_once_a_micro_batch_at_most() -> None:
    counts = [17, 0, 40, 7]
    found: list[Tensor] = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        weight = nn.Parameter(whole_numbers(4, 48, 32, seed=0).to(device, dtype))
        accumulate_in_float32([weight])
        for number in range(8):
            x = whole_numbers(64, 32, seed=2 * number + 1).to(device, dtype)
            grad = whole_numbers(64, 48, seed=2 * number + 2).to(device, dtype)
            grouped_linear(x, weight, counts, WeightGradQueue()).backward(grad)
        assert weight.grad is not None
        found.append(weight.grad.cpu().double())
    # Each product is off by 2**-8 at most, all are positive, and their sum is not rounded again.
    torch.testing.assert_close(found[1], found[0], rtol=2**-8, atol=0)


def test_adamw_with_bfloat16_moments_has_the_bits_of_the_cpu() -> None:
    found: list[list[Tensor]] = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(1000, 37, generator=generator).to(device))
        optimizer = AdamW([p], lr=0.01)
        for _ in range(5):
            powers = 10.0 ** torch.randint(-20, 5, p.shape, generator=generator)
            p.grad = (torch.randn(p.shape, generator=generator) * powers).to(device)
            optimizer.step()
        state = optimizer.state[p]
        found.append([t.detach().cpu() for t in (p, state["exp_avg"], state["exp_avg_sq"])])
    for mine, reference in zip(*found, strict=True):
        assert torch.equal(mine, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_moving_average_of_a_gpus_parameters_has_the_bits_of_the_cpus(
    dtype: torch.dtype,
) -> None:
    start = whole_numbers(2000, 1000, seed=0)
    found: list[Tensor] = []
    for device in ("cpu", "cuda"):
        p = nn.Parameter(start.to(device, dtype, copy=True))
        with EMA([("p", p)], 0.9) as average, torch.no_grad():
            for _ in range(6):
                average.before_change()
                p.mul_(0.75)
                average.update()
            before = p.clone()
            with average.swapped():
                assert not torch.equal(p, before)
            assert torch.equal(p, before)
            found.append(average.state_dict()["averages"]["p"].clone())
    assert torch.equal(*found)
