"""The three elementary layers: matrix product, norm, embedding. They start uninitialised.

Initial values are a function of a parameter's name (see `initialise`), so nothing here draws
random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..fp8.carried import carried, carry
from ..fp8.linear import Call
from ..fp8.linear import linear as fp8_linear
from ..parallel.accumulate import grad_dtype
from ..parallel.chunk import WeightGradQueue
from ..parallel.deferred import linear
from .build import Build

_Made = TypeVar("_Made")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what must not be computed below float32: norms, rotation, routing, losses."""
    return torch.promote_types(dtype, torch.float32)


class Linear(nn.Module):
    """`x @ weight.T`, in FP8 if there is a recipe for that; its weight gradient left to a queue.

    Args:
        in_features, out_features: sizes.
        build: how it is made.
        fp8: False for what stays in high precision whatever the recipe.

    Attributes:
        weight: [out_features, in_features].
        call: of the product in FP8, or None.
    """

    def __init__(
        self, in_features: int, out_features: int, build: Build, *, fp8: bool = True
    ) -> None:
        super().__init__()
        self.weight = build.weight(out_features, in_features, fp8=fp8)
        self.call = build.call() if fp8 else None

    def forward(self, x: Tensor, queue: WeightGradQueue | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if self.call is not None:
            return fp8_linear(x, [self.weight], replace(self.call, queue=queue))
        return linear(x, self.weight, None, queue, remake=carried(x).remake)

    def set_name(self, name: str) -> None:
        """What errors call this layer."""
        if self.call is not None:
            self.call = replace(self.call, name=name)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"


def side_by_side(
    x: Tensor, layers: Sequence[Linear], call: Call | None, queue: WeightGradQueue | None
) -> list[Tensor]:
    """Several layers of one input; in FP8 one product, for which the input is quantised once.

    Args:
        x: [..., in_features].
        layers: of equal in_features.
        call: of that product, if it is in FP8.
        queue: for weight gradients.
    """
    if call is None:
        return [layer(x, queue) for layer in layers]
    both = fp8_linear(x, [layer.weight for layer in layers], replace(call, queue=queue))
    return list(both.split([len(layer.weight) for layer in layers], dim=-1))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 at least.

    Args:
        size, eps: as usual.
        build: how it is made; it also tells whether the output is to be made again in the backward
            by those who would keep it.

    Attributes:
        weight: [size].
    """

    def __init__(self, size: int, eps: float, build: Build) -> None:
        super().__init__()
        self.eps = eps
        self.weight = build.weight(size)
        self._remade = build.recompute.norms

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size], same dtype."""
        y = rms_norm(x, self.weight, self.eps)
        if self._remade and y.requires_grad:
            source, weight, eps = x.detach(), self.weight.detach(), self.eps
            make = partial(F.rms_norm, source, weight.shape, weight, eps)
            carry(y, remake=remaking(make, [source, weight]))
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch's `rms_norm`, which on CPUs keeps float32 copies for the backward; this keeps x.

    There the weight's gradient is not rounded on its way to where it is added up in float32.
    """
    if x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.grad_dtype = eps, grad_dtype(weight)
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dtype = at_least_float32(x.dtype)
        wide = x.to(dtype)
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + ctx.eps)
        unit, grad = wide * scale, grad.to(dtype)
        grad_weight = grad_x = None
        if needs_weight:
            grad_weight = (grad * unit).flatten(0, -2).sum(dim=0).to(ctx.grad_dtype)
        if needs_x:
            grad = grad * weight.to(dtype)
            along = (grad * unit).mean(dim=-1, keepdim=True)
            grad_x = grad.sub_(unit.mul_(along)).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None


def remaking(make: Callable[[], _Made], sources: Iterable[Tensor]) -> Callable[[], _Made]:
    """`make`, as long as what it works from is as it is now.

    Autograd watches over the tensors that it saves, but not over what a function captures.

    Args:
        make: makes something again.
        sources: the tensors that it works from. Those of `torch.inference_mode`, whose changes
            nobody counts, are not watched.

    Returns:
        A function that gives what `make` does, or raises a RuntimeError if a source was changed in
        place meanwhile.
    """
    watched = [(x.detach(), x._version) for x in sources if not x.is_inference()]

    def made() -> _Made:
        for source, version in watched:
            if source._version != version:
                raise RuntimeError(
                    "what the backward is to make again needs a tensor of shape "
                    f"{list(source.shape)}, {source.dtype}, which was changed in place since the "
                    f"forward: it is at version {source._version}, expected {version}; run the "
                    "backward, weight gradients that wait included, before weights or inputs "
                    "change, or do not recompute"
                )
        return make()

    return made


class Embedding(nn.Module):
    """Rows of a table.

    Attributes:
        weight: [vocabulary, hidden].
    """

    def __init__(self, vocab_size: int, size: int, build: Build) -> None:
        super().__init__()
        self.weight = build.weight(vocab_size, size)

    def forward(self, tokens: Tensor) -> Tensor:
        """[...] int64 -> [..., hidden]."""
        return F.embedding(tokens, self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} x {self.weight.shape[1]}"
