"""Linear layers whose weight gradient can wait: the I/W split at 1.0x the FLOPs of a full backward.

`linear` is `torch.nn.functional.linear` with a `WeightGradQueue` handed in. `defer_linears` gives
the same to a module that knows nothing of queues. Everything else in a backward (norms, attention,
activations) belongs to the input-gradient half; only matrix products with weights are deferred, as
in zero-bubble schedules (arXiv 2401.10241, section 2). A custom autograd function takes part by
taking a queue as `linear` does; one that does not runs its whole backward, once, in I.

Deferred is a product of plain real tensors with a leaf [N, K] weight and a leaf [N] bias, if any.
Every other linear takes the ordinary path, where autograd runs the whole backward, once, in I, also
at 1.0x the FLOPs:

- under `torch.autocast`, which casts the operands;
- where saved-tensor hooks are active, as in `torch.utils.checkpoint(..., use_reentrant=False)`,
  whose recomputation must save the tensors that the forward saved, or in `save_on_cpu`;
- inside `torch.func` transforms such as vmap, and in what `torch.compile` compiles, which would
  break at each queued product;
- on subclasses of Tensor or Parameter, which have their own idea of a product;
- on complex tensors, weights that are computed or have one dimension, biases that are computed or
  broadcast.

Gradients of parameters that `accumulate.accumulate_in_float32` was told of are added up in float32,
and products of bfloat16 operands for them are not rounded to bfloat16 first.

A parameter that has hooks when its backward runs (`register_hook`,
`register_post_accumulate_grad_hook`) gets its gradient from autograd in I, so that they see it
whole and once. Hooks on its AccumulateGrad node, as DistributedDataParallel's, cannot be seen from
here and do not learn of a deferred gradient. Nor can a backward know that it runs within
`torch.autograd.grad`: it adds to the parameters' gradients there too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from .accumulate import accumulate_grad, accumulate_product, grad_dtype, product
from .chunk import WeightGradQueue


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        queue: WeightGradQueue,
        remake: Callable[[], Tensor] | None,
    ) -> Tensor:
        ctx.save_for_backward(x if remake is None else None, weight, bias)
        ctx.queue, ctx.remake = queue, remake
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        x, weight, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        queue: WeightGradQueue = ctx.queue
        # Without x's graph, nor ctx: what waits for W would else hold all that was before it.
        remake: Callable[[], Tensor] | None = ctx.remake
        kept = None if x is None else x.detach()

        def operands() -> tuple[Tensor, Tensor]:
            given = kept if remake is None else remake()
            assert given is not None
            return grad.reshape(-1, grad.shape[-1]).t(), given.reshape(-1, given.shape[-1])

        def bias_grad(to: Tensor) -> Tensor:
            return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=grad_dtype(to))

        grad_x = grad @ weight if needs_x else None
        grad_weight = grad_bias = None
        if needs_weight and _has_hooks(weight):
            grad_weight = product(*operands(), grad_dtype(weight))
        elif needs_weight:
            queue.put(lambda: accumulate_product(weight, *operands()))
        if needs_bias and _has_hooks(bias):
            grad_bias = bias_grad(bias)
        elif needs_bias:
            queue.put(lambda: accumulate_grad(bias, bias_grad(bias)))
        return grad_x, grad_weight, grad_bias, None, None


def _has_hooks(parameter: Tensor) -> bool:
    # Asked in the backward and not in the forward: hooks may have come since, and all uses of a
    # shared weight must go one way.
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def _saved_tensor_hooks_active() -> bool:
    # Private, so it may go; then checkpointed modules raise, as their recomputation does not defer.
    autograd = getattr(torch._C, "_autograd", None)
    top = getattr(autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _can_wait(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `_Linear` may stand for `F.linear`; the module's docstring gives the reasons."""
    operands = (x, weight) if bias is None else (x, weight, bias)
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(type(t) in (Tensor, nn.Parameter) and not t.is_complex() for t in operands)
        and weight.is_leaf
        and weight.dim() == 2
        and (bias is None or (bias.is_leaf and bias.shape == weight.shape[:1]))
        and not _autocasts(x.device.type)
        and not _saved_tensor_hooks_active()
        and not torch._C._are_functorch_transforms_active()
    )


def linear(
    input: Tensor,  # noqa: A002  the name in F.linear's signature, by which callers may pass it
    weight: Tensor,
    bias: Tensor | None = None,
    queue: WeightGradQueue | None = None,
    *,
    remake: Callable[[], Tensor] | None = None,
) -> Tensor:
    """`input @ weight.T + bias`, the weight's and bias's gradients left to `queue`.

    Args:
        input: [..., K].
        weight: [N, K].
        bias: [N] or None.
        queue: where the gradients of weight and bias go, if they can wait (see the module's
            docstring); None means the ordinary path.
        remake: makes the input again, the same bits; then it is not kept for the weight gradient,
            which calls this (the ordinary path keeps it all the same).

    Returns:
        [..., N].
    """
    if queue is None or not _can_wait(input, weight, bias):
        return F.linear(input, weight, bias)
    return _Linear.apply(input, weight, bias, queue, remake)  # pyright: ignore[reportReturnType]


class defer_linears(TorchFunctionMode):  # noqa: N801  used as a context manager, like torch.no_grad
    """Within this context every `F.linear` that can wait leaves its weight gradient to `queue`."""

    def __init__(self, queue: WeightGradQueue) -> None:
        super().__init__()
        self._queue = queue

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear:
            return linear(*args, **(kwargs or {}), queue=self._queue)
        return func(*args, **(kwargs or {}))
