"""What `kernels.swiglu` launches, always with enable_fp_fusion=False.

Kernels take pointers to h (its bytes if it is FP8, then with its scales), to weights or None, and
to what they write; H is Triton's name of h's dtype, NOMINAL that of what results are rounded to.

Shapes: as in `kernels.swiglu`.
"""

# Triton's language is not Python to a type checker: its blocks, constants and launches are its own.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportArgumentType=false
from __future__ import annotations

import triton
import triton.language as tl

from .numbers import TILE_SIZE, loop_bound, narrow, sigmoid, widen
from .quantize import group_tile, store_columns, store_tiles


@triton.jit
def _load_half(
    h_ptr,
    scales_ptr,
    row,
    column,
    inside,
    stride,
    wide,
    ALIGNED: tl.constexpr,
    H: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """h at rows `row`, columns `column`, which lie in one tile if ALIGNED, as float32."""
    place = row.to(tl.int64)[:, None] * stride + column[None, :]
    x = tl.load(h_ptr + place, inside, 0)
    if scales_ptr is None:
        wide_x = widen(x, INTERPRETED)
    else:
        first = row.to(tl.int64) * wide
        if ALIGNED:
            tile = tl.min(column, 0) // TILE_SIZE
            scale = tl.load(scales_ptr + first + tile, tl.max(inside.to(tl.int32), 1) > 0, 0.0)
            scale = tl.broadcast_to(scale[:, None], x.shape)
        else:
            scale = tl.load(scales_ptr + first[:, None] + column[None, :] // TILE_SIZE, inside, 0.0)
        wide_x = widen(x.to(H, bitcast=True), INTERPRETED) * scale
    return wide_x


@triton.jit
def _load_halves(
    h_ptr,
    scales_ptr,
    row,
    column,
    inside,
    stride,
    inner,
    ALIGNED: tl.constexpr,
    H: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    wide = tl.cdiv(2 * inner, TILE_SIZE)
    gate = _load_half(h_ptr, scales_ptr, row, column, inside, stride, wide, ALIGNED, H, INTERPRETED)
    up = _load_half(
        h_ptr, scales_ptr, row, column + inner, inside, stride, wide, ALIGNED, H, INTERPRETED
    )
    return gate, up


@triton.jit
def _weighted(
    gate,
    up,
    weights_ptr,
    row,
    row_inside,
    NOMINAL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The result, rounded to its nominal dtype."""
    a = gate * sigmoid(gate, INTERPRETED) * up
    if weights_ptr is not None:
        a *= tl.load(weights_ptr + row, row_inside, 0.0)[:, None]
    return narrow(a, NOMINAL, INTERPRETED)


@triton.jit
def forward_kernel(
    h_ptr,
    h_scales_ptr,
    weights_ptr,
    a_ptr,
    values_ptr,
    scales_ptr,
    rows,
    inner,
    stride,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    H: tl.constexpr,
    NOMINAL: tl.constexpr,
    RULE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * TILE_SIZE + tl.arange(0, TILE_SIZE)
    inside = (row < rows)[:, None] & (column < inner)[None, :]
    gate, up = _load_halves(
        h_ptr, h_scales_ptr, row, column, inside, stride, inner, ALIGNED, H, RULE.interpreted
    )
    a = _weighted(gate, up, weights_ptr, row, row < rows, NOMINAL, RULE.interpreted)
    if a_ptr is not None:
        tl.store(a_ptr + row.to(tl.int64)[:, None] * inner + column[None, :], a, inside)
    if values_ptr is not None:
        x = widen(a, RULE.interpreted)
        store_tiles(x, values_ptr, scales_ptr, row, column, tl.program_id(1), rows, inner, RULE)


@triton.jit
def columns_kernel(
    h_ptr,
    h_scales_ptr,
    weights_ptr,
    values_ptr,
    scales_ptr,
    table_ptr,
    rows,
    inner,
    padded,
    stride,
    ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr,
    H: tl.constexpr,
    NOMINAL: tl.constexpr,
    RULE: tl.constexpr,
):
    tile = tl.program_id(0)
    start, stop = group_tile(table_ptr, rows, tile, padded // TILE_SIZE)
    row = start + tl.arange(0, TILE_SIZE)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < stop)[:, None] & (column < inner)[None, :]
    gate, up = _load_halves(
        h_ptr, h_scales_ptr, row, column, inside, stride, inner, ALIGNED, H, RULE.interpreted
    )
    a = _weighted(gate, up, weights_ptr, row, row < stop, NOMINAL, RULE.interpreted)
    x = widen(a, RULE.interpreted)
    store_columns(x, values_ptr, scales_ptr, column, tile, inner, padded, RULE)


@triton.jit
def _sum_by_pairs(terms, ROWS: tl.constexpr):
    """Sums of rows of [ROWS, 128]: of neighbours, of neighbours of those, and so on: [ROWS].

    Each step adds two numbers, whose order is of no effect, so that the layout of a block over
    threads is of none either.
    """
    terms = tl.sum(tl.reshape(terms, (ROWS, 64, 2)), 2)
    terms = tl.sum(tl.reshape(terms, (ROWS, 32, 2)), 2)
    terms = tl.sum(tl.reshape(terms, (ROWS, 16, 2)), 2)
    terms = tl.sum(tl.reshape(terms, (ROWS, 8, 2)), 2)
    terms = tl.sum(tl.reshape(terms, (ROWS, 4, 2)), 2)
    terms = tl.sum(tl.reshape(terms, (ROWS, 2, 2)), 2)
    return tl.sum(terms, 1)


@triton.jit
def _gradients(
    grad_ptr,
    gate,
    up,
    weights_ptr,
    sums_ptr,
    row,
    column,
    tile,
    row_inside,
    inside,
    grad_stride,
    inner,
    ROWS: tl.constexpr,
    NOMINAL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Gradients of gate and of up, rounded; the sum for the weights' gradient is stored."""
    long = row.to(tl.int64)
    grad = tl.load(grad_ptr + long[:, None] * grad_stride + column[None, :], inside, 0.0)
    grad = widen(grad, INTERPRETED)
    s = sigmoid(gate, INTERPRETED)
    silu = gate * s
    if weights_ptr is not None:
        # What lies outside is 0 * 0 * 0: nothing is added.
        total = _sum_by_pairs(silu * up * grad, ROWS)
        tl.store(sums_ptr + long * tl.cdiv(inner, TILE_SIZE) + tile, total, row_inside)
        grad = grad * tl.load(weights_ptr + row, row_inside, 0.0)[:, None]
    slope = ((1.0 - s) * gate + 1.0) * s
    grad_gate = narrow(slope * up * grad, NOMINAL, INTERPRETED)
    grad_up = narrow(silu * grad, NOMINAL, INTERPRETED)
    return grad_gate, grad_up


@triton.jit
def backward_kernel(
    grad_ptr,
    h_ptr,
    h_scales_ptr,
    weights_ptr,
    grad_h_ptr,
    sums_ptr,
    rows,
    inner,
    grad_stride,
    stride,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    H: tl.constexpr,
    NOMINAL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tile = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tile * TILE_SIZE + tl.arange(0, TILE_SIZE)
    inside = (row < rows)[:, None] & (column < inner)[None, :]
    gate, up = _load_halves(
        h_ptr, h_scales_ptr, row, column, inside, stride, inner, ALIGNED, H, INTERPRETED
    )
    grad_gate, grad_up = _gradients(
        grad_ptr,
        gate,
        up,
        weights_ptr,
        sums_ptr,
        row,
        column,
        tile,
        row < rows,
        inside,
        grad_stride,
        inner,
        ROWS,
        NOMINAL,
        INTERPRETED,
    )
    place = row.to(tl.int64)[:, None] * (2 * inner) + column[None, :]
    tl.store(grad_h_ptr + place, grad_gate, inside)
    tl.store(grad_h_ptr + place + inner, grad_up, inside)


@triton.jit
def backward_both_kernel(
    grad_ptr,
    h_ptr,
    h_scales_ptr,
    weights_ptr,
    tile_values_ptr,
    tile_scales_ptr,
    column_values_ptr,
    column_scales_ptr,
    sums_ptr,
    table_ptr,
    rows,
    inner,
    padded,
    grad_stride,
    stride,
    H: tl.constexpr,
    NOMINAL: tl.constexpr,
    RULE: tl.constexpr,
):
    """128 rows of one group and 128 columns of the gate, with those of up that belong to them."""
    group, tile = tl.program_id(0), tl.program_id(1)
    start, stop = group_tile(table_ptr, rows, group, padded // TILE_SIZE)
    row = start + tl.arange(0, TILE_SIZE)
    column = tile * TILE_SIZE + tl.arange(0, TILE_SIZE)
    inside = (row < stop)[:, None] & (column < inner)[None, :]
    gate, up = _load_halves(
        h_ptr, h_scales_ptr, row, column, inside, stride, inner, True, H, RULE.interpreted
    )
    grad_gate, grad_up = _gradients(
        grad_ptr,
        gate,
        up,
        weights_ptr,
        sums_ptr,
        row,
        column,
        tile,
        row < stop,
        inside,
        grad_stride,
        inner,
        TILE_SIZE,
        NOMINAL,
        RULE.interpreted,
    )
    width = 2 * inner
    x = widen(grad_gate, RULE.interpreted)
    store_tiles(x, tile_values_ptr, tile_scales_ptr, row, column, tile, stop, width, RULE)
    store_columns(x, column_values_ptr, column_scales_ptr, column, group, width, padded, RULE)
    x = widen(grad_up, RULE.interpreted)
    column += inner
    tile += inner // TILE_SIZE
    store_tiles(x, tile_values_ptr, tile_scales_ptr, row, column, tile, stop, width, RULE)
    store_columns(x, column_values_ptr, column_scales_ptr, column, group, width, padded, RULE)


@triton.jit
def sum_kernel(sums_ptr, total_ptr, rows, tiles, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    """Sums of rows, in ascending order of columns."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for tile in tl.range(0, loop_bound(tiles, INTERPRETED)):
        total += tl.load(sums_ptr + row.to(tl.int64) * tiles + tile, row < rows, 0.0)
    tl.store(total_ptr + row, total, row < rows)
