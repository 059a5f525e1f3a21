"""The optimizer: AdamW by parameter name, float32 masters of bfloat16 parameters, global clipping.

DeepSeek-V3 gives AdamW's betas and a weight decay of 0.1 (arXiv 2412.19437, section 4.2) and does
not say what is exempt from decay. Here matrices decay (embeddings and stacked experts included),
and parameters of one dimension, which are norms and biases, do not: a decay would pull a norm's
gain to 0, not to its neutral 1. It keeps both moments in bfloat16 (section 3.3.3); that is a
choice here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..comm.collectives import sum_over
from ..comm.waiting import WaitBoard
from ..fp8.adamw import AdamW

_log = logging.getLogger(__name__)


def decays(parameter: Tensor) -> bool:
    """Whether weight decay applies: to parameters of two dimensions or more."""
    return parameter.dim() >= 2


class Optimizer:
    """AdamW over named parameters; bfloat16 ones are updated through float32 master copies.

    A parameter of float32 or float64 is updated in place. For one of lower precision the master is
    what AdamW updates, with the gradient raised to float32, and the parameter is its rounding: an
    update far smaller than the parameter is not lost.

    Args:
        named_parameters: what is trained.
        betas, eps, weight_decay: of AdamW.
        moments: dtype of AdamW's two moments: float32, which stands for that of what is updated
            and is torch's AdamW, or bfloat16 (see `fp8.adamw`).

    Raises:
        ValueError: moments of another dtype, or betas that bfloat16 moments cannot follow.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        moments: torch.dtype = torch.float32,
    ) -> None:
        self._parameters = dict(named_parameters)
        self._updated = {name: _master(p) for name, p in self._parameters.items()}
        groups = [
            {"params": [p for p in self._updated.values() if decays(p) == decay], **rest}
            for decay, rest in (
                (True, {"weight_decay": weight_decay}),
                (False, {"weight_decay": 0.0}),
            )
        ]
        groups = [group for group in groups if group["params"]]
        if moments not in (torch.float32, torch.bfloat16):
            raise ValueError(f"moments must be torch.float32 or torch.bfloat16, got {moments}")
        self._moments = moments
        make = torch.optim.AdamW if moments == torch.float32 else AdamW
        self._adam = make(groups, lr=0.0, betas=betas, eps=eps)

    @property
    def masters(self) -> dict[str, Tensor]:
        """What AdamW updates in the stead of parameters of lower precision, by name."""
        return {
            name: updated.detach()
            for name, updated in self._updated.items()
            if updated is not self._parameters[name]
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with the gradients in `.grad`; a parameter without one stays as it is."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        for parameter, updated in self._pairs():
            updated.grad = None if parameter.grad is None else parameter.grad.to(updated.dtype)
        self._adam.step()
        for parameter, updated in self._pairs():
            parameter.copy_(updated)
            updated.grad = None

    def zero_grad(self) -> None:
        """Drop every gradient."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's moments and step, and the master where there is one, by parameter name.

        The tensors are the optimizer's own, not copies. A parameter that has had no update has no
        moments.
        """
        state: dict[str, dict[str, Tensor]] = {
            name: dict(self._adam.state.get(updated, {})) for name, updated in self._updated.items()
        }
        for name, master in self.masters.items():
            state[name]["master"] = master
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over (by copy) what `state_dict` gave for parameters of the same names.

        Moments come to have this optimizer's dtype, whatever they had: float32 ones are rounded to
        bfloat16, as their next update would do; bfloat16 ones are raised, which is exact.

        Raises:
            ValueError: the names differ, or a master is missing or in excess.
        """
        if state.keys() != self._updated.keys():
            other = sorted(state.keys() ^ self._updated.keys())
            raise ValueError(
                f"the optimizer state is of other parameters: {len(other)} names differ, such as "
                f"{other[0]}"
            )
        for name, updated in self._updated.items():
            entry = dict(state[name])
            master = entry.pop("master", None)
            if (master is None) != (updated is self._parameters[name]):
                has = "no master weight" if master is None else "a master weight"
                raise ValueError(
                    f"the optimizer state of {name} has {has}: it is of a run with another "
                    "train.dtype"
                )
            if master is not None:
                updated.copy_(master)
                self._parameters[name].copy_(updated)
            if entry:
                # The step counter stays on the CPU, as AdamW made it; moments lie with the weights.
                step = entry.pop("step").clone()
                low = self._moments == torch.bfloat16
                dtype = torch.bfloat16 if low else updated.dtype
                moments = {k: v.to(updated.device, dtype, copy=True) for k, v in entry.items()}
                self._adam.state[updated] = {"step": step, **moments}
            else:
                self._adam.state.pop(updated, None)

    def _pairs(self) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
        for name, parameter in self._parameters.items():
            if self._updated[name] is not parameter:
                yield parameter, self._updated[name]


def clip_by_global_norm(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    owned: Container[str],
    max_norm: float,
    *,
    asked: int = 0,
    board: WaitBoard | None = None,
) -> tuple[float, int]:
    """Scale the gradients of the whole model to a norm of at most `max_norm`; a collective.

    Args:
        named_parameters: this rank's parameters; those without a gradient are left out.
        owned: names whose gradients this rank adds to the norm. Over all ranks every parameter of
            the model must be owned exactly once: of replicas (dp, stages held twice, tied weights,
            experts over dp / ep) by one rank, of sharded experts by each shard's.
        max_norm: the limit; 0 measures only.
        asked: a number that is summed over the world in the same message.
        board: where the wait is announced.

    Returns:
        The norm before scaling and the sum of `asked`, of every rank the same: summed in float64
        over the world, or over this process where torch.distributed is not initialised. Where the
        norm is not finite, nothing is scaled, and the ranks that own a parameter whose gradient is
        at fault log its name.

    Raises:
        CommError: another rank is gone or did not answer in time.
    """
    named = list(named_parameters)
    device = next((p.device for _, p in named), torch.device("cpu"))
    parameters = [(name, p) for name, p in named if p.grad is not None]
    squares = {
        name: torch.linalg.vector_norm(p.grad, dtype=torch.float64).square()
        for name, p in parameters
        if name in owned
    }
    totals = torch.tensor([0.0, asked], dtype=torch.float64, device=device)
    for square in squares.values():
        totals[0] += square
    world = dist.group.WORLD if dist.is_initialized() else None
    sum_over(totals, world, "the gradient norm", board=board)
    total, all_asked = totals.tolist()
    norm = math.sqrt(total)
    if not math.isfinite(norm):
        bad = [name for name, square in squares.items() if not torch.isfinite(square)]
        if bad:
            _log.warning("gradient not finite in %d parameters, such as %s", len(bad), bad[0])
    elif 0 < max_norm < norm:
        with torch.no_grad():
            for _, parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.mul_(max_norm / norm)
    return norm, round(all_asked)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return nn.Parameter(parameter.detach().to(torch.float32), requires_grad=True)
