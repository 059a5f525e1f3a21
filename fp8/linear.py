"""Linear layers whose three products, forward and both of the backward, are in FP8.

    forward         y = x w^T      x in tiles of 1x128,           w in blocks
    input gradient  dx = dy w      dy in tiles of 1x128,          w in blocks
    weight gradient dw = dy^T x    dy and x in tiles of 128x1: the contraction runs along tokens

(arXiv 2412.19437, section 3.3). What is kept for the backward is the forward's FP8 input; it is
turned into tiles of 128x1 when the weight gradient is computed, which a queue may put off. The
weight gradient is added up in float32.

Shapes: M rows (tokens), K in, N out, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .carried import carried, carry
from .formats import Quantized
from .products import grouped_matmul, grouped_matmul_along_k, scaled_matmul
from .recipe import Recipe
from .weights import QuantizedWeight


class Queue(Protocol):
    """Where weight gradients wait, such as `counterflow.parallel.chunk.WeightGradQueue`."""

    def put(self, work: Callable[[], None], /) -> None:
        """Run `work` now or later, once."""
        ...


@dataclass(frozen=True)
class Call:
    """All that one product with a weight needs besides tensors.

    Attributes:
        recipe: which numbers, and by which backend.
        quantized: the weight's FP8 form.
        queue: where weight gradients go; None computes them at once and hands them to autograd, as
            is done for weights that are computed or have hooks. Hooks on a weight's AccumulateGrad
            node, as DistributedDataParallel's, cannot be seen and do not learn of a gradient that
            goes to the queue. Nor can a backward know that it runs within `torch.autograd.grad`:
            with a queue it adds to `weight.grad` there too, and that call finds no gradient.
        counts: of grouped products, the rows of each expert; None of a dense one.
        name: of the layer, for errors.
    """

    recipe: Recipe
    quantized: QuantizedWeight
    queue: Queue | None = None
    counts: Sequence[int] | None = None
    name: str = "an FP8 linear"

    def quantized_weights(self, weights: Sequence[Tensor]) -> tuple[Quantized, Quantized]:
        """The stacked weights for products with inputs, and turned for those with gradients."""
        both = self.quantized.get(weights, self.recipe)
        self.recipe.checked(both[0], self.name, "weight")
        return both

    def times(self, x: Quantized, w: Quantized, dtype: torch.dtype) -> Tensor:
        """x w^T, each row with its expert's weight if grouped."""
        backend = self.recipe.backend
        if self.counts is None:
            return scaled_matmul(x, w, out_dtype=dtype, backend=backend)
        return grouped_matmul(x, w, self.counts, out_dtype=dtype, backend=backend)

    def add_weight_grad(self, grad: Quantized, x: Quantized, into: Tensor) -> None:
        """into += grad^T x, of operands in tiles of 128x1; `into` is float32."""
        backend = self.recipe.backend
        if self.counts is None:
            scaled_matmul(grad, x, accumulate=into, backend=backend)
        else:
            grouped_matmul_along_k(grad, x, self.counts, accumulate=into, backend=backend)

    def weight_grads(
        self,
        weights: Sequence[Tensor],
        grad: Quantized,
        input_columns: Callable[[], Quantized],
    ) -> list[Tensor | None]:
        """The gradients of the stacked `weights`, now or through the queue.

        Args:
            weights: those that were multiplied, in the order of their stacking.
            grad: of the output, in tiles of 128x1.
            input_columns: makes the input in tiles of 128x1; called when the time has come.

        Returns:
            What autograd is to be told: gradients, or None of what goes to the queue.
        """
        queue = self.queue
        if queue is None or not all(_can_wait(w) for w in weights):
            x = input_columns()
            return [self._fresh(w, part, x) for w, part in _parts(weights, grad)]

        def work() -> None:
            x = input_columns()
            for weight, part in _parts(weights, grad):
                if not weight.requires_grad:
                    continue
                if weight.grad is None and _grad_dtype(weight) == torch.float32:
                    weight.grad = _zeros_like(weight)
                if weight.grad is not None and weight.grad.dtype == torch.float32:
                    self.add_weight_grad(part, x, weight.grad)
                    continue
                fresh = self._fresh(weight, part, x)
                assert fresh is not None
                weight.grad = fresh if weight.grad is None else weight.grad.add_(fresh)

        queue.put(work)
        return [None] * len(weights)

    def _fresh(self, weight: Tensor, grad: Quantized, x: Quantized) -> Tensor | None:
        if not weight.requires_grad:
            return None
        into = _zeros_like(weight)
        self.add_weight_grad(grad, x, into)
        return into.to(_grad_dtype(weight))


