"""A SwiGLU feed-forward in FP8 against the same written out, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from counterflow.fp8 import NonFiniteError, Recipe, dequantize, quantize_tiles
from counterflow.fp8.carried import carry
from counterflow.fp8.linear import Call
from counterflow.fp8.products import Emulation
from counterflow.fp8.swiglu import swiglu_mlp
from counterflow.fp8.weights import QuantizedWeight
from counterflow.parallel.chunk import WeightGradQueue
from tests.fp8.linears import (
    RECIPES,
    TENSOR,
    Counting,
    Grads,
    bytes_of,
    in_fp8,
    kept_by,
    plain_swiglu,
    rows,
    weight,
)


class Layer:
    """Weights of a feed-forward with all that its function needs."""

    def __init__(
        self,
        size: int,
        inner: int,
        counts: list[int] | None = None,
        recipe: Recipe | None = None,
        *,
        queue: WeightGradQueue | None = None,
        apart: bool = False,
    ) -> None:
        lead = () if counts is None else (len(counts),)
        self.gate_up = [weight(*lead, 2 * inner, size)]
        if apart:
            self.gate_up = [nn.Parameter(w) for w in self.gate_up[0].detach().chunk(2)]
        self.down = weight(*lead, size, inner, seed=3)
        self.recipe, self.counts = recipe or Recipe(), counts
        self.up_call = Call(self.recipe, QuantizedWeight(), queue, counts, "mlp.up")
        self.down_call = Call(self.recipe, QuantizedWeight(), queue, counts, "mlp.down")

    def __call__(self, x: Tensor, factors: Tensor | None = None) -> Tensor:
        return swiglu_mlp(x, self.gate_up, self.down, self.up_call, self.down_call, factors)

    def plain(self, x: Tensor, grad: Tensor, factors: Tensor | None) -> Grads:
        gate_up = torch.cat(tuple(self.gate_up)) if len(self.gate_up) > 1 else self.gate_up[0]
        return plain_swiglu(x, gate_up, self.down, grad, self.counts, factors, self.recipe)

    def grads(self) -> list[Tensor]:
        """Of gate and up, and of down."""
        found = [w.grad for w in (*self.gate_up, self.down)]
        *up, down = [grad for grad in found if grad is not None]
        return [torch.cat(up, dim=-2), down]


def factors_of(count: int) -> Tensor:
    """A factor for each row, some of them 0 as of padding."""
    factors = torch.rand(count, generator=torch.Generator().manual_seed(4))
    return factors.masked_fill_(factors < 0.1, 0).requires_grad_()


def check(layer: Layer, m: int, dtype: torch.dtype, has_factors: bool) -> None:
    size = layer.down.shape[-2]
    x, grad = rows(m, size, dtype=dtype).requires_grad_(), rows(m, size, seed=2, dtype=dtype)
    factors = factors_of(m) if has_factors else None
    expected = layer.plain(x.detach(), grad, None if factors is None else factors.detach())
    y = layer(x, factors)
    y.backward(grad)
    assert x.grad is not None
    assert torch.equal(y, expected.y)
    assert torch.equal(x.grad, expected.x)
    for found, exact in zip(layer.grads(), expected.weights, strict=True):
        assert torch.equal(found, exact)
    if factors is not None:
        assert factors.grad is not None
        assert expected.factors is not None
        assert torch.equal(factors.grad, expected.factors)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
@settings(max_examples=5, deadline=None)
@given(
    m=st.integers(0, 200),
    size=st.integers(1, 200),
    inner=st.integers(1, 200),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    has_factors=st.booleans(),
    apart=st.booleans(),
)
def test_all_of_it_is_what_is_written_out(
    recipe: Recipe,
    m: int,
    size: int,
    inner: int,
    dtype: torch.dtype,
    has_factors: bool,
    apart: bool,
) -> None:
    check(Layer(size, inner, recipe=recipe, apart=apart), m, dtype, has_factors)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
@settings(max_examples=5, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 1, 5, 128, 130]), min_size=1, max_size=3),
    size=st.integers(1, 200),
    inner=st.integers(1, 200),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    has_factors=st.booleans(),
)
def test_experts_are_what_is_written_out_also_those_without_rows(
    recipe: Recipe,
    counts: list[int],
    size: int,
    inner: int,
    dtype: torch.dtype,
    has_factors: bool,
) -> None:
    check(Layer(size, inner, counts, recipe), sum(counts), dtype, has_factors)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_no_rows_give_no_rows_and_gradients_of_zeros(recipe: Recipe) -> None:
    check(Layer(130, 70, [0, 0], recipe), 0, torch.bfloat16, has_factors=True)


@pytest.mark.parametrize("has_factors", [False, True])
def test_gradients_are_near_those_of_float64(has_factors: bool) -> None:
    layer, m = Layer(256, 128), 256
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, 256, generator=generator).requires_grad_()
    factors = factors_of(m) if has_factors else None
    grad = torch.randn(m, 256, generator=generator)
    layer(x, factors).backward(grad)
    leaves = [x, *layer.gate_up, layer.down, *([] if factors is None else [factors])]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    gate, up = (wide[0] @ wide[1].t()).chunk(2, dim=1)
    a = nn.functional.silu(gate) * up
    if factors is not None:
        a = a * wide[3].unsqueeze(1)
    (a @ wide[2].t()).backward(grad.double())
    for leaf, exact in zip(leaves, wide, strict=True):
        assert leaf.grad is not None
        assert exact.grad is not None
        p, q = leaf.grad.double().flatten(), exact.grad.flatten()
        # Three products and the rounding of h, each wrong by 2 to 4 %: about 6 %, squared and
        # halved 2e-3.
        assert 1 - 2 * (p @ q) / (p @ p + q @ q) < 4e-3


@pytest.mark.parametrize("counts", [None, [60, 0, 40]])
@pytest.mark.parametrize("has_factors", [False, True])
def test_i_and_w_are_one_backward_in_bits_and_work(
    counts: list[int] | None, has_factors: bool
) -> None:
    m, size, inner = 100, 130, 70
    x, grad = rows(m, size).requires_grad_(), rows(m, size, seed=2)
    factors = factors_of(m) if has_factors else None
    whole = Layer(size, inner, counts)
    expected = whole.plain(x.detach(), grad, None if factors is None else factors.detach())
    queue, backend = WeightGradQueue(), Counting()
    queue.deferring = True
    layer = Layer(size, inner, counts, Recipe(backend=backend), queue=queue)
    for done in range(1, 3):  # gradients of micro-batches add up
        layer(x, factors).backward(grad)
        assert len(queue) == 2
        if done == 1:
            assert layer.down.grad is layer.gate_up[0].grad is None
        queue.run()
        assert len(backend.products) == 6 * done
    padded = sum(-(-count // 128) * 128 for count in counts or [m])
    assert backend.multiplied() == 2 * (2 * m + padded) * 3 * inner * size
    for found, exact in zip(layer.grads(), expected.weights, strict=True):
        assert torch.equal(found, exact + exact)


def test_fp8_alone_is_kept_and_waits() -> None:
    m, size, inner, queue = 256, 384, 128, WeightGradQueue()
    queue.deferring = True
    layer = Layer(size, inner, [128, 128], queue=queue)
    factors = factors_of(m)
    y = layer(rows(m, size).requires_grad_(), factors)
    kept = kept_by(y.grad_fn)
    own = [t for t in kept if t.data_ptr() != factors.data_ptr()]
    assert len(own) == len(kept) - 1
    assert in_fp8(own)
    in_bytes = m * (size + 2 * inner) * (1 + 4 / 128)
    assert bytes_of(own) == in_bytes
    y.backward(rows(m, size, seed=2))
    del y, kept, own
    waiting = [t for t in kept_by(queue) if t.data_ptr() != factors.data_ptr()]
    assert in_fp8(waiting)
    assert bytes_of(waiting) == in_bytes + m * (size + 2 * inner) * (1 + 4 / 128)


def test_an_input_that_can_be_made_again_is_not_kept() -> None:
    m, size, inner = 60, 130, 70
    source, grad = rows(m, size), rows(m, size, seed=2)
    layer = Layer(size, inner)
    expected = layer.plain(source, grad, None)
    made: list[int] = []

    def remake() -> Tensor:
        made.append(1)
        return source.view(3, 20, size)

    x = carry(source.clone().view(3, 20, size), remake=remake).requires_grad_()
    y = layer(x)
    assert bytes_of(t for t in kept_by(y.grad_fn) if t.data_ptr() != source.data_ptr()) == (
        m * (2 * inner + 4 * 2)
    )
    y.backward(grad.view_as(y))
    assert made == [1]
    assert torch.equal(y, expected.y.view_as(y))
    for found, exact in zip(layer.grads(), expected.weights, strict=True):
        assert torch.equal(found, exact)


def test_carried_tiles_go_into_the_product_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = quantize_tiles(rows(60, 130))
    x, layer = dequantize(tiles, torch.bfloat16), Layer(130, 70, [60])
    expected = layer(x.clone())

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("quantised again")

    monkeypatch.setattr("counterflow.fp8.recipe.quantize_tiles", never)
    assert torch.equal(layer(carry(x, tiles=tiles)), expected)


@pytest.mark.parametrize("frozen", ["gate_up", "down", "both"])
@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("recipe", [Recipe(), TENSOR, RECIPES["block gradients"]])
def test_frozen_weights_cost_nothing_and_get_nothing(
    frozen: str, queued: bool, recipe: Recipe
) -> None:
    m, size, inner, backend = 60, 130, 70, Counting()
    queue = WeightGradQueue() if queued else None
    layer = Layer(size, inner, recipe=replace(recipe, backend=backend), queue=queue)
    layer.gate_up[0].requires_grad_(frozen == "down")
    layer.down.requires_grad_(frozen == "gate_up")
    x, grad = rows(m, size).requires_grad_(), rows(m, size, seed=2)
    expected = layer.plain(x.detach(), grad, None)
    y = layer(x)
    if frozen != "down":
        assert bytes_of(kept_by(y.grad_fn)) == m * (2 * inner + 4 * 2)
    y.backward(grad)
    assert len(backend.products) == 4 + (frozen != "both")
    assert x.grad is not None
    assert torch.equal(x.grad, expected.x)
    up_grad, down_grad = layer.gate_up[0].grad, layer.down.grad
    assert (up_grad is None) == (frozen != "down")
    assert (down_grad is None) == (frozen != "gate_up")
    assert up_grad is None or torch.equal(up_grad, expected.weights[0])
    assert down_grad is None or torch.equal(down_grad, expected.weights[1])


def test_factors_alone_get_their_gradient() -> None:
    layer, factors, backend = Layer(130, 70), factors_of(60), Counting()
    x, grad = rows(60, 130), rows(60, 130, seed=2)
    expected = layer.plain(x, grad, factors.detach())
    layer.up_call = replace(layer.up_call, recipe=Recipe(backend=backend))
    layer.down_call = replace(layer.down_call, recipe=Recipe(backend=backend))
    for w in (*layer.gate_up, layer.down):
        w.requires_grad_(False)
    layer(x, factors).backward(grad)
    assert expected.factors is not None
    assert factors.grad is not None
    assert torch.equal(factors.grad, expected.factors)
    assert len(backend.products) == 3


def test_without_gradients_nothing_is_kept_or_quantised_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x = Layer(130, 70), rows(60, 130)
    expected = layer(x)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("h was quantised, which only a backward needs")

    monkeypatch.setattr("counterflow.fp8.swiglu.quantize_tiles", never)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    with torch.inference_mode():
        assert torch.equal(layer(x.clone()), expected)


def test_a_hook_sees_its_gradient_once_and_the_other_weight_waits() -> None:
    queue, seen = WeightGradQueue(), []
    queue.deferring = True
    layer = Layer(130, 70, queue=queue)
    layer.down.register_hook(lambda grad: seen.append(grad.clone()))
    x, grad = rows(60, 130), rows(60, 130, seed=2)
    expected = layer.plain(x, grad, None)
    layer(x).backward(grad)
    assert len(queue) == 1
    assert torch.equal(seen[0], expected.weights[1])
    queue.run()
    for found, exact in zip(layer.grads(), expected.weights, strict=True):
        assert torch.equal(found, exact)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_and_autocast_give_the_same_bits(reentrant: bool) -> None:
    layer, x = Layer(130, 70), rows(60, 130, dtype=torch.float32).requires_grad_()
    factors, grad = factors_of(60), rows(60, 130, seed=2, dtype=torch.float32)
    expected = layer.plain(x.detach(), grad, factors.detach())
    with torch.autocast("cpu", torch.bfloat16):
        y = checkpoint(layer, x, factors, use_reentrant=reentrant)
    assert isinstance(y, Tensor)
    assert torch.equal(y, expected.y)
    y.backward(grad)
    for found, exact in zip(layer.grads(), expected.weights, strict=True):
        assert torch.equal(found, exact)


def test_an_emulated_accumulator_serves_a_whole_layer() -> None:
    x, grad = rows(30, 130, dtype=torch.float32), rows(30, 130, seed=2, dtype=torch.float32)
    found: list[list[Tensor]] = []
    for bits in (None, 14):
        layer = Layer(130, 20, [20, 10], Recipe(backend=Emulation(bits=bits)))
        layer(x).backward(grad)
        found.append(layer.grads())
    expected = Layer(130, 20, [20, 10]).plain(x, grad, None).weights
    for exact, short, plain in zip(*found, expected, strict=True):
        assert torch.equal(exact, plain)
        assert not torch.equal(short, plain)


@pytest.mark.parametrize("recipe", [Recipe(check=True), replace(TENSOR, check=True)])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("input", "mlp.up: the input"),
        ("gate_up", "mlp.up: the weight"),
        ("down", "mlp.down: the weight"),
        ("large", "mlp.down: the input"),
        ("factors", "mlp.down: the input"),
        ("gradient", "mlp.down: the gradient of the output"),
        ("large gradient", "mlp.up: the gradient of the output"),
    ],
)
def test_nan_is_found_where_it_first_shows(where: str, message: str, recipe: Recipe) -> None:
    layer = Layer(130, 70, recipe=recipe)
    x = torch.randn(60, 130, generator=torch.Generator().manual_seed(0))
    factors, grad = torch.ones(60), torch.ones(60, 130)
    # One product of finite numbers that leaves float32, or one number that is none.
    if where == "input":
        x[5, 3] = torch.nan
    elif where == "large":
        x *= 1e20
    elif where == "large gradient":
        grad *= 1e37
        layer.down.data *= 1e3
    elif where == "factors":
        factors[3] = torch.inf
    elif where == "gradient":
        grad[5, 3] = torch.inf
    else:
        w = layer.down if where == "down" else layer.gate_up[0]
        w.data[5, 3] = torch.nan

    def step() -> None:
        layer(x, factors).backward(grad)

    with pytest.raises(NonFiniteError, match=f"^{message}"):
        step()


ONE = torch.ones(2, 9)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "float64": (lambda: Layer(9, 8)(ONE.double()), "mlp.up: .*float64"),
    "input": (lambda: Layer(9, 8)(torch.ones(2, 8)), r"mlp.up: .*\[2, 8\]"),
    "counts": (lambda: Layer(9, 8, [1, 2])(ONE), "mlp.up: .*3 rows"),
    "factors": (lambda: Layer(9, 8)(ONE, torch.ones(3)), r"mlp.down: factors .*\[3\]"),
    "columns": (lambda: Layer(9, 8)(ONE, torch.ones(2, 1)), r"\[2, 1\]"),
    "dtype": (lambda: Layer(9, 8)(ONE, torch.ones(2).double()), "factors .*float64"),
    "double": (lambda: _with(weight(14, 9), weight(9, 8)), "mlp.down: gate and up .* 8 rows each"),
    "uneven": (lambda: _with(weight(9, 9), weight(7, 9), weight(9, 8)), "got 9 and 7"),
    "three": (lambda: _with(*[weight(8, 9)] * 3, weight(9, 8)), "got 8 and 8 and 8"),
    "down": (lambda: _with(weight(16, 9), weight(1, 9, 8)), r"mlp.down: weights .*\[1, 9, 8\]"),
    "half": (lambda: _with(weight(16, 9), weight(9, 8, dtype=torch.half)), "mlp.down: .*float16"),
}


def _with(*weights: nn.Parameter) -> Tensor:
    layer = Layer(9, 8)
    *layer.gate_up, layer.down = weights
    return layer(ONE)


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case: str) -> None:
    act, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        act()


def test_both_products_have_one_recipe_and_the_same_groups() -> None:
    layer = Layer(9, 8, [2])
    layer.down_call = replace(layer.down_call, recipe=TENSOR)
    with pytest.raises(ValueError, match=r"mlp\.down: counts and recipe must be those of mlp\.up"):
        layer(ONE)
    layer = Layer(9, 8, [1, 1])
    layer.down_call = replace(layer.down_call, counts=[2, 0])
    with pytest.raises(ValueError, match=r"mlp\.down: counts and recipe"):
        layer(ONE)
    layer.down_call = replace(layer.down_call, counts=[1, 1])
    layer.down = weight(3, 9, 8)
    with pytest.raises(ValueError, match=r"mlp\.down: weights for 3 experts"):
        layer(ONE)


def test_a_second_derivative_is_refused() -> None:
    x = rows(60, 130).requires_grad_()
    loss = Layer(130, 70)(x).square().sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
