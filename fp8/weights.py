"""Weights in FP8, quantised once after each change and not once a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .formats import Quantized
from .recipe import Recipe


class _Seen:
    """A weight as it was when it was quantised."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = ref(weight)
        # Memory that was freed may come back at the same address (as when a module goes to another
        # dtype and back), a storage that is referred to does not.
        self._storage = StorageWeakRef(weight.untyped_storage())
        self._place = weight.data_ptr(), weight.shape, weight.stride()
        self._version = None if weight.is_inference() else weight._version

    def is_still(self, weight: Tensor) -> bool:
        """Whether `weight` is that tensor with the same numbers, as far as anyone counts."""
        return (
            self._weight() is weight
            and self._version is not None
            and self._version == weight._version
            and self._place == (weight.data_ptr(), weight.shape, weight.stride())
            and self._storage == StorageWeakRef(weight.untyped_storage())
        )


class QuantizedWeight:
    """The FP8 form of one weight, or of several stacked, kept until one of them changes.

    A change is noticed by the tensors' version counters, which in-place operations of torch move,
    the loading of a checkpoint included, and by another tensor or other memory in a weight's place.
    Fused optimizers change weights uncounted; so a step of any `torch.optim.Optimizer` is counted
    here. Only other changes past autograd (in place on `.data`, by a kernel of one's own) go
    unnoticed: call `forget` after them. Weights made in `torch.inference_mode`, which nobody
    counts, are quantised each time.

    Attributes:
        times_quantized: how often the weights were quantised.
    """

    def __init__(self) -> None:
        _count_optimizer_steps()
        self.times_quantized = 0
        self._recipe: Recipe | None = None
        self._seen: list[_Seen] = []
        self._kept: tuple[Quantized, Quantized] | None = None

    def get(self, weights: Sequence[Tensor], recipe: Recipe) -> tuple[Quantized, Quantized]:
        """The stack [..., N, K] for products with inputs, and its transpose for gradients.

        Args:
            weights: [..., N_i, K], stacked along N.
            recipe: how.
        """
        if self._kept is None or self._has_changed(weights, recipe):
            with torch.no_grad():
                stack = weights[0] if len(weights) == 1 else torch.cat(tuple(weights), dim=-2)
                q = recipe.weight(stack.detach())
            # FP8 units read both operands along the contraction, so a GPU needs a second copy; the
            # reference is content with a view.
            turned = Quantized(q.values.mT.contiguous(), q.mT.scales) if stack.is_cuda else q.mT
            self._kept, self._recipe = (q, turned), recipe
            self._seen = [_Seen(w) for w in weights]
            self.times_quantized += 1
        return self._kept

    def _has_changed(self, weights: Sequence[Tensor], recipe: Recipe) -> bool:
        return (
            recipe != self._recipe
            or len(weights) != len(self._seen)
            or not all(seen.is_still(w) for seen, w in zip(self._seen, weights, strict=True))
        )

    def forget(self) -> None:
        """Quantise anew at the next use."""
        self._kept = None

    def __reduce__(self) -> tuple[type[QuantizedWeight], tuple[()]]:
        # Copies and files of a module have its weights; the rest follows from them.
        return QuantizedWeight, ()

    def nbytes(self) -> int:
        """Bytes kept now."""
        if self._kept is None:
            return 0
        q, turned = self._kept
        return q.nbytes() + (turned.nbytes() if turned.values.is_cuda else 0)


@cache
def _count_optimizer_steps() -> None:
    """From now on, let each optimizer's step move the version counters of its parameters."""
    register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    del args, kwargs
    for group in optimizer.param_groups:
        increment_version(group["params"])
