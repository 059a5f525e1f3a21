"""SwiGLU and its gradient in plain PyTorch: what the kernels compute, bit for bit.

silu(g) = g * sigmoid(g) is defined here by correctly rounded float32 additions, multiplications and
one division alone, each rounded by itself, since exp differs by a unit in the last place or two
from one library to the next, and from a CPU to a GPU. So every device gives the same bits from the
same h. The backward pass has h as it was kept, rounded to E4M3: all that it makes from that, a and
the gradients, differs from what the unrounded h of the forward pass gives, alike on every device.

The weight of a row is the router's: taken in here, the product that follows need not know it.

    h = (gate, up)        both halves of what the product before has given
    a = round(silu(gate) * up * weight), rounded once to bfloat16 (see `nominal`), then quantised

Shapes: N rows, I inner; h is [N, 2 I], the gate in its first I columns, the up-projection in the
others. P rows padded group by group (see `quantize.quantize_columns`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import quantize_reference as quantize
from .formats import E4M3, TILE, Quantized

LOG2_E = 1.4426950408889634
# 2**f for f in [-1/2, 1/2] is 1 + f * (c0 + f * (c1 + ...)) with the least largest relative error,
# 2**-23.4 in exact arithmetic and 2**-22.3 in float32. At 0 it is exact: sigmoid(0) is 1/2.
EXP2 = (
    0.6931470036506653,
    0.24022242426872253,
    0.05550733581185341,
    0.009671512991189957,
    0.001326472731307149,
)
# Added to a number of magnitude under 2**22, it leaves the nearest integer in the lowest bits.
TO_INTEGER = 1.5 * 2.0**23
# Beyond 2**126, 1 + 2**t no longer has a normal reciprocal; beyond 2**-126 it is 1.
MOST_EXPONENT = 126.0


def sigmoid(g: Tensor) -> Tensor:
    """1 / (1 + exp(-g)) of float32, at least 2**-126.

    Its relative error is under (2 + |g|) * 2**-23, where the exact one is over 2**-126.
    """
    t = (g * -LOG2_E).clamp_(-MOST_EXPONENT, MOST_EXPONENT)
    shifted = t + TO_INTEGER
    f = t.sub_(shifted - TO_INTEGER)
    power = torch.full_like(f, EXP2[-1])
    for c in (*EXP2[-2::-1], 1.0):
        power.mul_(f).add_(c)
    # The integer goes to the exponent's place; what lies above it in the word falls off at the top.
    exponent = shifted.view(torch.int32).bitwise_left_shift_(23)
    power = power.view(torch.int32).add_(exponent).view(torch.float32)
    return power.add_(1.0).reciprocal_()


def swiglu(
    h: Tensor | Quantized, weights_N: Tensor | None = None, *, nominal: torch.dtype = torch.bfloat16
) -> Tensor:
    """silu(gate) * up * weight, in float32 and rounded once.

    Args:
        h: [N, 2 I] bfloat16 or float32, or quantised in tiles of 1x128.
        weights_N: [N] float32, a factor for each row, or None for 1.
        nominal: the result's dtype if h is quantised, else it is h's.

    Returns:
        [N, I].
    """
    gate, up = _halves(h)
    a = gate.mul_(sigmoid(gate)).mul_(up)
    if weights_N is not None:
        a.mul_(weights_N[:, None])
    return a.to(_dtype(h, nominal))


def swiglu_quantized(
    h: Tensor | Quantized,
    weights_N: Tensor | None = None,
    *,
    dtype: torch.dtype = E4M3,
    power_of_two: bool = True,
    nominal: torch.dtype = torch.bfloat16,
) -> Quantized:
    """`quantize_tiles` of `swiglu`: values [N, I], scales [N, ceil(I / 128)]."""
    a = swiglu(h, weights_N, nominal=nominal)
    return quantize.quantize_tiles(a, dtype=dtype, power_of_two=power_of_two)


def swiglu_columns(
    h: Tensor | Quantized,
    weights_N: Tensor | None = None,
    counts: Sequence[int] | None = None,
    *,
    dtype: torch.dtype = E4M3,
    power_of_two: bool = True,
    nominal: torch.dtype = torch.bfloat16,
) -> Quantized:
    """`quantize_columns` of `swiglu`: values [I, P], scales [I, P / 128]."""
    a = swiglu(h, weights_N, nominal=nominal)
    return quantize.quantize_columns(a, counts, dtype=dtype, power_of_two=power_of_two)


def swiglu_backward(
    grad_NI: Tensor, h: Tensor | Quantized, weights_N: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of `swiglu`.

    Args:
        grad_NI: [N, I] bfloat16 or float32, of its result.
        h, weights_N: as of `swiglu`.

    Returns:
        of h: [N, 2 I], computed in float32 and rounded once to grad's dtype.
        of weights_N: [N] float32, or None where there are none. Its bits are stated too: a tile
            of 128 columns (a last one is filled up with zeros) is summed by pairs, that is 64 sums
            of neighbours, then 32 of neighbours among those, and so on; tiles are added in
            ascending order.
    """
    gate, up = _halves(h)
    grad = grad_NI.float()
    s = sigmoid(gate)
    silu = gate * s
    grad_weights_N = None
    if weights_N is not None:
        grad_weights_N = _sum_by_pairs(silu.mul(up).mul_(grad))
        grad = grad * weights_N[:, None]
    # silu' = s * (1 + g * (1 - s))
    slope = torch.sub(1.0, s).mul_(gate).add_(1.0).mul_(s)
    grad_gate = slope.mul_(up).mul_(grad)
    grad_up = silu.mul_(grad)
    return torch.cat([grad_gate, grad_up], dim=1).to(grad_NI.dtype), grad_weights_N


