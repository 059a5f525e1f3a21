"""Linear layers in FP8 against the same written out, the split into I and W, and what is kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from counterflow.fp8 import GroupedLinear, Linear, NonFiniteError, Recipe, quantize_tiles
from counterflow.fp8.carried import carry
from counterflow.fp8.linear import Call, linear
from counterflow.fp8.products import Emulation
from counterflow.fp8.weights import QuantizedWeight
from counterflow.parallel.chunk import WeightGradQueue
from tests.fp8.linears import (
    RECIPES,
    Contiguous,
    Counting,
    bytes_of,
    in_fp8,
    kept_by,
    plain_linear,
    rows,
    weight,
)


def call(recipe: Recipe | None = None, **rest: Any) -> Call:
    return Call(recipe or Recipe(), QuantizedWeight(), **rest)


def grad_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def check_linear(
    m: int, n: int, k: int, counts: list[int] | None, dtype: torch.dtype, recipe: Recipe
) -> None:
    x = rows(m, k, dtype=dtype).requires_grad_()
    w = weight(n, k) if counts is None else weight(len(counts), n, k)
    grad = rows(m, n, seed=2, dtype=dtype)
    expected = plain_linear(x.detach(), w, grad, counts, recipe)
    y = linear(x, [w], call(recipe, counts=counts))
    y.backward(grad)
    assert y.dtype == dtype
    assert torch.equal(y, expected.y)
    assert torch.equal(grad_of(x), expected.x)
    assert torch.equal(grad_of(w), expected.weights[0])


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
@settings(max_examples=6, deadline=None)
@given(
    m=st.integers(0, 280),
    n=st.integers(1, 280),
    k=st.integers(1, 280),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_all_three_products_are_those_written_out(
    recipe: Recipe, m: int, n: int, k: int, dtype: torch.dtype
) -> None:
    check_linear(m, n, k, None, dtype, recipe)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
@settings(max_examples=5, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 1, 5, 128, 130]), min_size=1, max_size=4),
    n=st.integers(1, 200),
    k=st.integers(1, 200),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_grouped_products_are_those_written_out_also_of_empty_groups(
    recipe: Recipe, counts: list[int], n: int, k: int, dtype: torch.dtype
) -> None:
    check_linear(sum(counts), n, k, counts, dtype, recipe)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
@pytest.mark.parametrize("counts", [None, [0, 0]])
def test_no_rows_give_no_rows_and_a_gradient_of_zeros(
    recipe: Recipe, counts: list[int] | None
) -> None:
    check_linear(0, 130, 200, counts, torch.bfloat16, recipe)


def test_products_are_near_those_of_float64_in_spite_of_outliers() -> None:
    x, w = rows(256, 384).requires_grad_(), weight(192, 384)
    grad = torch.randn(256, 192, generator=torch.Generator().manual_seed(3)).bfloat16()
    y = linear(x, [w], call())
    y.backward(grad)
    wide_x, wide_w, wide_grad = x.detach().double(), w.detach().double(), grad.double()
    for found, exact in (
        (y, wide_x @ wide_w.t()),
        (grad_of(x), wide_grad @ wide_w),
        (grad_of(w), wide_grad.t() @ wide_x),
    ):
        a, b = found.detach().double().flatten(), exact.flatten()
        # The bound; a format with 4 significant bits is wrong by 2 % of a number or so.
        assert 1 - 2 * (a @ b) / (a @ a + b @ b) < 1e-3


@pytest.mark.parametrize("m", [256, 100])
@pytest.mark.parametrize("grouped", [False, True])
def test_i_and_w_are_one_backward_in_bits_and_flops(grouped: bool, m: int) -> None:
    n, k = 128, 200
    counts = [m - 40, 0, 40] if grouped else None
    w = weight(3, n, k) if grouped else weight(n, k)
    x, grad = rows(m, k).requires_grad_(), rows(m, n, seed=2)
    y = linear(x, [w], call(counts=counts))
    with FlopCounterMode(display=False) as full:
        y.backward(grad)
    expected, expected_x = grad_of(w), grad_of(x)
    w.grad = x.grad = None

    queue, backend = WeightGradQueue(), Counting()
    y = linear(x, [w], call(Recipe(backend=backend), counts=counts, queue=queue))
    queue.deferring = True
    with FlopCounterMode(display=False) as input_half:
        y.backward(grad)
    assert w.grad is None
    assert len(queue) == 1
    assert torch.equal(grad_of(x), expected_x)
    forward_and_input = backend.multiplied()
    assert forward_and_input == 2 * m * n * k
    with FlopCounterMode(display=False) as weight_half:
        queue.run()
    assert torch.equal(grad_of(w), expected)
    # Groups are padded to multiples of 128 rows for the weight gradient, with zeros.
    padded = sum(-(-count // 128) * 128 for count in counts or [m])
    assert backend.multiplied() - forward_and_input == padded * n * k
    assert input_half.get_total_flops() == 2 * m * n * k
    assert weight_half.get_total_flops() == 2 * padded * n * k
    assert full.get_total_flops() == 2 * (m + padded) * n * k


@pytest.mark.parametrize("deferring", [False, True])
def test_gradients_of_micro_batches_add_up_in_float32(deferring: bool) -> None:
    w, queue, total = weight(130, 200), WeightGradQueue(), torch.zeros(130, 200)
    queue.deferring = deferring
    one = call(queue=queue)
    for seed in range(3):
        x, grad = rows(60, 200, seed=seed), rows(60, 130, seed=seed + 9)
        linear(x, [w], one).backward(grad)
        queue.run()
        total += plain_linear(x, w, grad, None, Recipe()).weights[0]
    assert torch.equal(grad_of(w), total)
    assert one.quantized.times_quantized == 1


@pytest.mark.parametrize("queued", [False, True])
def test_gradients_of_bf16_weights_are_summed_in_their_grad_dtype(queued: bool) -> None:
    x, grad = rows(60, 200), rows(60, 130, seed=2)
    for wide in (False, True):
        w = weight(130, 200, dtype=torch.bfloat16)
        if wide:
            w.grad_dtype = torch.float32
        part = plain_linear(x, w, grad, None, Recipe()).weights[0]
        for _ in range(2):
            linear(x, [w], call(queue=WeightGradQueue() if queued else None)).backward(grad)
        expected = part + part if wide else part.bfloat16() + part.bfloat16()
        assert grad_of(w).dtype == expected.dtype
        assert torch.equal(grad_of(w), expected)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("late", [False, True], ids=["early", "after the forward"])
def test_hooks_of_a_stacked_weight_see_its_gradient_once_and_no_gradient_is_lost(
    kind: str, late: bool
) -> None:
    a, b, queue = weight(128, 200), weight(128, 200, seed=5), WeightGradQueue()
    queue.deferring = True
    x, grad, seen = rows(60, 200), rows(60, 256, seed=2), []

    def hook(value: Tensor) -> None:  # of the gradient, or of the parameter that has it
        seen.append((value if value.grad is None else value.grad).clone())

    if not late:
        getattr(a, kind)(hook)
    y = linear(x, [a, b], call(queue=queue))
    if late:
        getattr(a, kind)(hook)
    y.backward(grad)
    queue.run()
    both = plain_linear(x, torch.cat([a, b]), grad, None, Recipe()).weights[0]
    (once,) = seen
    assert torch.equal(once, both[:128])
    assert torch.equal(torch.cat([grad_of(a), grad_of(b)]), both)


@pytest.mark.parametrize("queued", [False, True])
def test_a_weight_that_is_computed_hands_its_gradient_on(queued: bool) -> None:
    w, queue = weight(130, 200), WeightGradQueue()
    queue.deferring = True
    x, grad = rows(60, 200), rows(60, 130, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where a gradient goes to no leaf
        linear(x, [w * 2], call(queue=queue if queued else None)).backward(grad)
    assert len(queue) == 0
    expected = plain_linear(x, w.detach() * 2, grad, None, Recipe()).weights[0]
    assert torch.equal(grad_of(w), 2 * expected)


def test_frozen_weights_and_inputs_cost_nothing_and_get_nothing() -> None:
    frozen, trained, queue = weight(128, 200), weight(128, 200, seed=5), WeightGradQueue()
    frozen.requires_grad_(False)
    x, grad = rows(128, 200), rows(128, 256, seed=2)
    both = plain_linear(x, torch.cat([frozen, trained]), grad, None, Recipe())
    for given_queue in (queue, None):
        trained.grad = None
        backend = Counting()
        recipe = Recipe(backend=backend)
        linear(x, [frozen, trained], call(recipe, queue=given_queue)).backward(grad)
        assert frozen.grad is None
        assert torch.equal(grad_of(trained), both.weights[0][128:])
        assert backend.multiplied() == 128 * 256 * 200 + 128 * 128 * 200
    free = x.clone().requires_grad_()
    y = linear(free, [frozen], call(queue=queue))
    assert kept_by(y.grad_fn) == []
    queue.deferring = True
    y.backward(grad[:, :128])
    assert len(queue) == 0
    expected = plain_linear(x, frozen, grad[:, :128], None, Recipe())
    assert torch.equal(grad_of(free), expected.x)
    assert not linear(x, [frozen], call()).requires_grad


@pytest.mark.parametrize("first", [128, 130])
def test_stacked_weights_are_quantised_as_one_matrix(first: int) -> None:
    a, x = weight(first, 200), rows(60, 200)
    b = nn.Parameter(weight(70, 200, seed=5).detach() * 37)
    together = linear(x, [a, b], call())
    as_one = linear(x, [torch.cat([a, b])], call())
    assert torch.equal(together, as_one)
    apart = torch.cat([linear(x, [w], call()) for w in (a, b)], dim=1)
    # Blocks of 128x128 that begin where a weight begins are the same; others are not.
    assert torch.equal(together, apart) == (first % 128 == 0)


def test_a_layer_keeps_fp8_alone_and_so_does_what_waits_for_w() -> None:
    m, n, k = 256, 384, 512
    w, queue = weight(n, k), WeightGradQueue()
    queue.deferring = True
    y = linear(rows(m, k).requires_grad_(), [w], call(queue=queue))
    kept = kept_by(y.grad_fn)
    assert in_fp8(kept)
    assert bytes_of(kept) == m * k + 4 * m * k // 128
    y.backward(rows(m, n, seed=2))
    del y, kept
    waiting = kept_by(queue)
    assert in_fp8(waiting)
    assert bytes_of(waiting) == (m * k + m * n) * (1 + 4 / 128)
    queue.run()
    assert kept_by(queue) == []


def test_without_gradients_there_is_no_graph() -> None:
    layer, x = Linear(200, 130, bias=True), rows(60, 200)
    with torch.no_grad():
        found = layer(x)
    assert found.grad_fn is None
    with torch.inference_mode():
        assert torch.equal(layer(x), found)
        assert torch.equal(layer(x.clone()), found)
    layer.requires_grad_(False)
    assert torch.equal(layer(x), found)


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_strides_of_a_weight_make_no_difference(grouped: bool, queued: bool) -> None:
    counts = [40, 0, 20] if grouped else None
    plain = weight(3, 130, 200) if grouped else weight(130, 200)
    turned = nn.Parameter(plain.detach().mT.contiguous().mT)
    assert not turned.is_contiguous()
    x, grad = rows(60, 200), rows(60, 130, seed=2)
    backend = Contiguous()
    queue, recipe = WeightGradQueue() if queued else None, Recipe(backend=backend)
    one = call(recipe, counts=counts, queue=queue)
    y = linear(x, [turned], one)
    y.backward(grad)
    expected = plain_linear(x, plain, grad, counts, Recipe())
    assert torch.equal(y, expected.y)
    assert torch.equal(grad_of(turned), expected.weights[0])
    assert backend.sums == 1


@pytest.mark.parametrize("layout", ["3-dim", "transposed", "view", "strided"])
def test_the_layout_of_the_input_makes_no_difference(layout: str) -> None:
    plain = rows(60, 200)
    x = {
        "3-dim": plain.view(3, 20, 200),
        "transposed": plain.t().contiguous().t(),
        "view": torch.cat([plain, plain])[:60],
        "strided": torch.stack([plain, plain], dim=-1)[..., 0],
    }[layout].requires_grad_()
    w, grad = weight(130, 200), rows(60, 130, seed=2)
    y = linear(x, [w], call())
    assert y.shape == (*x.shape[:-1], 130)
    y.backward(grad.view_as(y))
    expected = plain_linear(plain, w, grad, None, Recipe())
    assert torch.equal(y.view(60, 130), expected.y)
    assert torch.equal(grad_of(x).reshape(60, 200), expected.x)
    assert torch.equal(grad_of(w), expected.weights[0])


def test_a_gradient_that_is_broadcast_is_as_good_as_any() -> None:
    x, w = rows(60, 200), weight(130, 200)
    linear(x, [w], call()).sum().backward()
    ones = torch.ones(60, 130, dtype=torch.bfloat16)
    assert torch.equal(grad_of(w), plain_linear(x, w, ones, None, Recipe()).weights[0])


def test_modules_are_the_functions_with_a_bias_in_the_outputs_dtype() -> None:
    x, grad = rows(60, 200).requires_grad_(), rows(60, 130, seed=2)
    layer = Linear(200, 130, bias=True)
    assert layer.bias is not None
    y = layer(x)
    y.backward(grad)
    expected = plain_linear(x.detach(), layer.weight, grad, None, Recipe())
    assert torch.equal(y, expected.y + layer.bias.bfloat16())
    assert torch.equal(grad_of(layer.weight), expected.weights[0])
    torch.testing.assert_close(grad_of(layer.bias), grad.float().sum(0), rtol=1e-2, atol=1e-2)
    experts = GroupedLinear(3, 200, 130)
    y = experts(x, [10, 0, 50])
    assert torch.equal(y, plain_linear(x.detach(), experts.weight, grad, [10, 0, 50], Recipe()).y)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_give_the_same_bits(reentrant: bool) -> None:
    x, grad = rows(60, 200).requires_grad_(), rows(60, 130, seed=2)
    layer = Linear(200, 130)
    layer(x).backward(grad)
    expected, expected_x = grad_of(layer.weight), grad_of(x)
    layer.weight.grad = x.grad = None
    queue = WeightGradQueue()
    queue.deferring = True
    y = checkpoint(layer, x, queue, use_reentrant=reentrant)
    assert isinstance(y, Tensor)
    y.backward(grad)
    assert layer.weight.grad is None
    queue.run()
    assert torch.equal(grad_of(layer.weight), expected)
    assert torch.equal(grad_of(x), expected_x)


def test_autocast_changes_nothing_and_the_output_has_the_inputs_dtype() -> None:
    x, grad = rows(60, 200, dtype=torch.float32).requires_grad_(), torch.ones(60, 130)
    layer = Linear(200, 130)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.backward(grad)
    expected = plain_linear(x.detach(), layer.weight, grad, None, Recipe())
    assert y.dtype == torch.float32
    assert torch.equal(y, expected.y)
    assert torch.equal(grad_of(layer.weight), expected.weights[0])
    assert torch.equal(grad_of(x), expected.x)


def test_a_backend_object_trains_a_layer() -> None:
    layer = Linear(128, 64, recipe=Recipe(backend=Emulation(bits=14)))
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    target = torch.randn(128, 64, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    losses: list[float] = []
    for _ in range(2):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    exact = Linear(128, 64)
    exact.load_state_dict(layer.state_dict())
    assert not torch.equal(layer(x), exact(x))  # 14 bits are not all


@pytest.mark.parametrize("where", ["input", "weight", "gradient of the output"])
def test_nan_is_found_with_the_layers_name_when_looked_for(where: str) -> None:
    for check in (True, False):
        layer = Linear(200, 130, recipe=Recipe(check=check), name="model.layers.3.mlp.up_proj")
        x, grad = rows(60, 200).requires_grad_(), rows(60, 130, seed=2)
        spoiled = {"input": x, "weight": layer.weight, "gradient of the output": grad}[where]
        spoiled.data[7, 5] = torch.inf if where == "input" else torch.nan

        def step(layer: Linear = layer, x: Tensor = x, grad: Tensor = grad) -> None:
            layer(x).backward(grad)

        if not check:
            step()
            continue
        with pytest.raises(NonFiniteError, match=rf"^model\.layers\.3\.mlp\.up_proj: the {where}"):
            step()


def test_tiles_that_came_with_a_nan_are_found_too() -> None:
    x = rows(60, 200)
    x[3, 4] = torch.nan
    carry(x, tiles=quantize_tiles(x))
    with pytest.raises(NonFiniteError, match=r"scale \[3, 0\]"):
        Linear(200, 130, recipe=Recipe(check=True))(x)


def test_a_second_derivative_is_refused() -> None:
    x = rows(60, 200).requires_grad_()
    loss = Linear(200, 130)(x).square().sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "float16": (lambda: Linear(9, 8, name="up")(torch.ones(2, 9).half()), "up: .*float16"),
    "float64": (lambda: Linear(9, 8)(torch.ones(2, 9).double()), "float64; convert"),
    "integers": (lambda: Linear(9, 8)(torch.ones(2, 9).int()), "int32"),
    "sizes": (lambda: Linear(9, 8, name="up")(torch.ones(2, 8)), r"up: .*\[2, 8\].*\[8, 9\]"),
    "one row": (lambda: Linear(9, 8)(torch.ones(9)), "two or more"),
    "weight": (lambda: Linear(9, 8, dtype=torch.float16)(torch.ones(2, 9)), "master copy"),
    "stack": (lambda: linear(torch.ones(2, 9), [weight(2, 8, 9)], call()), r"matrices \[N, K\]"),
    "experts": (
        lambda: linear(torch.ones(2, 9), [weight(8, 9)], call(counts=[2])),
        r"one tensor \[experts, N, K\]",
    ),
    "two": (
        lambda: linear(torch.ones(2, 9), [weight(1, 8, 9)] * 2, call(counts=[2])),
        r"one tensor \[experts, N, K\]",
    ),
    "counts": (lambda: GroupedLinear(2, 9, 8)(torch.ones(2, 9), [1, 2]), "3 rows"),
    "groups": (lambda: GroupedLinear(2, 9, 8)(torch.ones(2, 9), [2]), "1 experts"),
    "negative": (lambda: GroupedLinear(2, 9, 8)(torch.ones(2, 9), [3, -1]), "negative"),
    "3-dim rows": (lambda: GroupedLinear(2, 9, 8)(torch.ones(2, 3, 9), [1, 1]), "a matrix"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case: str) -> None:
    act, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        act()


def test_parameters_are_within_the_bound_of_torchs_linear() -> None:
    for layer in (Linear(400, 64, bias=True), GroupedLinear(2, 400, 64)):
        for parameter in layer.parameters():
            assert isinstance(parameter, nn.Parameter)
            assert 0.8 / 20 < parameter.abs().max() <= 1 / 20
