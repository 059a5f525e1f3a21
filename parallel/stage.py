"""Runs the chunks of one stage: forward, backward or its halves; no communication here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .chunk import Chunk
from .deferred import defer_linears

Tensors = tuple[Tensor | None, ...]
LossFn = Callable[..., Tensor]


@dataclass
class _Live:
    """What a chunk keeps between its forward and the end of its backward."""

    chunk: Chunk
    inputs: Tensors
    outputs: tuple[GradientEdge | None, ...]
    losses: list[Tensor]


class StageRunner:
    """One stage of this rank, and its live chunks.

    Args:
        stage: index of the stage.
        module: called as `module(*inputs)`, or `module(*inputs, chunk=Chunk)` if its forward has a
            parameter of that name.
        loss_fn: of the last stage, `loss_fn(*outputs, *targets)` (with `chunk=` likewise) -> 0-dim
            tensor; None elsewhere.
        split: micro-batches whose backward is split into I and W.
    """

    def __init__(
        self, stage: int, module: nn.Module, loss_fn: LossFn | None, split: frozenset[int]
    ) -> None:
        self.stage = stage
        self.module = module
        self.loss_fn = loss_fn
        self._split = split
        self._takes_chunk = _takes_chunk(module.forward)
        self._loss_takes_chunk = loss_fn is not None and _takes_chunk(loss_fn)
        self._live: dict[int, _Live] = {}

    @property
    def num_live(self) -> int:
        """Chunks whose forward has begun and whose backward (B, or I and W) has not ended."""
        return len(self._live)

    def forward(
        self, microbatch: int, inputs: Tensors, targets: Tensors | None, *, training: bool
    ) -> tuple[Tensors, Mapping[str, Tensor]]:
        """Run F.

        Args:
            inputs: the stage's inputs; those that require grad are leaves.
            targets: the loss's targets on the last stage, else None.
            training: keep what the backward needs.

        Returns:
            The outputs, detached, with `requires_grad` telling which want a gradient (empty on the
            last stage), and the losses by name, detached ("main" is loss_fn's).

        Raises:
            ValueError: an output is no tensor, or a view of part of one.
        """
        chunk = Chunk(self.stage, microbatch, training)
        live = _Live(chunk, inputs, (), [])
        if training:
            self._live[microbatch] = live
        defer = training and microbatch in self._split and not self._takes_chunk
        with torch.set_grad_enabled(training):
            with defer_linears(chunk.weight_grads) if defer else nullcontext():
                extra: dict[str, Any] = {"chunk": chunk} if self._takes_chunk else {}
                outputs = self._checked(self.module(*inputs, **extra))
                losses: dict[str, Tensor] = {}
                if self.loss_fn is not None:
                    extra = {"chunk": chunk} if self._loss_takes_chunk else {}
                    loss = self.loss_fn(*outputs, *(targets or ()), **extra)
                    losses["main"] = self._checked_loss(loss)
                    outputs = ()
            for name, loss in chunk.losses:
                if name == "main":
                    raise ValueError(
                        'add_loss("main", ...): that name is loss_fn\'s; choose another'
                    )
                losses[name] = losses[name] + loss if name in losses else loss
        if not training:
            return outputs, losses
        live.outputs = tuple(get_gradient_edge(o) if o.requires_grad else None for o in outputs)
        live.losses = [loss for loss in losses.values() if loss.requires_grad]
        chunk.losses.clear()
        detached = tuple(o.detach().requires_grad_(o.requires_grad) for o in outputs)
        return detached, {name: loss.detach() for name, loss in losses.items()}

    def backward(
        self, microbatch: int, grads: Tensors, *, loss_scale: float, split: bool
    ) -> Tensors:
        """Run B, or I if `split`.

        Args:
            grads: gradient of each output; None where there is none.
            loss_scale: weight of this chunk's losses in the step's loss.

        Returns:
            The gradient of each input; None where there is none.
        """
        live = self._live[microbatch]
        roots: list[Tensor | GradientEdge] = []
        seeds: list[Tensor | None] = []
        for edge, grad in zip(live.outputs, grads, strict=False):
            if edge is not None and grad is not None:
                roots.append(edge)
                seeds.append(grad)
        for loss in live.losses:
            roots.append(loss)
            seeds.append(torch.full_like(loss, loss_scale))
        queue = live.chunk.weight_grads
        live.outputs, live.losses = (), []
        if roots:
            queue.deferring = split
            torch.autograd.backward(roots, seeds)  # pyright: ignore[reportArgumentType]
            queue.deferring = False
        inputs, live.inputs = live.inputs, ()
        if not split:
            del self._live[microbatch]
        return tuple(None if x is None else x.grad for x in inputs)

    def weight(self, microbatch: int) -> None:
        """Run W: the deferred weight gradients of an earlier I."""
        self._live.pop(microbatch).chunk.weight_grads.run()

    def discard(self) -> None:
        """Forget all live chunks (after a step that failed)."""
        self._live.clear()

    def _checked(self, outputs: object) -> tuple[Tensor, ...]:
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        for i, output in enumerate(several):
            where = f"output {i} of stage {self.stage} ({type(self.module).__name__})"
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"{where} is a {type(output).__name__}; a stage returns a tensor or a tuple of "
                    "tensors"
                )
            # A reshaped whole is harmless (nn.Linear returns one for inputs of three dimensions); a
            # part would keep all of its base alive for as long as it is under way.
            if output._base is not None and output.numel() != output._base.numel():
                raise ValueError(
                    f"{where}, shape {list(output.shape)}, is a view of a tensor of another size, "
                    f"{list(output._base.shape)}, and would keep that alive while it is under way; "
                    "return output.clone()"
                )
        return several  # pyright: ignore[reportReturnType]

    def _checked_loss(self, loss: object) -> Tensor:
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            what = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a 0-dim tensor, got {what}; return its mean()")
        return loss


def _takes_chunk(function: Callable[..., Any]) -> bool:
    try:
        return "chunk" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return False
