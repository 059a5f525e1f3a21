"""SwiGLU and its gradient on a GPU, fused with quantisation: `swiglu_reference` bit for bit.

Kernels that compute sigmoid are launched with enable_fp_fusion=False: its definition rounds after
each multiplication, which a fused multiply-add would not.

Shapes: N rows, I inner; h [N, 2 I] has the gate in its first half; P rows of padded groups.
"""

# Triton's language is not Python to a type checker: its blocks, constants and launches are its own.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportArgumentType=false
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import E4M3, TILE, Quantized, tiles_in
from . import quantize
from .numbers import Rule, interpreted, on_its_device, rule
from .quantize import columns_for, tiles_for
from .swiglu_device import (
    backward_both_kernel,
    backward_kernel,
    columns_kernel,
    forward_kernel,
    sum_kernel,
)

_NAMES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}
_ROWS_A_PROGRAM = 16
_COLUMNS_A_PROGRAM = 64


@on_its_device
def swiglu(
    h: Tensor | Quantized, weights_N: Tensor | None = None, *, nominal: torch.dtype = torch.bfloat16
) -> Tensor:
    values, _ = source = _source(h)
    rows, inner = len(values), values.shape[1] // 2
    a = torch.empty(rows, inner, dtype=_nominal(h, nominal), device=values.device)
    _forward(source, weights_N, a, None, _NAMES[a.dtype], rule(E4M3, True))
    return a