def linear(x: Tensor, weights: Sequence[Tensor], call: Call) -> Tensor:
    """x times the transpose of the weights, stacked: [..., N_1 + N_2 + ...]. Differentiable once.

    Args:
        x: [..., K] bfloat16 or float32; grouped [M, K]. What it carries is used (see `carried`).
        weights: each [N_i, K], with one input and therefore one quantisation of it; grouped, one
            of [E, N, K]. float32 or bfloat16. They are quantised as one matrix: a block of 128x128
            has rows of two of them where N_i is no multiple of 128.
        call: the rest.

    Returns:
        dtype of x.

    Raises:
        ValueError: a shape or dtype that does not fit; NonFiniteError where the recipe looks for
            that.
    """
    check_operands(x, weights, call)
    y_MN: Tensor = _Linear.apply(call, torch.is_grad_enabled(), as_matrix(x), *weights)  # pyright: ignore[reportAssignmentType]
    return y_MN if x.dim() == 2 else y_MN.unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, has_backward: bool, x_MK: Tensor, *weights: Tensor) -> Tensor:
        tiles = call.recipe.activation(x_MK, call.name)
        quantized, ctx.turned = call.quantized_weights(weights)
        ctx.call, ctx.weights, ctx.dtype = call, weights, x_MK.dtype
        ctx.remake = carried(x_MK).remake
        if has_backward and any(ctx.needs_input_grad[3:]) and ctx.remake is None:
            ctx.save_for_backward(*tiles)
        return call.times(tiles, quantized, x_MK.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_MN: Tensor
    ) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        _, _, needs_x, *needs_weights = ctx.needs_input_grad
        tiles, across = call.recipe.gradient(
            grad_MN, call.counts, call.name, columns=any(needs_weights)
        )
        grad_x = call.times(tiles, ctx.turned, ctx.dtype) if needs_x else None
        grads: list[Tensor | None] = [None] * len(needs_weights)
        if across is not None:
            columns = input_columns(call, ctx.saved_tensors, ctx.remake)
            grads = call.weight_grads(ctx.weights, across, columns)
        return None, None, grad_x, *grads


def as_matrix(x: Tensor) -> Tensor:
    """x [..., K] as [M, K], with what it carries."""
    if x.dim() == 2:
        return x
    notes = carried(x)
    tiles = notes.tiles
    if tiles is not None:
        tiles = Quantized(tiles.values.flatten(0, -2), tiles.scales.flatten(0, -2))
    return carry(x.flatten(0, -2), tiles=tiles, remake=notes.remake)


def input_columns(
    call: Call, tiles: tuple[Tensor, ...], remake: Callable[[], Tensor] | None
) -> Callable[[], Quantized]:
    """How the input in tiles of 128x1 is made: from its tiles, or from itself if that is remade."""

    def make() -> Quantized:
        if remake is None:
            return call.recipe.activation_columns(Quantized(*tiles), call.counts)
        x = remake()
        again = call.recipe.activation(x.reshape(-1, x.shape[-1]), call.name)
        return call.recipe.activation_columns(again, call.counts)

    return make


def _parts(weights: Sequence[Tensor], grad_NP: Quantized) -> list[tuple[Tensor, Quantized]]:
    """Each of the stacked weights with the rows of the output's gradient that are its own."""
    parts: list[tuple[Tensor, Quantized]] = []
    start = 0
    for weight in weights:
        rows = slice(start, start + weight.shape[-2])
        parts.append((weight, Quantized(grad_NP.values[rows], grad_NP.scales[rows])))
        start = rows.stop
    return parts


def _zeros_like(weight: Tensor) -> Tensor:
    """float32, contiguous whatever the weight's strides are, as products add into it."""
    return torch.zeros_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)


def _grad_dtype(weight: Tensor) -> torch.dtype:
    """What dtype autograd lets `weight.grad` have."""
    return (weight.grad_dtype if weight.is_leaf else None) or weight.dtype


def _can_wait(weight: Tensor) -> bool:
    """Whether this gradient may go past autograd: a leaf, without hooks that can be seen from here.

    Those on its AccumulateGrad node cannot, nor whether `torch.autograd.grad` asks (see `Call`).
    """
    # Asked in the backward and not in the forward, as hooks may have come since.
    hooks = weight._backward_hooks or weight._post_accumulate_grad_hooks
    return weight.is_leaf and not hooks


