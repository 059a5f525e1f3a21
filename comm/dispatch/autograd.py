"""Dispatch and combine as autograd sees them, for any backend.

Each one's backward is the other's move (see `base`), started and finished in place. Overlap uses
the split form of the dispatcher instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...fp8 import Quantized
from .base import Dispatcher, Handle


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dispatcher: Dispatcher[Any], handle: Handle, x_TD: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor, Quantized | None]:
        ctx.dispatcher, ctx.handle = dispatcher, handle
        arrived = dispatcher.start_dispatch(x_TD, weights_TK, handle).finish()
        assert arrived.weights_N is not None
        return arrived.rows_ND, arrived.weights_N, arrived.tiles

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_rows_ND: Tensor, grad_weights_N: Tensor, _: None
    ) -> tuple[None, None, Tensor | None, Tensor | None]:
        _, _, needs_x, needs_weights = ctx.needs_input_grad
        pending = ctx.dispatcher.start_dispatch_backward(
            grad_rows_ND if needs_x else None, grad_weights_N if needs_weights else None, ctx.handle
        )
        return None, None, *pending.finish()


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dispatcher: Dispatcher[Any], handle: Handle, rows_ND: Tensor) -> Tensor:
        ctx.dispatcher, ctx.handle = dispatcher, handle
        return dispatcher.start_combine(rows_ND, handle).finish()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_y_TD: Tensor
    ) -> tuple[None, None, Tensor]:
        return None, None, ctx.dispatcher.start_combine_backward(grad_y_TD, ctx.handle).finish()


def dispatch(
    dispatcher: Dispatcher[Any], handle: Handle, x_TD: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor, Quantized | None]:
    """(rows_ND, weights_N, tiles), the first two differentiable once in x_TD and weights_TK."""
    return _Dispatch.apply(dispatcher, handle, x_TD, weights_TK)  # pyright: ignore[reportReturnType]


def combine(dispatcher: Dispatcher[Any], handle: Handle, rows_ND: Tensor) -> Tensor:
    """y_TD, differentiable once in rows_ND."""
    return _Combine.apply(dispatcher, handle, rows_ND)  # pyright: ignore[reportReturnType]
