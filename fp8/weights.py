"""Weights in FP8, quantised once after each change and not once a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .formats import Quantized
from .recipe import Recipe

_STEPS = "_counterflow_steps"


class _Seen:
    """A weight as it was when it was quantised."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = ref(weight)
        # Memory that was freed may come back at the same address (as when a module goes to another
        # dtype and back), a storage that is referred to does not.
        self._storage = StorageWeakRef(weight.untyped_storage())
        self._place = weight.data_ptr(), weight.shape, weight.stride()
        self._changes = _changes(weight)

    def is_still(self, weight: Tensor) -> bool:
        """Whether `weight` is that tensor with the same numbers, as far as anyone counts."""
        return (
            self._weight() is weight
            and self._changes is not None
            and self._changes == _changes(weight)
            and self._place == (weight.data_ptr(), weight.shape, weight.stride())
            and self._storage == StorageWeakRef(weight.untyped_storage())
        )


def _changes(weight: Tensor) -> tuple[int, int] | None:
    """Changes that autograd has counted, and optimizers' steps; None where nobody counts."""
    return None if weight.is_inference() else (weight._version, getattr(weight, _STEPS, 0))


class _Kept(NamedTuple):
    """What was quantised, and from what: one value, so that another thread sees all or nothing."""

    both: tuple[Quantized, Quantized]
    recipe: Recipe
    seen: list[_Seen]

    def is_of(self, weights: Sequence[Tensor], recipe: Recipe) -> bool:
        """Whether it is what these weights would give now."""
        return (
            recipe == self.recipe
            and len(weights) == len(self.seen)
            and all(seen.is_still(w) for seen, w in zip(self.seen, weights, strict=True))
        )


class QuantizedWeight:
    """The FP8 form of one weight, or of several stacked, kept until one of them changes.

    A change is noticed by the tensors' version counters, which in-place operations of torch move,
    the loading of a checkpoint included, and by another tensor or other memory in a weight's place.
    Fused optimizers move no counter. So the first object of this class registers one hook on all
    `torch.optim.Optimizer`s of the process: from then on a step is noted on each parameter that has
    a gradient when the step ends. Autograd's counters are left alone, as graphs that still wait for
    their backward may have saved parameters that the step did not change.

    Other changes past autograd go unnoticed; after them call `forget`, or the function `forget` for
    all weights of a module:

    - collectives into a weight: `torch.distributed.broadcast`, `all_reduce`, `all_gather`, `recv`,
      and so the synchronisation of parameters at the start of DistributedDataParallel;
    - optimizers that step a flat buffer of which the weights are views, or that free gradients
      within the step;
    - in-place operations on `.data`, and kernels of one's own.

    Weights made in `torch.inference_mode`, which nobody counts, are quantised each time.

    Attributes:
        times_quantized: how often the weights were quantised.
    """

    def __init__(self) -> None:
        _count_optimizer_steps()
        self.times_quantized = 0
        self._kept: _Kept | None = None

    def get(self, weights: Sequence[Tensor], recipe: Recipe) -> tuple[Quantized, Quantized]:
        """The stack [..., N, K] for products with inputs, and its transpose for gradients.

        Args:
            weights: [..., N_i, K], stacked along N.
            recipe: how.
        """
        kept = self._kept
        if kept is None or not kept.is_of(weights, recipe):
            seen = [_Seen(w) for w in weights]
            with torch.no_grad():
                stack = weights[0] if len(weights) == 1 else torch.cat(tuple(weights), dim=-2)
                q = recipe.weight(stack.detach())
            # FP8 units read both operands along the contraction, so a GPU needs a second copy; the
            # reference is content with a view.
            turned = Quantized(q.values.mT.contiguous(), q.mT.scales) if stack.is_cuda else q.mT
            self._kept = kept = _Kept((q, turned), recipe, seen)
            self.times_quantized += 1
        return kept.both

    def forget(self) -> None:
        """Quantise anew at the next use."""
        self._kept = None

    def __reduce__(self) -> tuple[type[QuantizedWeight], tuple[()]]:
        # Copies and files of a module have its weights; the rest follows from them.
        return QuantizedWeight, ()

    def nbytes(self) -> int:
        """Bytes kept now."""
        kept = self._kept
        if kept is None:
            return 0
        q, turned = kept.both
        return q.nbytes() + (turned.nbytes() if turned.values.is_cuda else 0)


def quantized_weights(module: nn.Module) -> list[QuantizedWeight]:
    """The FP8 forms that `module` and the modules in it hold, each once.

    Found are those that are attributes, themselves or in a `linear.Call`. One that is empty belongs
    to a layer that is multiplied side by side with another.
    """
    found: dict[int, QuantizedWeight] = {}
    for part in module.modules():
        for value in vars(part).values():
            # Of a Call, whose module imports this one.
            held = getattr(value, "quantized", value)
            if isinstance(held, QuantizedWeight):
                found[id(held)] = held
    return list(found.values())


def forget(module: nn.Module) -> None:
    """Quantise all weights of `module` and of the modules in it anew at their next use.

    For changes that go unnoticed, such as a broadcast of the weights: see `QuantizedWeight`.
    """
    for quantized in quantized_weights(module):
        quantized.forget()


@cache
def _count_optimizer_steps() -> None:
    """From now on, note each optimizer's step on the parameters that it changes."""
    register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    del args, kwargs
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                setattr(parameter, _STEPS, getattr(parameter, _STEPS, 0) + 1)
