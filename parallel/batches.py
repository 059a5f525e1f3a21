"""The micro-batches of a step's batch."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, NamedTuple

from torch import Tensor


class Data(NamedTuple):
    """The micro-batches of a step; empty lists where this rank needs none."""

    inputs: list[tuple[Tensor, ...]]
    targets: list[tuple[Tensor, ...]]


def microbatches(
    data: Any, what: str, num: int, stage: int, held: Container[int], where: str
) -> list[tuple[Tensor, ...]]:
    """Slices of a batch, in order; empty where this rank does not hold the stage that takes it.

    Args:
        data: a tensor or a tuple of tensors, [N, ...] with N a multiple of `num`; anything where
            the stage is not held, but checked if it is not None.
        what: it is called, for errors.
        num: of micro-batches.
        stage: that takes it.
        held: stages of this rank.
        where: this rank, for errors.

    Raises:
        ValueError: it is something else, or does not divide.
    """
    if data is None and stage not in held:
        return []
    # Checked where it is not needed too: what is wrong on one rank mostly is wrong on all, and then
    # no rank begins to wait for another.
    tensors: tuple[Any, ...] = data if isinstance(data, tuple) else (data,)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{what}: {where} holds stage {stage} and needs a tensor or a tuple of tensors, "
                f"got {type(tensor).__name__}"
            )
        if tensor.dim() == 0 or tensor.shape[0] % num or tensor.shape[0] == 0:
            raise ValueError(
                f"{what}: shape {list(tensor.shape)} does not divide into {num} micro-batches; its "
                f"first dimension must be a multiple of {num}"
            )
    if stage not in held:
        return []
    return list(zip(*(tensor.chunk(num) for tensor in tensors), strict=True))
