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
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..comm.collectives import sum_over
from ..comm.waiting import WaitBoard
from ..fp8.adamw import AdamW
from ..parallel.zero import Shards, Share
from .checkpoint.pieces import Held, Piece, Stretch

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
        shards: of these parameters, which this rank updates its shares of, and gathers after each
            update; None where it updates all of them (see `parallel.zero`).
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
        shards: Shards | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        moments: torch.dtype = torch.float32,
    ) -> None:
        whole = dict(named_parameters)
        self._shards = shards
        alone = {name: Share(parameter, 0) for name, parameter in whole.items()}
        shares = alone if shards is None else shards.shares
        self._parameters = {name: shares[name].parameter for name in whole}
        self._starts = {name: shares[name].start for name in whole}
        self._updated = {name: _master(p) for name, p in self._parameters.items()}
        groups = [
            {"params": [self._updated[n] for n, p in whole.items() if decays(p) == decay], **rest}
            for decay, rest in (
                (True, {"weight_decay": weight_decay}),
                (False, {"weight_decay": 0.0}),
            )
        ]
        groups = [group for group in groups if group["params"]]
        self._moments = moments
        self._adam = make_adam(groups, betas=betas, eps=eps, moments=moments)
        self._steps: dict[str, Tensor] = {}  # what `pieces` gave for the counters

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What has the gradients and the results, by name: parameters, or this rank's shares."""
        return dict(self._parameters)

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
        """One update with the gradients in `.grad`; a parameter without one stays as it is.

        With `shards`, wholes are whole again after their `finish_gather`.
        """
        for group in self._adam.param_groups:
            group["lr"] = lr
        for parameter, updated in self._pairs():
            updated.grad = None if parameter.grad is None else parameter.grad.to(updated.dtype)
        self._adam.step()
        for parameter, updated in self._pairs():
            parameter.copy_(updated)
            updated.grad = None
        if self._shards is not None:
            self._shards.start_gather()

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

    @torch.no_grad()
    def pieces(self, held: Mapping[str, Held]) -> Iterator[Piece]:
        """The optimizer's state as a checkpoint has it, whatever the layout.

        "optimizer/exp_avg/NAME" and "optimizer/exp_avg_sq/NAME", the moments, in their dtype;
        "optimizer/master/NAME", where there is one; "optimizer/step/NAME", float32: how many
        updates there have been, one number for each matrix of a stacked parameter.
        Where there has been no update yet, moments are made, as zeros after no step.

        Args:
            held: how each parameter lies in the whole model's.

        Loading writes into the pieces; call `loaded` then.
        """
        self._steps = {}
        for name, updated in self._updated.items():
            state = dict(adam_state(self._adam, updated))
            self._steps[name] = state_counter(held[name], state.pop("step"))
            if updated is not self._parameters[name]:
                state["master"] = updated.detach()
            yield from state_pieces(name, held[name], self._starts[name], state, self._steps[name])

    def loaded(self) -> None:
        """Take over the counters that were loaded into the last `pieces`.

        Where the matrices of one parameter differ, which a checkpoint of more expert-parallel ranks
        allows, the most advanced counts.
        """
        for name, steps in self._steps.items():
            if steps.numel():
                adam_state(self._adam, self._updated[name])["step"].fill_(steps.max())
        self._steps = {}

    @torch.no_grad()
    def take_wholes(self) -> None:
        """Masters become what the parameters are, which have been changed from outside."""
        for parameter, updated in self._pairs():
            updated.copy_(parameter)

    def _pairs(self) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
        for name, parameter in self._parameters.items():
            if self._updated[name] is not parameter:
                yield parameter, self._updated[name]


def clip_by_global_norm(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    owned: Container[str],
    max_norm: float,
    *,
    also: Sequence[float] = (),
    board: WaitBoard | None = None,
) -> tuple[float, list[float]]:
    """Scale the gradients of the whole model to a norm of at most `max_norm`; a collective.

    Args:
        named_parameters: this rank's parameters; those without a gradient are left out.
        owned: names whose gradients this rank adds to the norm. Over all ranks every parameter of
            the model must be owned exactly once: of replicas (dp, stages held twice, tied weights,
            experts over dp / ep) by one rank, of sharded experts by each shard's.
        max_norm: the limit; 0 measures only.
        also: numbers that are summed over the world in the same message.
        board: where the wait is announced.

    Returns:
        The norm before scaling and the sums of `also`, of every rank the same: summed in float64
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
    totals = torch.tensor([0.0, *also], dtype=torch.float64, device=device)
    for square in squares.values():
        totals[0] += square
    world = dist.group.WORLD if dist.is_initialized() else None
    sum_over(totals, world, "the gradient norm", board=board)
    total, *sums = totals.tolist()
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
    return norm, sums


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return nn.Parameter(parameter.detach().to(torch.float32), requires_grad=True)


def make_adam(
    groups: list[dict[str, Any]],
    *,
    betas: tuple[float, float],
    eps: float,
    moments: torch.dtype,
) -> torch.optim.Optimizer:
    """AdamW with moments of this dtype, see `Optimizer`; the learning rate is still 0.

    What it makes of an element does not depend on where in a tensor that stands.
    """
    if moments == torch.float32:
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps)
    if moments == torch.bfloat16:
        return AdamW(groups, lr=0.0, betas=betas, eps=eps)
    raise ValueError(f"moments must be torch.float32 or torch.bfloat16, got {moments}")


def adam_state(adam: torch.optim.Optimizer, updated: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's state of a parameter, made as AdamW itself makes it if there has been no update."""
    state = adam.state[updated]
    if not state:
        dtype = torch.bfloat16 if isinstance(adam, AdamW) else updated.dtype
        state["step"] = torch.zeros((), dtype=torch.float32)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros_like(
                updated, dtype=dtype, memory_format=torch.contiguous_format
            )
    return state


def state_counter(held: Held, step: Tensor) -> Tensor:
    """A copy of a parameter's counter of updates for `state_pieces`, once for each local matrix."""
    num = sum(stretch.length for stretch in _counters(held).stretches)
    return torch.full((num,), float(step))


def state_pieces(
    name: str, held: Held, start: int, state: Mapping[str, Tensor], counter: Tensor
) -> Iterator[Piece]:
    """A parameter's optimizer state as a checkpoint has it, see `Optimizer.pieces`.

    Args:
        name: of the parameter.
        held: how this rank's lies in the whole one.
        start: of the share that the state is of, in this rank's flattened parameter.
        state: "exp_avg", "exp_avg_sq" and, where there is one, "master", contiguous.
        counter: from `state_counter`.
    """
    for key, tensor in state.items():
        yield from held.pieces(f"optimizer/{key}/{name}", tensor.view(-1), start)
    yield from _counters(held).pieces(f"optimizer/step/{name}", counter)


def _counters(held: Held) -> Held:
    """How a parameter's counters of updates lie: one for each matrix of a stack, or just one.

    A parameter [..., N, K] is a stack of matrices, such as experts, which layouts spread by whole
    matrices; its counters have the shape [...]. Of a matrix or vector there is one, of shape ().
    """
    shape, size = held.shape[:-2], math.prod(held.shape[-2:])
    if not shape:
        return Held((), (Stretch(0, 0, 1),))
    stretches = (Stretch(*(n // size for n in stretch)) for stretch in held.stretches)
    return Held(shape, tuple(stretches))
