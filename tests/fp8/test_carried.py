"""Notes on tensors: used where they hold, and never where they do not."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from counterflow.fp8 import (
    E5M2,
    Quantized,
    Recipe,
    dequantize,
    quantize_blocks,
    quantize_both,
    quantize_tiles,
)
from counterflow.fp8.carried import Carried, carried, carry
from counterflow.fp8.linear import Call, linear
from counterflow.fp8.products.reference import Reference
from counterflow.fp8.weights import QuantizedWeight
from tests.fp8.linears import TENSOR, bytes_of, kept_by, plain_linear, rows, weight


class Calls:
    """How often the recipe quantised inputs or gradients in tiles."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name, function in (("tiles", quantize_tiles), ("both", quantize_both)):
            monkeypatch.setattr(f"counterflow.fp8.recipe.quantize_{name}", self._counted(function))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return function(*args, **kwargs)

        return counted


def arrived(count: int = 60, size: int = 200, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows that came in FP8 and carry that."""
    tiles = quantize_tiles(rows(count, size))
    return carry(dequantize(tiles, dtype), tiles=tiles)


def run(x: Tensor, recipe: Recipe | None = None) -> tuple[Tensor, Tensor]:
    """Output and weight gradient of a layer with fixed weights."""
    w = weight(130, 200)
    y = linear(x, [w], Call(recipe or Recipe(), QuantizedWeight()))
    y.backward(rows(60, 130, seed=2).to(x.dtype).view_as(y))
    assert w.grad is not None
    return y.detach(), w.grad


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_carried_tiles_are_not_quantised_again_and_give_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = arrived(dtype=dtype)
    expected = run(x.clone())
    calls = Calls(monkeypatch)
    found = run(x)
    assert calls.count == 1  # the gradient
    assert same(found, expected)


def test_tiles_of_three_dimensions_go_with_the_rows() -> None:
    x = arrived().view(3, 20, 200)
    assert carried(x) == Carried()
    tiles = quantize_tiles(x)
    assert tiles.values.dim() == 3
    carry(x, tiles=tiles)
    y, grad = run(x)
    assert same((y.flatten(0, 1), grad), run(arrived()))


def test_a_gradient_that_came_in_fp8_is_not_quantised_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, w, grad = rows(60, 200).requires_grad_(), weight(130, 200), arrived(60, 130)
    expected = plain_linear(x.detach(), w, grad, None, Recipe())
    y = linear(x, [w], Call(Recipe(), QuantizedWeight()))
    calls = Calls(monkeypatch)
    y.backward(grad)
    assert calls.count == 0
    assert x.grad is not None
    assert w.grad is not None
    assert torch.equal(x.grad, expected.x)
    assert torch.equal(w.grad, expected.weights[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.add_(1),
        lambda x: x[3:4].mul_(2),
        lambda x: x.view(-1).zero_(),
        lambda x: x.detach().neg_(),
        lambda x: x.copy_(rows(60, 200, seed=4)),
    ],
)
def test_a_note_on_a_tensor_that_was_changed_in_place_is_not_used(
    change: Callable[[Tensor], object],
) -> None:
    x = arrived()
    change(x)
    assert carried(x) == Carried()
    assert same(run(x), run(x.clone()))


@pytest.mark.parametrize("copied", [torch.clone, copy.copy, copy.deepcopy, Tensor.detach])
@pytest.mark.parametrize("stale", [False, True])
def test_a_copy_carries_nothing(copied: Callable[[Tensor], Tensor], stale: bool) -> None:
    x = arrived()
    if stale:
        x.add_(1)  # a copy counts its changes from 0, where the note was made
    assert carried(copied(x)) == Carried()


def test_a_tensor_with_notes_can_be_saved() -> None:
    x, file = carry(arrived(), remake=lambda: torch.zeros(0)), io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again, x)
    assert carried(again) == Carried()


def test_notes_add_up() -> None:
    x, tiles = rows(60, 200), quantize_tiles(rows(60, 200))

    def remake() -> Tensor:
        return x

    assert carry(carry(x, tiles=tiles), remake=remake) is x
    assert carried(x) == Carried(tiles, remake)


def test_tensors_whose_changes_nobody_counts_take_no_notes() -> None:
    with torch.inference_mode():
        x = arrived()
        x.add_(1)
        assert carried(x) == Carried()


@pytest.mark.parametrize("form", ["e5m2", "blocks", "transposed", "shape"])
def test_notes_of_another_form_are_not_used(form: str) -> None:
    x = rows(60, 200)
    expected = run(x.clone())
    wrong: dict[str, Quantized] = {
        "e5m2": quantize_tiles(x, dtype=E5M2),
        "blocks": quantize_blocks(x),
        "transposed": quantize_tiles(x.t()),
        "shape": quantize_tiles(x[:50]),
    }
    carry(x, tiles=wrong[form])
    assert same(run(x), expected)


def test_notes_are_not_used_where_one_scale_is_for_all() -> None:
    x = arrived()
    assert same(run(x, TENSOR), run(x.clone(), TENSOR))


def test_a_gradient_in_another_format_is_quantised_anew() -> None:
    x, w, grad = rows(60, 200), weight(130, 200), arrived(60, 130)
    recipe = Recipe(gradient_format="e5m2")
    linear(x, [w], Call(recipe, QuantizedWeight())).backward(grad)
    assert w.grad is not None
    assert torch.equal(w.grad, plain_linear(x, w, grad, None, recipe).weights[0])


def test_what_came_with_powers_of_two_keeps_them_whatever_the_recipes_scales() -> None:
    x, w = arrived(), weight(130, 200)
    recipe = Recipe(scales="float32")
    tiles = carried(x).tiles
    assert tiles is not None
    expected = Reference().matmul(tiles, quantize_blocks(w.detach(), power_of_two=False))
    assert torch.equal(linear(x, [w], Call(recipe, QuantizedWeight())), expected)
    # The tiles are the tensor itself; other scales would round it a second time.
    assert torch.equal(dequantize(tiles, x.dtype), x)
    again = dequantize(quantize_tiles(x, power_of_two=False))
    assert (again - x).norm() > 0.01 * x.norm()


def remaking(x: Tensor) -> tuple[Tensor, list[int]]:
    """`x` with a note of how it is made from something kept elsewhere, and how often it was."""
    source, made = x.detach().clone(), []

    def remake() -> Tensor:
        made.append(1)
        return source.clone()

    return carry(x, remake=remake), made


@pytest.mark.parametrize("recipe", [Recipe(), TENSOR], ids=["paper", "tensor"])
def test_what_can_be_made_again_is_not_kept_and_gives_the_same_bits(recipe: Recipe) -> None:
    for shape in ((60, 200), (3, 20, 200)):
        x, made = remaking(rows(60, 200).view(shape))
        w = weight(130, 200)
        y = linear(x, [w], Call(recipe, QuantizedWeight()))
        assert bytes_of(kept_by(y.grad_fn)) == x.nbytes  # the source, which the note refers to
        assert not made
        y.backward(rows(60, 130, seed=2).view_as(y))
        assert len(made) == 1
        assert w.grad is not None
        assert same((y, w.grad), run(rows(60, 200).view(shape), recipe))


def test_what_carries_both_is_made_again_as_numbers_and_quantised_then() -> None:
    x, made = remaking(arrived())
    assert carried(x).tiles is not None
    assert same(run(x), run(x.clone()))
    assert made
