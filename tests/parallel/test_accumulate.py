"""Gradients of bfloat16 parameters add up in float32, by whatever way they come.

Operands are small whole numbers, so that every product and sum is exact in float32, while bfloat16
cannot tell whole numbers above 256 apart.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from counterflow.model.grouped import grouped_linear
from counterflow.parallel.accumulate import accumulate_in_float32, grad_dtype
from counterflow.parallel.chunk import WeightGradQueue
from counterflow.parallel.deferred import linear

MICROBATCHES = 20
COUNTS = [3, 0, 5, 8]  # rows of each expert

Way = Callable[[Tensor, nn.Parameter, nn.Parameter, WeightGradQueue | None], Tensor]


def whole_numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 10, shape, generator=generator).float()


def dense(x: Tensor, w: nn.Parameter, bias: nn.Parameter, queue: WeightGradQueue | None) -> Tensor:
    return linear(x, w, bias, queue)


def grouped(
    x: Tensor, w: nn.Parameter, bias: nn.Parameter, queue: WeightGradQueue | None
) -> Tensor:
    return grouped_linear(x, w, COUNTS, queue) + bias


def gradients(
    way: Way, shape: tuple[int, ...], dtype: torch.dtype, queue: WeightGradQueue | None
) -> tuple[list[Tensor], int]:
    """Of weight and bias after all micro-batches, and the FLOPs; the last backward is split."""
    weight = nn.Parameter(whole_numbers(*shape, seed=0).to(dtype))
    bias = nn.Parameter(whole_numbers(6, seed=1).to(dtype))
    accumulate_in_float32([weight, bias])
    with FlopCounterMode(display=False) as counted:
        for number in range(MICROBATCHES):
            x = whole_numbers(16, 4, seed=2 * number + 2).to(dtype).requires_grad_()
            grad = whole_numbers(16, 6, seed=2 * number + 3).to(dtype)
            if queue is not None:
                queue.deferring = number == MICROBATCHES - 1
            way(x, weight, bias, queue).backward(grad)
        if queue is not None:
            queue.run()
    found = [weight.grad, bias.grad]
    return [g for g in found if g is not None], counted.get_total_flops()


@pytest.mark.parametrize(("way", "shape"), [(dense, (6, 4)), (grouped, (4, 6, 4))])
def test_products_for_a_queue_are_added_without_any_rounding(
    way: Way, shape: tuple[int, ...]
) -> None:
    expected, flops = gradients(way, shape, torch.float64, WeightGradQueue())
    found, counted = gradients(way, shape, torch.bfloat16, WeightGradQueue())
    assert counted == flops
    for grad, exact in zip(found, expected, strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad.double(), exact)
        assert not torch.equal(exact.bfloat16().double(), exact)  # bfloat16 has no room for it


@pytest.mark.parametrize("hook", [False, True], ids=["no queue", "a hook"])
def test_what_comes_by_way_of_autograd_is_added_in_float32(hook: bool) -> None:
    """As with a hook on the parameter, which sees the gradient of each micro-batch."""
    weight = nn.Parameter(torch.ones(2, 1, dtype=torch.bfloat16))
    accumulate_in_float32([weight])
    seen: list[torch.dtype] = []
    if hook:
        weight.register_hook(lambda grad: seen.append(grad.dtype))
    for _ in range(3):
        x = torch.tensor([[255.0]], dtype=torch.bfloat16)
        linear(x, weight, None, WeightGradQueue() if hook else None).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[765.0], [765.0]]  # 764 or 768 in bfloat16
    assert len(seen) == (3 if hook else 0)


def test_a_tied_weight_gets_both_of_its_gradients_in_float32() -> None:
    weight = nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    accumulate_in_float32([weight])
    queue = WeightGradQueue()
    hidden = F.embedding(torch.tensor([1, 1]), weight)
    linear(hidden, weight, None, queue).backward(torch.full((2, 3), 85.0, dtype=torch.bfloat16))
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    # As the head, 2 x 85 everywhere; as the embedding, 2 x 3 x 85 for the token that was there.
    assert weight.grad.tolist() == [[170.0, 170.0], [680.0, 680.0], [170.0, 170.0]]


def test_float32_and_float64_parameters_are_left_as_they_are() -> None:
    parameters = [nn.Parameter(torch.ones(2, dtype=d)) for d in (torch.float32, torch.float64)]
    accumulate_in_float32(parameters)
    assert [grad_dtype(p) for p in parameters] == [torch.float32, torch.float64]
    low = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    assert grad_dtype(low) == torch.bfloat16
    accumulate_in_float32([low])
    assert grad_dtype(low) == torch.float32
    assert grad_dtype(low * 2) == torch.bfloat16  # no leaf


def test_a_bfloat16_gradient_that_is_there_already_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match="drop it"):
        accumulate_in_float32([parameter])
