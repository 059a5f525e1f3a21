"""Linear layers in FP8 written out product by product, and what a layer holds on to.

Shapes: M rows, K in, N out, E experts, D in and out of a SwiGLU, I inner, P padded rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import FunctionType, MethodType
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from counterflow.fp8 import (
    E4M3,
    Linear,
    Quantized,
    Recipe,
    forget,
    quantize_blocks,
    quantize_columns,
    quantize_tensor,
    quantize_tiles,
    transpose_tiles,
)
from counterflow.fp8.products.base import Backend, Product
from counterflow.fp8.products.reference import Reference
from counterflow.fp8.quantize_reference import pad_groups
from counterflow.fp8.swiglu_reference import swiglu, swiglu_backward
from counterflow.fp8.weights import QuantizedWeight

Counts = Sequence[int] | None
TENSOR = Recipe(activations="tensor", gradients="tensor", weights="tensor")
RECIPES = {
    "paper": Recipe(),
    "float32 scales": Recipe(scales="float32"),
    "e5m2 gradients": Recipe(gradient_format="e5m2"),
    "block gradients": Recipe(gradients="block"),
    "tensor": TENSOR,
    "tensor, float32, e5m2": Recipe("float32", "tensor", "tensor", "tensor", "e5m2"),
}


def rows(count: int, size: int, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[count, size] with channels that stand out and rows of very different size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, generator=generator)
    x[:, :: max(1, size // 3)] *= 50
    return (x * torch.logspace(-2, 2, count).unsqueeze(1)).to(dtype)


def weight(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A parameter whose blocks are of very different size."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
    return nn.Parameter((w * torch.logspace(-1, 1, shape[-1])).to(dtype))


class Grads(NamedTuple):
    """A layer's output and its gradients, those of the weights in float32."""

    y: Tensor
    x: Tensor
    weights: list[Tensor]
    factors: Tensor | None = None


def plain_linear(x: Tensor, w: Tensor, grad: Tensor, counts: Counts, recipe: Recipe) -> Grads:
    """x w^T and its gradients, from quantisers and the reference product alone."""
    x_tiles, x_columns = _input(x, counts, recipe)
    w_blocks, w_turned = _weight(w, recipe)
    grad_tiles, grad_columns = _gradient(grad, counts, recipe)
    return Grads(
        _times(x_tiles, w_blocks, counts, x.dtype),
        _times(grad_tiles, w_turned, counts, x.dtype),
        [_weight_grad(grad_columns, x_columns, counts)],
    )


def plain_swiglu(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    grad: Tensor,
    counts: Counts,
    factors: Tensor | None,
    recipe: Recipe,
) -> Grads:
    """The same of a SwiGLU, with h kept in E4M3 and its output made again from that."""
    power, dtype = recipe.power_of_two, x.dtype
    x_tiles, x_columns = _input(x, counts, recipe)
    up_blocks, up_turned = _weight(gate_up, recipe)
    down_blocks, down_turned = _weight(down, recipe)
    h = _times(x_tiles, up_blocks, counts, dtype)
    a_tiles, _ = _input(swiglu(h, factors), counts, recipe)
    y = _times(a_tiles, down_blocks, counts, dtype)

    kept = quantize_tiles(h, power_of_two=power)
    again = swiglu(kept, factors, nominal=dtype)
    a_columns = (
        quantize_columns(again, counts, power_of_two=power)
        if recipe.activations == "tile"
        else _input(again, counts, recipe)[1]
    )
    grad_tiles, grad_columns = _gradient(grad, counts, recipe)
    grad_down = _weight_grad(grad_columns, a_columns, counts)
    grad_a = _times(grad_tiles, down_turned, counts, dtype)
    grad_h, grad_factors = swiglu_backward(grad_a, kept, factors)
    grad_tiles, grad_columns = _gradient(grad_h, counts, recipe)
    grad_x = _times(grad_tiles, up_turned, counts, dtype)
    grad_up = _weight_grad(grad_columns, x_columns, counts)
    return Grads(y, grad_x, [grad_up, grad_down], grad_factors)


def _input(x: Tensor, counts: Counts, recipe: Recipe) -> tuple[Quantized, Quantized]:
    power = recipe.power_of_two
    if recipe.activations == "tensor":
        q = quantize_tensor(x, power_of_two=power)
        return q, _columns_of_one_scale(q, counts)
    q = quantize_tiles(x, power_of_two=power)
    return q, transpose_tiles(q, counts, power_of_two=power)


def _gradient(grad: Tensor, counts: Counts, recipe: Recipe) -> tuple[Quantized, Quantized]:
    dtype, power = recipe.gradient_dtype, recipe.power_of_two
    if recipe.gradients == "tensor":
        q = quantize_tensor(grad, dtype=dtype, power_of_two=power)
        return q, _columns_of_one_scale(q, counts)
    quantize = quantize_blocks if recipe.gradients == "block" else quantize_tiles
    columns = quantize_columns(grad, counts, dtype=dtype, power_of_two=power)
    return quantize(grad, dtype=dtype, power_of_two=power), columns


