"""Sums gradients over groups of ranks that hold the same parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch.nn import Parameter

from ..comm.collectives import sum_over
from ..comm.waiting import WaitBoard
from .accumulate import grad_dtype

# Larger gradients are summed where they are; smaller ones share a message, which costs two copies.
_ALONE_BYTES = 1 << 20


class WholeGradients:
    """Averages whole gradients at the end of a step: what `zero.Shards` is to shares, without any.

    Args:
        parameters: of this rank, in an order that all ranks of a group share.
        group_of: the ranks that hold the same parameter and see other data; None for this alone.
        scale: factor of the gradients, applied after the sum.
        board: where waits are announced.
    """

    instead = None  # gradients are those of the parameters themselves

    def __init__(
        self,
        parameters: Iterable[Parameter],
        group_of: Callable[[Parameter], dist.ProcessGroup | None],
        *,
        scale: float = 1.0,
        board: WaitBoard | None = None,
    ) -> None:
        self._by_group: dict[int, tuple[dist.ProcessGroup | None, list[Parameter]]] = {}
        for parameter in parameters:
            group = group_of(parameter)
            self._by_group.setdefault(id(group), (group, []))[1].append(parameter)
        self._scale, self._board = scale, board

    def drop_gradients(self) -> None:
        """Begin anew: gradients become None."""
        for _, parameters in self._by_group.values():
            for parameter in parameters:
                parameter.grad = None

    def end_stage(self, stage: int) -> None:
        """A stage's gradients are complete, which changes nothing here."""

    def finish_gradients(self) -> None:
        """Every `.grad` becomes the mean gradient, None where no rank has one.

        Raises:
            CommError: a rank of a group is gone or did not answer in time.
        """
        for group, parameters in self._by_group.values():
            sum_gradients(parameters, group, scale=self._scale, board=self._board)

    def finish_gather(self, stage: int | None = None) -> None:
        """Parameters are whole at all times."""


def sum_gradients(
    parameters: Sequence[Parameter],
    group: dist.ProcessGroup | None,
    *,
    scale: float = 1.0,
    alone_bytes: int = _ALONE_BYTES,
    board: WaitBoard | None = None,
) -> None:
    """Replace every `.grad` by its sum over `group`, times `scale`; the same bits on all its ranks.

    Args:
        parameters: the same parameters in the same order on all ranks of the group.
        group: None stands for this rank alone.
        scale: factor, applied after the sum.
        alone_bytes: gradients from this size on are summed in place, smaller ones together.
        board: where waits are announced.

    A gradient that is None on every rank stays None; where only some have one, the others count as
    zero.

    Raises:
        CommError: a rank of the group is gone or did not answer in time.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((grad_dtype(parameter), parameter.device), []).append(parameter)
    for alike in kinds.values():
        if group is not None:
            _sum_alike(alike, group, alone_bytes, board)
        if scale != 1.0:
            for parameter in alike:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)


def _sum_alike(
    parameters: Sequence[Parameter],
    group: dist.ProcessGroup,
    alone_bytes: int,
    board: WaitBoard | None,
) -> None:
    """Sum gradients of one dtype and device."""
    have = [parameter.grad is not None for parameter in parameters]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, dtype=grad_dtype(parameter))
        elif not parameter.grad.is_contiguous():
            parameter.grad = parameter.grad.contiguous()
    grads = [p.grad for p in parameters if p.grad is not None]
    alone = [g for g in grads if g.numel() * g.element_size() >= alone_bytes]
    together = [g for g in grads if g.numel() * g.element_size() < alone_bytes]
    flags = torch.tensor([float(h) for h in have], dtype=grads[0].dtype, device=grads[0].device)
    flat = torch.cat([*(g.reshape(-1) for g in together), flags])
    sum_over([*alone, flat], group, "a sum of gradients", board=board)
    *sums, flags = flat.split([*(g.numel() for g in together), len(flags)])
    for grad, total in zip(together, sums, strict=True):
        grad.copy_(total.view_as(grad))
    # Reading the sums back would stop a GPU; where all gradients are there, nothing needs deciding.
    if not all(have):
        for parameter, num_with_grad in zip(parameters, flags.tolist(), strict=True):
            if not num_with_grad:
                parameter.grad = None
