"""AdamW whose two moments are kept in bfloat16 (arXiv 2412.19437, section 3.3.3).

Arithmetic is in float32: moments are raised, updated, used for the parameter, and then rounded back
to the nearest bfloat16, ties to even. So a moment's rounding shows in the next step and not in its
own. The stated order for step t of a parameter w with gradient g, each operation rounded once:

    m = b1 m + (1 - b1) g
    v = b2 v + ((1 - b2) g) g
    w = w (1 - lr decay)
    w = w - (m (lr / (1 - b1^t))) / (sqrt(v) (1 / sqrt(1 - b2^t)) + eps)

Numbers in it that are not tensors are computed in float64 and rounded once to float32. No fused
multiply-add, no division by a number (which CUDA turns into a product): so CPUs and GPUs agree bit
for bit, as far as their square roots and quotients are correctly rounded, which both promise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

# Elements of a tensor that are updated at a time: bounds the float32 copies to three times this.
_PIECE = 1 << 22

# The largest beta with which a bfloat16 moment whose gradients have stopped decays: (1 - beta) x is
# then at least half the distance from any x to the bfloat16 below it, which is up to 2**-7 x. With
# a larger beta the decay of some moments is rounded away; from 1 - 2**-9 on that of nearly all, so
# that they only ever grow.
MAX_BETA = 1 - 2**-8


def require_betas(betas: Sequence[float]) -> None:
    """Raise unless bfloat16 moments can follow these betas.

    Raises:
        ValueError: one of them is too close to 1, or no beta.
    """
    for beta in betas:
        if not 0 <= beta <= MAX_BETA:
            raise ValueError(
                f"bfloat16 moments need betas from 0 to {MAX_BETA:.6f}, got {beta}: above that a "
                "step changes a moment by less than bfloat16 resolves; take a smaller beta "
                "(DeepSeek-V3: 0.9, 0.95) or float32 moments"
            )


class AdamW(Optimizer):
    """AdamW with bfloat16 moments and float32 arithmetic.

    A group may be given its own lr, betas, eps and weight_decay. State of a parameter: "step"
    (float32 scalar on the CPU), "exp_avg" and "exp_avg_sq" (bfloat16, its shape, beside it).
    `load_state_dict` takes moments of any dtype and strides over by rounding them to bfloat16,
    which of this class's own is exact.

    Args:
        params: parameters or groups; float32 (masters of bfloat16 weights, say) or float64, which
            is computed with in its own precision; contiguous.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second.
        weight_decay: share of lr by which a parameter shrinks a step.

    Raises:
        ValueError: a parameter is of lower precision or not contiguous, or a number out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of torch's optimizers, with the checks of this one."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
        except ValueError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update with the gradients in `.grad`; a parameter without one stays as it is.

        Nothing is read back from a GPU.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of torch's optimizers, which give moments the parameter's dtype; here bfloat16.

        Moments with other strides, as torch keeps them of a transposed parameter, are laid out
        anew: a step updates them through flat views.
        """
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    state[key] = state[key].to(torch.bfloat16).contiguous()

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(
                    parameter, dtype=torch.bfloat16, memory_format=torch.contiguous_format
                )
        state["step"] += 1
        # `view` raises where `reshape` would have the update go into a copy.
        changed = [t.view(-1) for t in (parameter, state["exp_avg"], state["exp_avg_sq"])]
        pieces = (t.split(_PIECE) for t in (grad.reshape(-1), *changed))
        for g, w, m, v in zip(*pieces, strict=True):
            _update_piece(w, g, m, v, int(state["step"]), group)


def _update_piece(
    w: Tensor, grad: Tensor, m16: Tensor, v16: Tensor, step: int, group: dict[str, Any]
) -> None:
    """The module's stated order; all [n], `w`, `m16` and `v16` in place."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    g = grad.to(w.dtype)
    m = m16.to(w.dtype).mul_(beta1).add_(g * (1 - beta1))
    v = v16.to(w.dtype).mul_(beta2).add_((g * (1 - beta2)).mul_(g))
    m16.copy_(m)
    v16.copy_(v)
    below = v.sqrt_().mul_(1 / math.sqrt(1 - beta2**step)).add_(group["eps"])
    w.mul_(1 - lr * group["weight_decay"])
    w.sub_(m.mul_(lr / (1 - beta1**step)).div_(below))


def _check(group: dict[str, Any]) -> None:
    require_betas(group["betas"])
    for key in ("lr", "eps", "weight_decay"):
        if not 0 <= group[key] < math.inf:
            raise ValueError(f"{key} must be 0 or more and finite, got {group[key]}")
    for parameter in group["params"]:
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"a parameter of {parameter.dtype} would lose small updates; give its float32 "
                "master to AdamW and copy that into the parameter after each step, as "
                "counterflow.launch.optim.Optimizer does"
            )
        if not parameter.is_contiguous():
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is not contiguous; make it so with "
                "Parameter(p.detach().contiguous())"
            )