def _weight(w: Tensor, recipe: Recipe) -> tuple[Quantized, Quantized]:
    quantize = quantize_tensor if recipe.weights == "tensor" else quantize_blocks
    q = quantize(w.detach(), power_of_two=recipe.power_of_two)
    return q, Quantized(q.values.mT.contiguous(), q.scales.mT.contiguous())


def _columns_of_one_scale(q: Quantized, counts: Counts) -> Quantized:
    codes = pad_groups(q.values.view(torch.uint8), counts)
    return Quantized(codes.t().contiguous().view(q.values.dtype), q.scales)


def _times(a: Quantized, b: Quantized, counts: Counts, dtype: torch.dtype) -> Tensor:
    if counts is None:
        return Reference().matmul(a, b, out_dtype=dtype)
    return Reference().grouped(a, b, counts, out_dtype=dtype)


def _weight_grad(grad: Quantized, x: Quantized, counts: Counts) -> Tensor:
    n, k = len(grad.values), len(x.values)
    if counts is None:
        return Reference().matmul(grad, x, accumulate=torch.zeros(n, k))
    into = torch.zeros(len(counts), n, k)
    return Reference().grouped_along_k(grad, x, counts, accumulate=into)


class Counting(Reference):
    """The reference, which notes the kind of each product and its operands."""

    name: ClassVar[str] = "counting"

    def __init__(self) -> None:
        self.products: list[Product] = []

    def _compute(self, product: Product) -> Tensor:
        self.products.append(product)
        return super()._compute(product)

    def multiplied(self) -> int:
        """Multiply-adds so far."""
        total = 0
        for product in self.products:
            (m, k), n = product.a.values.shape, product.b.values.shape[-2]
            total += m * n * k
        return total


class Contiguous(Reference):
    """The reference, which refuses to add into what a kernel could not take as flat memory."""

    name: ClassVar[str] = "contiguous"

    def __init__(self) -> None:
        self.sums = 0

    def _compute(self, product: Product) -> Tensor:
        if product.accumulate is not None:
            assert product.accumulate.is_contiguous()
            self.sums += 1
        return super()._compute(product)


def broadcast_weight(rank: int, world: int) -> list[bool]:
    """Whether a layer's output is that of rank 0's weight: after the broadcast, and `forget`."""
    del world
    torch.manual_seed(rank)
    layer, theirs = Linear(200, 130), Linear(200, 130)
    x = rows(4, 200)
    layer(x)
    numbers = layer.weight.detach().clone()
    dist.broadcast(numbers, 0)
    theirs.weight = nn.Parameter(numbers)
    dist.broadcast(layer.weight.detach(), 0)
    found = [torch.equal(layer(x), theirs(x))]
    forget(layer)
    return [*found, torch.equal(layer(x), theirs(x))]


def kept_by(*found: Any) -> list[Tensor]:
    """Tensors that graphs, queues, functions and values hold on to, weights and their FP8 aside.

    One of each storage, so that a view is counted as what it keeps alive.
    """
    seen: set[int] = set()
    kept: dict[int, Tensor] = {}
    aside: set[int] = set()
    waiting = list(found)
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, nn.Parameter | Backend):
            continue
        seen.add(id(value))
        if isinstance(value, QuantizedWeight):
            aside |= {t.untyped_storage().data_ptr() for t in _tensors_of(vars(value).values())}
        elif isinstance(value, Tensor):
            kept[value.untyped_storage().data_ptr()] = value
        else:
            waiting.extend(_parts(value))
    return [t for place, t in kept.items() if place not in aside]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind these."""
    return sum(t.untyped_storage().nbytes() for t in tensors)


def in_fp8(tensors: Iterable[Tensor]) -> bool:
    """Whether all are FP8 values or their scales, of which there is one to 128 values at most."""
    wide = [t for t in tensors if t.dtype != E4M3]
    return all(t.dtype == torch.float32 for t in wide) and all(
        any(q.numel() >= 64 * t.numel() for q in tensors if q.dtype == E4M3) for t in wide
    )


def _tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors_of(value)


def _parts(value: Any) -> list[Any]:
    """What a value refers to, as far as tensors can be behind it."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [*cells, *(value.__defaults__ or ())]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, torch.autograd.graph.Node):
        saved = [getattr(value, name) for name in dir(value) if name.startswith("_saved_")]
        custom = getattr(value, "saved_tensors", ())
        following = [node for node, _ in value.next_functions]
        return [*saved, *custom, *following, *getattr(value, "__dict__", {}).values()]
    if type(value).__module__ == "collections":
        return list(value)
    if type(value).__module__.startswith("counterflow"):
        return list(vars(value).values())
    return []
