"""Recipes: what they refuse, and that each choice changes what it says and nothing else."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch

from counterflow.fp8 import E4M3, E5M2, Linear, Quantized, Recipe
from counterflow.fp8.products import BACKENDS, Emulation
from counterflow.fp8.products.reference import Reference
from tests.fp8.linears import RECIPES, TENSOR, Counting, rows


def step(recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, input gradient and weight gradient of one layer."""
    torch.manual_seed(0)
    layer = Linear(300, 260, recipe=recipe)
    x = rows(200, 300).requires_grad_()
    y = layer(x)
    y.backward(rows(200, 260, seed=2))
    assert x.grad is not None
    assert layer.weight.grad is not None
    return y.detach(), x.grad, layer.weight.grad


def operands(recipe: Recipe) -> dict[str, tuple[Quantized, Quantized]]:
    """Both operands of the three products of one layer."""
    backend = Counting()
    step(dataclasses.replace(recipe, backend=backend))
    forward, for_input, for_weight = ((p.a, p.b) for p in backend.products)
    return {"forward": forward, "input": for_input, "weight": for_weight}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scales", "e8m0"),
        ("scales", None),
        ("activations", "block"),
        ("activations", ["tile"]),
        ("gradients", "row"),
        ("gradients", 128),
        ("weights", "tile"),
        ("gradient_format", "e5m6"),
        ("gradient_format", torch.float8_e5m2),
        ("backend", "cutlass"),
        ("backend", Reference),
        ("backend", None),
        ("e5m6", 1),
        ("check", "yes"),
    ],
)
def test_a_value_that_does_not_exist_is_named_with_those_that_do(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be ") as caught:
        Recipe(**{name: value})
    assert repr(value) in str(caught.value)
    some = {"backend": "reference", "e5m6": "True", "check": "True", "scales": "float32"}
    assert some.get(name, "e4m3" if name == "gradient_format" else "tensor") in str(caught.value)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_can_be_named_before_it_is_installed(name: str) -> None:
    assert Recipe(backend=name).backend == name


@pytest.mark.parametrize("recipe", [*RECIPES.values(), Recipe(backend=Emulation(bits=20))])
def test_recipes_are_values(recipe: Recipe) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.check = True  # pyright: ignore[reportAttributeAccessIssue]
    for same in (copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
        assert same == recipe
        assert hash(same) == hash(recipe)
    assert len({*RECIPES.values(), *map(dataclasses.replace, RECIPES.values())}) == len(RECIPES)


def test_the_defaults_are_the_papers() -> None:
    found = operands(Recipe())
    tiles, blocks = [200, 3], [3, 3]
    assert list(found["forward"][0].scales.shape) == tiles
    assert list(found["forward"][1].scales.shape) == blocks
    assert list(found["input"][0].scales.shape) == tiles
    assert list(found["input"][1].scales.shape) == blocks
    assert list(found["weight"][0].scales.shape) == [260, 2]
    assert list(found["weight"][1].scales.shape) == [300, 2]
    for a, b in found.values():
        assert a.values.dtype == b.values.dtype == E4M3
        for q in (a, b):
            mantissa, _ = torch.frexp(q.scales)
            assert (mantissa == 0.5).all()


def test_float32_scales_are_float32_in_all_operands() -> None:
    for a, b in operands(Recipe(scales="float32")).values():
        for q in (a, b):
            mantissa, _ = torch.frexp(q.scales)
            assert (mantissa != 0.5).any()


def test_e5m2_is_for_gradients_alone() -> None:
    found = operands(Recipe(gradient_format="e5m2"))
    dtypes = {name: (a.values.dtype, b.values.dtype) for name, (a, b) in found.items()}
    assert dtypes == {"forward": (E4M3, E4M3), "input": (E5M2, E4M3), "weight": (E5M2, E4M3)}


def test_blocks_of_gradients_change_the_input_gradient_alone() -> None:
    y, grad_x, grad_w = step(Recipe())
    block_y, block_x, block_w = step(Recipe(gradients="block"))
    assert torch.equal(y, block_y)
    assert torch.equal(grad_w, block_w)
    assert not torch.equal(grad_x, block_x)
    scales = operands(Recipe(gradients="block"))["input"][0].scales
    assert torch.equal(scales[:128], scales[:1].expand(128, -1))
    assert (scales[0] != scales[-1]).all()


def test_tensor_scaling_has_one_scale_in_each_operand() -> None:
    for a, b in operands(TENSOR).values():
        for q in (a, b):
            assert q.scales.unique().numel() == 1


def test_outliers_cost_tensor_scaling_what_tiles_keep() -> None:
    torch.manual_seed(0)
    layer = Linear(512, 128)
    x = torch.randn(64, 512)
    x[:, 7] *= 1e6  # one channel stands out by more than E4M3 spans
    with torch.no_grad():
        layer.weight[:, 7] = 0  # and does not hide the others in the sum
        exact = x @ layer.weight.t()
        errors = {}
        for name, recipe in (("tile", Recipe()), ("tensor", TENSOR)):
            layer.recipe = recipe
            errors[name] = (layer(x) - exact).norm() / exact.norm()
    # Three tiles of four have no outlier and lose the 3 % that their format costs; the fourth loses
    # all it has, which is half of the sum's norm. With one scale everything is lost.
    assert errors["tile"] < 0.6 < 0.9 < errors["tensor"]


def test_blocks_lose_the_gradients_of_small_tokens_and_tiles_do_not() -> None:
    """Where one token's gradient is 2**18 times the others', what the paper's experiment shows."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(5))
    grad = torch.randn(128, 256, generator=torch.Generator().manual_seed(6))
    grad[7] *= 2.0**18
    errors: dict[str, float] = {}
    for gradients in ("tile", "block"):
        layer = Linear(256, 256, recipe=Recipe(gradients=gradients))
        with torch.no_grad():
            layer.weight.copy_(weight)
        x = torch.zeros(128, 256, requires_grad=True)
        layer(x).backward(grad)
        assert x.grad is not None
        small = torch.arange(128) != 7
        exact = (grad @ weight)[small]
        errors[gradients] = float((x.grad[small] - exact).norm() / exact.norm())
    assert errors["tile"] < 0.05  # E4M3 rounds by up to 1/16, at random
    assert errors["block"] > 0.9
