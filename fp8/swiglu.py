"""A SwiGLU feed-forward in FP8, dense or of experts, as one function that keeps FP8 alone.

    h = x [gate, up]^T                  kept in tiles of 1x128 of E4M3, and so is x
    a = silu(gate) * up * factor        made again in the backward
    y = a down^T

(arXiv 2412.19437, sections 3.2.3 and 3.3.3.) The factor of a row is the router's weight. It is
applied before the last product, so that a gradient that arrives from other ranks in FP8 goes into
the backward's products as it is. h enters no product, so that it is kept in tiles of 1x128 whatever
shares a scale in the recipe's operands.

Shapes: M rows, D in and out, I inner; h is [M, 2 I].
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import swiglu_reference as reference
from .carried import carried
from .formats import Quantized
from .kernels import kernels_for
from .linear import Call, as_matrix, check_operands, check_weights, input_columns
from .quantize import quantize_tiles
from .recipe import Recipe


def swiglu_mlp(
    x: Tensor,
    gate_up: Sequence[Tensor],
    down: Tensor,
    up_call: Call,
    down_call: Call,
    factors_M: Tensor | None = None,
) -> Tensor:
    """down(silu(gate(x)) * up(x) * factor). Differentiable once.

    Args:
        x: [..., D] bfloat16 or float32; grouped [M, D]. What it carries is used (see `carried`).
        gate_up: [2 I, D], or [I, D] of gate and of up; grouped, one of [E, 2 I, D].
        down: [D, I]; grouped [E, D, I].
        up_call, down_call: the rest of either product, of one recipe; grouped by the same counts.
        factors_M: [M] float32, a factor for each row, or None.

    Returns:
        [..., D], dtype of x.

    Raises:
        ValueError: a shape or dtype that does not fit; NonFiniteError where the recipe looks for
            that.
    """
    check_operands(x, gate_up, up_call)
    _check_weights(gate_up, down, up_call, down_call)
    x_MD = as_matrix(x)
    if factors_M is not None:
        if tuple(factors_M.shape) != (len(x_MD),) or factors_M.dtype != torch.float32:
            raise ValueError(
                f"{down_call.name}: factors must be float32, one for each of {len(x_MD)} rows, got "
                f"{list(factors_M.shape)} of {factors_M.dtype}"
            )
        factors_M = factors_M.contiguous()
    has_backward = torch.is_grad_enabled()
    y_MD: Tensor = _SwigluMLP.apply(  # pyright: ignore[reportAssignmentType]
        up_call, down_call, has_backward, x_MD, factors_M, down, *gate_up
    )
    return y_MD if x.dim() == 2 else y_MD.unflatten(0, x.shape[:-1])


def _check_weights(gate_up: Sequence[Tensor], down: Tensor, up_call: Call, down_call: Call) -> None:
    check_weights([down], down_call)
    inner = down.shape[-1]
    rows = [w.shape[-2] for w in gate_up]
    if rows not in ([2 * inner], [inner, inner]):
        raise ValueError(
            f"{down_call.name}: gate and up must have {inner} rows each, as the weight after them, "
            f"{list(down.shape)}, has columns; got {' and '.join(map(str, rows))}"
        )
    if up_call.counts != down_call.counts or up_call.recipe != down_call.recipe:
        raise ValueError(
            f"{down_call.name}: counts and recipe must be those of {up_call.name}, got "
            f"{down_call.counts}, {down_call.recipe} beside {up_call.counts}, {up_call.recipe}"
        )
    if down_call.counts is not None and len(down) != len(down_call.counts):
        raise ValueError(
            f"{down_call.name}: weights for {len(down)} experts, but counts for "
            f"{len(down_call.counts)}"
        )


class _SwigluMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        up_call: Call,
        down_call: Call,
        has_backward: bool,
        x_MD: Tensor,
        factors_M: Tensor | None,
        down: Tensor,
        *gate_up: Tensor,
    ) -> Tensor:
        recipe, dtype = up_call.recipe, x_MD.dtype
        power = recipe.power_of_two
        tiles = recipe.activation(x_MD, up_call.name)
        up_q, ctx.up_turned = up_call.quantized_weights(gate_up)
        down_q, ctx.down_turned = down_call.quantized_weights([down])
        h_M2I = up_call.times(tiles, up_q, dtype)
        if recipe.activations == "tile":
            a = _home(h_M2I).swiglu_quantized(h_M2I, factors_M, power_of_two=power)
            recipe.checked(a, down_call.name, "input")
        else:
            a = recipe.activation(_home(h_M2I).swiglu(h_M2I, factors_M), down_call.name)
        ctx.calls, ctx.dtype = (up_call, down_call), dtype
        ctx.gate_up, ctx.down = gate_up, down
        ctx.remake = carried(x_MD).remake
        if has_backward and any(ctx.needs_input_grad):
            h = quantize_tiles(h_M2I, power_of_two=power)
            keeps_x = ctx.remake is None and any(ctx.needs_input_grad[6:])
            ctx.save_for_backward(factors_M, *h, *(tiles if keeps_x else ()))
        return down_call.times(a, down_q, dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_MD: Tensor
    ) -> tuple[Tensor | None, ...]:
        up_call, down_call = ctx.calls
        recipe: Recipe = up_call.recipe
        factors_M, values, scales, *kept = ctx.saved_tensors
        if factors_M is not None:
            factors_M = factors_M.detach()  # else what waits for W would hold the graph before it
        h, dtype, counts = Quantized(values, scales), ctx.dtype, up_call.counts
        _, _, _, needs_x, needs_factors, needs_down, *needs_up = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)

        tiles, across = recipe.gradient(grad_MD, counts, down_call.name, columns=needs_down)
        if across is not None:
            grads[5:6] = down_call.weight_grads(
                [ctx.down], across, lambda: _columns(down_call, h, factors_M, dtype)
            )
        if needs_x or needs_factors or any(needs_up):
            grad_a_MI = down_call.times(tiles, ctx.down_turned, dtype)
            tiles, across, grads[4] = _through_swiglu(
                grad_a_MI, h, factors_M, up_call, columns=any(needs_up)
            )
            if needs_x:
                grads[3] = up_call.times(tiles, ctx.up_turned, dtype)
            if across is not None:
                columns = input_columns(up_call, tuple(kept), ctx.remake)
                grads[6:] = up_call.weight_grads(ctx.gate_up, across, columns)
        return tuple(grads)


def _through_swiglu(
    grad_a_MI: Tensor, h: Quantized, factors_M: Tensor | None, call: Call, *, columns: bool
) -> tuple[Quantized, Quantized | None, Tensor | None]:
    """The gradient of h in tiles of 1x128 and of 128x1, and that of the factors."""
    recipe, home = call.recipe, _home(grad_a_MI)
    if columns and recipe.gradients == "tile":
        tiles, across, grad_factors_M = home.swiglu_backward_quantized(
            grad_a_MI,
            h,
            factors_M,
            call.counts,
            dtype=recipe.gradient_dtype,
            power_of_two=recipe.power_of_two,
        )
        recipe.checked(tiles, call.name, "gradient of the output")
        return tiles, across, grad_factors_M
    grad_h_M2I, grad_factors_M = home.swiglu_backward(grad_a_MI, h, factors_M)
    return *recipe.gradient(grad_h_M2I, call.counts, call.name, columns=columns), grad_factors_M


def _columns(call: Call, h: Quantized, factors_M: Tensor | None, dtype: torch.dtype) -> Quantized:
    """What the last product's input was, made again from what was kept of h, in tiles of 128x1."""
    home, recipe = _home(h.values), call.recipe
    if recipe.activations == "tile":
        power = recipe.power_of_two
        return home.swiglu_columns(h, factors_M, call.counts, power_of_two=power, nominal=dtype)
    a = recipe.activation(home.swiglu(h, factors_M, nominal=dtype), call.name)
    return recipe.activation_columns(a, call.counts)


def _home(x: Tensor) -> ModuleType:
    return kernels_for(x, "swiglu") or reference
