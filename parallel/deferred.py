"""Linear layers whose weight gradient can wait: the I/W split at 1.0x the FLOPs of a full backward.

`linear` is `torch.nn.functional.linear` with a `WeightGradQueue` handed in. `defer_linears` gives
the same to a module that knows nothing of queues. Everything else in a backward (norms, attention,
activations) belongs to the input-gradient half; only matrix products with weights are deferred, as
in zero-bubble schedules (arXiv 2401.10241, section 2). A custom autograd function takes part by
taking a queue as `linear` does; one that does not runs its whole backward, once, in I.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
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
    ) -> tuple[Tensor | None, None, None, None]:
        (grad,) = grads
        x, weight, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad @ weight if needs_x else None
        if needs_weight or needs_bias:

            def weight_grad() -> None:
                rows = grad.reshape(-1, grad.shape[-1])
                if needs_weight:
                    accumulate_grad(weight, rows.t() @ x.reshape(-1, x.shape[-1]))
                if needs_bias:
                    accumulate_grad(bias, rows.sum(0))

            ctx.queue.put(weight_grad)
        return grad_x, None, None, None


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, queue: WeightGradQueue | None = None
) -> Tensor:
    """`x @ weight.T + bias`, the weight's and bias's gradients left to `queue`.

    Args:
        x: [..., K].
        weight: [N, K]; a leaf. (The gradient of a weight that is itself computed cannot wait; such
        a
            weight takes the ordinary path.)
        bias: [N] or None.
        queue: where the weight gradient goes; None means the ordinary path.

    Returns:
        [..., N].
    """
    leaves = weight.is_leaf and (bias is None or bias.is_leaf)
    if queue is None or not leaves or not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, queue)  # pyright: ignore[reportReturnType]


class defer_linears(TorchFunctionMode):  # noqa: N801  used as a context manager, like torch.no_grad
    """Within this context every `F.linear` leaves its weight gradient to `queue`."""

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
            with torch._C.DisableTorchFunction():
                return linear(*args, **(kwargs or {}), queue=self._queue)
        return func(*args, **(kwargs or {}))