def check_operands(x: Tensor, weights: Sequence[Tensor], call: Call) -> None:
    """Raise ValueError unless x can be multiplied with the weights."""
    check_weights(weights, call)
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"{call.name}: FP8 linears take bfloat16 or float32 and return the same, got "
            f"{x.dtype}; convert the input"
        )
    if x.dim() < 2 or any(w.shape[-1] != x.shape[-1] for w in weights):
        raise ValueError(
            f"{call.name}: an input {list(x.shape)} cannot be multiplied with weights "
            f"{', '.join(str(list(w.shape)) for w in weights)}; their last dimensions must agree, "
            "and the input have two or more"
        )
    if call.counts is not None:
        (weight,) = weights
        if x.dim() != 2:
            raise ValueError(
                f"{call.name}: rows that are grouped must be a matrix [rows, {x.shape[-1]}], got "
                f"{list(x.shape)}"
            )
        if len(call.counts) != len(weight) or sum(call.counts) != len(x):
            raise ValueError(
                f"{call.name}: counts has {len(call.counts)} experts and {sum(call.counts)} rows, "
                f"but there are weights for {len(weight)} experts and {len(x)} rows"
            )


def check_weights(weights: Sequence[Tensor], call: Call) -> None:
    """Raise ValueError unless these are weights of a product like `call`."""
    dims = 2 if call.counts is None else 3
    if any(w.dim() != dims for w in weights) or (call.counts is not None and len(weights) != 1):
        form = "matrices [N, K]" if call.counts is None else "one tensor [experts, N, K]"
        raise ValueError(
            f"{call.name}: weights must be {form}, got "
            f"{', '.join(str(list(w.shape)) for w in weights)}"
        )
    for weight in weights:
        if weight.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"{call.name}: weights must be float32 (a master copy) or bfloat16, got "
                f"{weight.dtype}; they are quantised here"
            )


class _Layer(nn.Module):
    """A weight with its FP8 form; see `Linear`."""

    def __init__(
        self,
        shape: Sequence[int],
        recipe: Recipe | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
        name: str,
    ) -> None:
        super().__init__()
        self.recipe = recipe or Recipe()
        self.name = name
        self.quantized = QuantizedWeight()
        self.weight = nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))

    def reset_parameters(self) -> None:
        """Uniform within 1/sqrt(K), as of torch.nn.Linear."""
        bound = 1 / math.sqrt(max(1, self.weight.shape[-1]))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)


class Linear(_Layer):
    """`torch.nn.Linear` with its three products in FP8.

    The weight is quantised once after each change. Changes that nobody counts go unnoticed:
    collectives (broadcast, all_reduce, all_gather, recv, so also DistributedDataParallel's first
    synchronisation), optimizers that step a flat buffer, operations on `.data`. Call
    `counterflow.fp8.forget` with the module after them (see `weights.QuantizedWeight`).

    Args:
        in_features, out_features: K and N; need not be multiples of 128.
        bias: whether there is one; it is added in the output's dtype.
        recipe: which numbers.
        dtype: of the weight: float32, a master copy, or bfloat16.
        device: of the weight.
        name: for errors.

    Attributes:
        weight: [N, K].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        recipe: Recipe | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        name: str = "an FP8 linear",
    ) -> None:
        super().__init__((out_features, in_features), recipe, dtype, device, name)
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        )
        self.reset_parameters()

    def forward(self, x: Tensor, queue: Queue | None = None) -> Tensor:
        """[..., K] -> [..., N], dtype of x (bfloat16 or float32).

        Args:
            x: the input.
            queue: where the weight's gradient goes. Not for weights within DistributedDataParallel,
                whose hooks on AccumulateGrad nodes cannot be seen and would not learn of it, nor
                for a backward within `torch.autograd.grad` (see `Call`).
        """
        call = Call(self.recipe, self.quantized, queue, None, self.name)
        y = linear(x, [self.weight], call)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        out, size = self.weight.shape
        return f"{size} -> {out}, bias={self.bias is not None}, {self.recipe}"


class GroupedLinear(_Layer):
    """A linear layer for each group of consecutive rows, such as an expert's, in FP8.

    Its weight is quantised as `Linear`'s, and forgotten as that.

    Args:
        groups: E.
        in_features, out_features, recipe, dtype, device, name: as of `Linear`.

    Attributes:
        weight: [E, N, K].
    """

    def __init__(
        self,
        groups: int,
        in_features: int,
        out_features: int,
        *,
        recipe: Recipe | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        name: str = "an FP8 grouped linear",
    ) -> None:
        super().__init__((groups, out_features, in_features), recipe, dtype, device, name)
        self.reset_parameters()

    def forward(self, rows_MK: Tensor, counts: Sequence[int], queue: Queue | None = None) -> Tensor:
        """[M, K] -> [M, N]; `counts` has each group's rows in order, zeros allowed.

        `queue` as of `Linear.forward`.
        """
        call = Call(self.recipe, self.quantized, queue, [int(n) for n in counts], self.name)
        return linear(rows_MK, [self.weight], call)

    def extra_repr(self) -> str:
        groups, out, size = self.weight.shape
        return f"{groups} groups, {size} -> {out}, {self.recipe}"