def swiglu_backward_quantized(
    grad_NI: Tensor,
    h: Tensor | Quantized,
    weights_N: Tensor | None = None,
    counts: Sequence[int] | None = None,
    *,
    dtype: torch.dtype = E4M3,
    power_of_two: bool = True,
) -> tuple[Quantized, Quantized, Tensor | None]:
    """`quantize_both` of the gradient of h that `swiglu_backward` gives; on a GPU in one pass.

    Returns:
        tiles: values [N, 2 I], scales [N, ceil(2 I / 128)].
        columns: values [2 I, P], scales [2 I, P / 128].
        the gradient of weights_N, or None.
    """
    grad_h, grad_weights_N = swiglu_backward(grad_NI, h, weights_N)
    tiles = quantize.quantize_tiles(grad_h, dtype=dtype, power_of_two=power_of_two)
    columns = quantize.quantize_columns(grad_h, counts, dtype=dtype, power_of_two=power_of_two)
    return tiles, columns, grad_weights_N


def _halves(h: Tensor | Quantized) -> tuple[Tensor, Tensor]:
    """Gate and up in float32; both are new tensors."""
    if isinstance(h, Quantized):
        gate, up = quantize.dequantize(h, torch.float32).chunk(2, dim=1)
        return gate.contiguous(), up
    gate, up = h.chunk(2, dim=1)
    return gate.to(torch.float32, copy=True), up.float()


def _dtype(h: Tensor | Quantized, nominal: torch.dtype) -> torch.dtype:
    return nominal if isinstance(h, Quantized) else h.dtype


def _sum_by_pairs(terms_NI: Tensor) -> Tensor:
    terms = F.pad(terms_NI, (0, -terms_NI.shape[1] % TILE)).unflatten(1, (-1, TILE))
    while terms.shape[-1] > 1:
        terms = terms[..., 0::2] + terms[..., 1::2]
    total = terms.new_zeros(len(terms))
    for tile in terms.squeeze(-1).unbind(1):
        total += tile
    return total
