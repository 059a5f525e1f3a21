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

from .chunk import WeightGradQueue


def accumulate_grad(parameter: Tensor, grad: Tensor) -> None:
    """Add `grad` to `parameter.grad`, which is created if it is None. Takes ownership of `grad`."""
    if parameter.grad is None:
        parameter.grad = grad.to(parameter.dtype)
    else:
        parameter.grad.add_(grad)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, queue: WeightGradQueue
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.queue = queue
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, weight, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        queue: WeightGradQueue = ctx.queue

        def weight_grad() -> Tensor:
            return grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])

        def bias_grad() -> Tensor:
            return grad.reshape(-1, grad.shape[-1]).sum(0)

        def now_or_later(parameter: Tensor, compute: Callable[[], Tensor]) -> Tensor | None:
            # Asked here and not in the forward: hooks may have come since, and all uses of a shared
            # weight must go one way.
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                return compute()
            queue.put(lambda: accumulate_grad(parameter, compute()))
            return None

        return (
            grad @ weight if needs_x else None,
            now_or_later(weight, weight_grad) if needs_weight else None,
            now_or_later(bias, bias_grad) if needs_bias else None,
            None,
        )


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
) -> Tensor:
    """`input @ weight.T + bias`, the weight's and bias's gradients left to `queue`.

    Args:
        input: [..., K].
        weight: [N, K].
        bias: [N] or None.
        queue: where the gradients of weight and bias go, if they can wait (see the module's
            docstring); None means the ordinary path.

    Returns:
        [..., N].
    """
    if queue is None or not _can_wait(input, weight, bias):
        return F.linear(input, weight, bias)
    return _Linear.apply(input, weight, bias, queue)  # pyright: ignore[reportReturnType]


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