@on_its_device
def swiglu_quantized(
    h: Tensor | Quantized,
    weights_N: Tensor | None = None,
    *,
    dtype: torch.dtype = E4M3,
    power_of_two: bool = True,
    nominal: torch.dtype = torch.bfloat16,
) -> Quantized:
    values, _ = source = _source(h)
    tiles = tiles_for(values.device, len(values), values.shape[1] // 2, dtype)
    rounding = _NAMES[_nominal(h, nominal)]
    _forward(source, weights_N, None, tiles, rounding, rule(dtype, power_of_two))
    return tiles


@on_its_device
def swiglu_columns(
    h: Tensor | Quantized,
    weights_N: Tensor | None = None,
    counts: Sequence[int] | None = None,
    *,
    dtype: torch.dtype = E4M3,
    power_of_two: bool = True,
    nominal: torch.dtype = torch.bfloat16,
) -> Quantized:
    values, scales = _source(h)
    rows, inner = len(values), values.shape[1] // 2
    columns, table = columns_for(values.device, rows, inner, counts, dtype)
    if columns.values.numel():
        columns_kernel[columns.scales.shape[1], triton.cdiv(inner, _COLUMNS_A_PROGRAM)](
            _bytes(values),
            scales,
            weights_N,
            columns.values.view(torch.uint8),
            columns.scales,
            table,
            rows,
            inner,
            columns.values.shape[1],
            values.stride(0),
            ALIGNED=inner % TILE == 0,
            COLUMNS=_COLUMNS_A_PROGRAM,
            H=_NAMES[values.dtype],
            NOMINAL=_NAMES[_nominal(h, nominal)],
            RULE=rule(dtype, power_of_two),
            num_warps=8,
            enable_fp_fusion=False,
        )
    return columns


@on_its_device
def swiglu_backward(
    grad_NI: Tensor, h: Tensor | Quantized, weights_N: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    values, scales = _source(h)
    rows, inner = grad_NI.shape
    grad_NI = grad_NI if grad_NI.stride(1) == 1 else grad_NI.contiguous()
    grad_h = torch.empty(rows, 2 * inner, dtype=grad_NI.dtype, device=values.device)
    sums = _room_for_sums(grad_NI, weights_N)
    if grad_h.numel():
        backward_kernel[triton.cdiv(rows, _ROWS_A_PROGRAM), tiles_in(inner)](
            grad_NI,
            _bytes(values),
            scales,
            weights_N,
            grad_h,
            sums,
            rows,
            inner,
            grad_NI.stride(0),
            values.stride(0),
            ALIGNED=inner % TILE == 0,
            ROWS=_ROWS_A_PROGRAM,
            H=_NAMES[values.dtype],
            NOMINAL=_NAMES[grad_NI.dtype],
            INTERPRETED=interpreted(),
            num_warps=4,
            enable_fp_fusion=False,
        )
    return grad_h, _sum_tiles(sums)


@on_its_device
def swiglu_backward_quantized(
    grad_NI: Tensor,
    h: Tensor | Quantized,
    weights_N: Tensor | None = None,
    counts: Sequence[int] | None = None,
    *,
    dtype: torch.dtype = E4M3,
    power_of_two: bool = True,
) -> tuple[Quantized, Quantized, Tensor | None]:
    """One pass where I is a multiple of 128. Elsewhere tiles of the result reach from gate into up,
    and the gradient is written and read again."""
    rows, inner = grad_NI.shape
    if inner % TILE:
        grad_h, grad_weights_N = swiglu_backward(grad_NI, h, weights_N)
        both = quantize.quantize_both(grad_h, counts, dtype=dtype, power_of_two=power_of_two)
        return *both, grad_weights_N
    values, scales = _source(h)
    grad_NI = grad_NI if grad_NI.stride(1) == 1 else grad_NI.contiguous()
    tiles = tiles_for(values.device, rows, 2 * inner, dtype)
    columns, table = columns_for(values.device, rows, 2 * inner, counts, dtype)
    sums = _room_for_sums(grad_NI, weights_N)
    if tiles.values.numel():
        backward_both_kernel[columns.scales.shape[1], inner // TILE](
            grad_NI,
            _bytes(values),
            scales,
            weights_N,
            tiles.values.view(torch.uint8),
            tiles.scales,
            columns.values.view(torch.uint8),
            columns.scales,
            sums,
            table,
            rows,
            inner,
            columns.values.shape[1],
            grad_NI.stride(0),
            values.stride(0),
            H=_NAMES[values.dtype],
            NOMINAL=_NAMES[grad_NI.dtype],
            RULE=rule(dtype, power_of_two),
            num_warps=16,
            enable_fp_fusion=False,
        )
    return tiles, columns, _sum_tiles(sums)


def _forward(
    source: tuple[Tensor, Tensor | None],
    weights_N: Tensor | None,
    a: Tensor | None,
    tiles: Quantized | None,
    rounding: tl.dtype,
    how: Rule,
) -> None:
    """Writes the result itself or its tiles."""
    values, scales = source
    rows, inner = len(values), values.shape[1] // 2
    if not rows or not inner:
        return
    forward_kernel[triton.cdiv(rows, _ROWS_A_PROGRAM), tiles_in(inner)](
        _bytes(values),
        scales,
        weights_N,
        a,
        None if tiles is None else tiles.values.view(torch.uint8),
        None if tiles is None else tiles.scales,
        rows,
        inner,
        values.stride(0),
        ALIGNED=inner % TILE == 0,
        ROWS=_ROWS_A_PROGRAM,
        H=_NAMES[values.dtype],
        NOMINAL=rounding,
        RULE=how,
        num_warps=4,
        enable_fp_fusion=False,
    )


def _source(h: Tensor | Quantized) -> tuple[Tensor, Tensor | None]:
    """h as kernels read it: values with their rows' elements side by side, and scales if any."""
    values, scales = h if isinstance(h, Quantized) else (h, None)
    values = values if values.stride(1) == 1 else values.contiguous()
    return values, None if scales is None else scales.float().contiguous()


def _bytes(values: Tensor) -> Tensor:
    """FP8 as the bytes that the kernels read."""
    return values.view(torch.uint8) if values.element_size() == 1 else values


def _nominal(h: Tensor | Quantized, nominal: torch.dtype) -> torch.dtype:
    return nominal if isinstance(h, Quantized) else h.dtype


def _room_for_sums(grad_NI: Tensor, weights_N: Tensor | None) -> Tensor | None:
    """[N, tiles]: the sums over each tile of the weights' gradient."""
    if weights_N is None:
        return None
    shape = len(grad_NI), tiles_in(grad_NI.shape[1])
    return torch.empty(shape, dtype=torch.float32, device=grad_NI.device)


def _sum_tiles(sums: Tensor | None) -> Tensor | None:
    if sums is None:
        return None
    total = torch.empty(len(sums), dtype=torch.float32, device=sums.device)
    if len(sums):
        block = 128
        sum_kernel[triton.cdiv(len(sums), block),](
            sums, total, *sums.shape, BLOCK=block, INTERPRETED=interpreted()
        )
    return total
