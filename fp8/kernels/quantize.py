"""Quantisation on a GPU: `quantize_reference` bit for bit, each from one reading of its input.

The functions' arguments are checked in `quantize`, which chooses between the two. NaNs are equal
whatever their sign. Shapes: M rows, D columns, P columns of a transposed tensor of padded groups.
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

from ..formats import TILE, Quantized, padded_rows, tiles_in
from .numbers import (
    TILE_SIZE,
    encode,
    group_tiles,
    magnitude_bits,
    on_its_device,
    rule,
    scale_of,
    scaled,
    widen,
)

_TILES_A_PROGRAM = 32  # 8 KB of bfloat16, which keeps 16-byte loads of all threads under way
_COLUMNS_A_PROGRAM = 64


@on_its_device
def quantize_tiles(x: Tensor, *, dtype: torch.dtype, power_of_two: bool) -> Quantized:
    x = _readable(x)
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(0, 1)
    columns, wide = x.shape[-1], tiles_in(x.shape[-1])
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(*x.shape[:-1], wide, dtype=torch.float32, device=x.device)
    tiles = len(rows) * wide
    if tiles:
        _tiles_kernel[triton.cdiv(tiles, _TILES_A_PROGRAM),](
            rows,
            values.view(torch.uint8),
            scales,
            tiles,
            columns,
            rows.stride(0),
            WHOLE=columns % TILE == 0,
            TILES=_TILES_A_PROGRAM,
            RULE=rule(dtype, power_of_two),
        )
    return Quantized(values, scales)


@on_its_device
def quantize_blocks(x: Tensor, *, dtype: torch.dtype, power_of_two: bool) -> Quantized:
    x = _readable(x).contiguous()
    rows, columns = x.shape[-2:]
    high, wide = tiles_in(rows), tiles_in(columns)
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(*x.shape[:-2], high, wide, dtype=torch.float32, device=x.device)
    if values.numel():
        _blocks_kernel[scales.numel(),](
            x,
            values.view(torch.uint8),
            scales,
            rows,
            columns,
            num_warps=8,
            RULE=rule(dtype, power_of_two),
        )
    return Quantized(values, scales)


@on_its_device
def quantize_columns(
    x_MD: Tensor, counts: Sequence[int] | None, *, dtype: torch.dtype, power_of_two: bool
) -> Quantized:
    return _columns(_readable(x_MD), None, counts, dtype, power_of_two)


@on_its_device
def transpose_tiles(q: Quantized, counts: Sequence[int] | None, *, power_of_two: bool) -> Quantized:
    values = q.values if q.values.stride(1) == 1 else q.values.contiguous()
    scales = q.scales.float().contiguous()
    return _columns(values, scales, counts, values.dtype, power_of_two)


@on_its_device
def quantize_both(
    x_MD: Tensor, counts: Sequence[int] | None, *, dtype: torch.dtype, power_of_two: bool
) -> tuple[Quantized, Quantized]:
    x = _readable(x_MD)
    rows, width = x.shape
    columns, table = columns_for(x.device, rows, width, counts, dtype)
    tiles = tiles_for(x.device, rows, width, dtype)
    if x.numel():
        _both_kernel[columns.scales.shape[1], tiles_in(width)](
            x,
            tiles.values.view(torch.uint8),
            tiles.scales,
            columns.values.view(torch.uint8),
            columns.scales,
            table,
            rows,
            width,
            columns.values.shape[1],
            x.stride(0),
            num_warps=8,
            RULE=rule(dtype, power_of_two),
        )
    return tiles, columns


def tiles_for(device: torch.device, rows: int, width: int, dtype: torch.dtype) -> Quantized:
    """Room for a matrix in tiles of 1x128."""
    return Quantized(
        torch.empty(rows, width, dtype=dtype, device=device),
        torch.empty(rows, tiles_in(width), dtype=torch.float32, device=device),
    )


def columns_for(
    device: torch.device, rows: int, width: int, counts: Sequence[int] | None, dtype: torch.dtype
) -> tuple[Quantized, Tensor | None]:
    """Room for the transpose in tiles, and the table of its groups' tiles, None for one group."""
    padded = padded_rows([rows] if counts is None else counts)
    found = Quantized(
        torch.empty(width, padded, dtype=dtype, device=device),
        torch.empty(width, padded // TILE, dtype=torch.float32, device=device),
    )
    return found, None if counts is None else group_tiles(counts, device)


def _columns(
    x: Tensor,
    x_scales: Tensor | None,
    counts: Sequence[int] | None,
    dtype: torch.dtype,
    power_of_two: bool,
) -> Quantized:
    rows, width = x.shape
    columns, table = columns_for(x.device, rows, width, counts, dtype)
    if x.numel():
        _columns_kernel[columns.scales.shape[1], triton.cdiv(width, _COLUMNS_A_PROGRAM)](
            x.view(torch.uint8) if x_scales is not None else x,
            x_scales,
            columns.values.view(torch.uint8),
            columns.scales,
            table,
            rows,
            width,
            columns.values.shape[1],
            x.stride(0),
            COLUMNS=_COLUMNS_A_PROGRAM,
            num_warps=4,
            RULE=rule(dtype, power_of_two),
        )
    return columns


def _readable(x: Tensor) -> Tensor:
    """As kernels take it: float64 rounded to float32, elements of a row side by side."""
    x = x.float() if x.dtype == torch.float64 else x
    return x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous()


@triton.jit
def group_tile(table_ptr, rows, tile, num_tiles):
    """The first row of a tile of 128 rows and the end of its rows, by the table or of one group."""
    if table_ptr is None:
        start = tile * TILE_SIZE
        stop = tl.minimum(start + TILE_SIZE, rows)
    else:
        start = tl.load(table_ptr + tile)
        stop = tl.load(table_ptr + num_tiles + tile)
    return start, stop


@triton.jit
def store_tiles(
    x,
    values_ptr,
    scales_ptr,
    row,
    column,
    tile,
    rows_stop,
    width,
    RULE: tl.constexpr,
):
    """Quantise x [R, 128] by rows, and store it as rows `row`, columns `column`, tile `tile`."""
    scale, factor = scale_of(tl.max(magnitude_bits(x), 1), RULE)
    y = scaled(x, tl.broadcast_to(factor[:, None], x.shape), RULE)
    codes = encode(y, RULE)
    long = row.to(tl.int64)
    inside = (row < rows_stop)[:, None] & (column < width)[None, :]
    tl.store(values_ptr + long[:, None] * width + column[None, :], codes, inside)
    wide = tl.cdiv(width, TILE_SIZE)
    tl.store(scales_ptr + long * wide + tile, scale, (row < rows_stop) & (tile < wide))


@triton.jit
def store_columns(
    x,
    values_ptr,
    scales_ptr,
    column,
    tile,
    width,
    padded,
    RULE: tl.constexpr,
):
    """Quantise x [128, C] by columns, and store its transpose as tile `tile` of rows `column`."""
    scale, factor = scale_of(tl.max(magnitude_bits(x), 0), RULE)
    y = scaled(x, tl.broadcast_to(factor[None, :], x.shape), RULE)
    codes = tl.trans(encode(y, RULE))
    long = column.to(tl.int64)
    place = tile * TILE_SIZE + tl.arange(0, TILE_SIZE)
    inside = (column < width)[:, None]
    tl.store(values_ptr + long[:, None] * padded + place[None, :], codes, inside)
    tl.store(scales_ptr + long * (padded // TILE_SIZE) + tile, scale, column < width)


@triton.jit
def _tiles_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    num_tiles,
    columns,
    stride,
    WHOLE: tl.constexpr,
    TILES: tl.constexpr,
    RULE: tl.constexpr,
):
    """Tiles in the order they lie in memory, so that a program reads one piece of it."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    wide = tl.cdiv(columns, TILE_SIZE)
    row = (tile // wide).to(tl.int64)
    column = (tile % wide)[:, None] * TILE_SIZE + tl.arange(0, TILE_SIZE)[None, :]
    inside = (tile < num_tiles)[:, None]
    if not WHOLE:
        inside = inside & (column < columns)
    x = tl.load(x_ptr + row[:, None] * stride + column, inside, 0.0)
    x = widen(x, RULE.interpreted)
    scale, factor = scale_of(tl.max(magnitude_bits(x), 1), RULE)
    y = scaled(x, tl.broadcast_to(factor[:, None], x.shape), RULE)
    codes = encode(y, RULE)
    tl.store(values_ptr + row[:, None] * columns + column, codes, inside)
    tl.store(scales_ptr + tile, scale, tile < num_tiles)


@triton.jit
def _blocks_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    rows,
    columns,
    RULE: tl.constexpr,
):
    block = tl.program_id(0)
    wide = tl.cdiv(columns, TILE_SIZE)
    high = tl.cdiv(rows, TILE_SIZE)
    matrix = (block // (wide * high)).to(tl.int64)
    within = block % (wide * high)
    row = (within // wide) * TILE_SIZE + tl.arange(0, TILE_SIZE)
    column = (within % wide) * TILE_SIZE + tl.arange(0, TILE_SIZE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = (matrix * rows + row)[:, None] * columns + column[None, :]
    x = widen(tl.load(x_ptr + place, inside, 0.0), RULE.interpreted)
    amax = tl.max(tl.max(magnitude_bits(x), 1, keep_dims=True), 0, keep_dims=True)
    scale, factor = scale_of(amax, RULE)
    y = scaled(x, tl.broadcast_to(factor, x.shape), RULE)
    tl.store(values_ptr + place, encode(y, RULE), inside)
    tl.store(scales_ptr + block + tl.zeros([1, 1], tl.int32), scale)


@triton.jit
def _columns_kernel(
    x_ptr,
    x_scales_ptr,
    values_ptr,
    scales_ptr,
    table_ptr,
    rows,
    width,
    padded,
    stride,
    COLUMNS: tl.constexpr,
    RULE: tl.constexpr,
):
    """128 rows of one group; of FP8 with scales if there are x_scales."""
    tile = tl.program_id(0)
    start, stop = group_tile(table_ptr, rows, tile, padded // TILE_SIZE)
    row = (start + tl.arange(0, TILE_SIZE)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < stop)[:, None] & (column < width)[None, :]
    place = row[:, None] * stride + column[None, :]
    if x_scales_ptr is None:
        x = widen(tl.load(x_ptr + place, inside, 0.0), RULE.interpreted)
    else:
        codes = tl.load(x_ptr + place, inside, 0)
        first = tl.program_id(1) * COLUMNS // TILE_SIZE
        scale = tl.load(x_scales_ptr + row * tl.cdiv(width, TILE_SIZE) + first, row < stop, 0.0)
        x = widen(codes.to(RULE.fp8, bitcast=True), RULE.interpreted) * scale[:, None]
    store_columns(
        x,
        values_ptr,
        scales_ptr,
        column,
        tile,
        width,
        padded,
        RULE,
    )


@triton.jit
def _both_kernel(
    x_ptr,
    tile_values_ptr,
    tile_scales_ptr,
    column_values_ptr,
    column_scales_ptr,
    table_ptr,
    rows,
    width,
    padded,
    stride,
    RULE: tl.constexpr,
):
    tile = tl.program_id(0)
    start, stop = group_tile(table_ptr, rows, tile, padded // TILE_SIZE)
    row = start + tl.arange(0, TILE_SIZE)
    column = tl.program_id(1) * TILE_SIZE + tl.arange(0, TILE_SIZE)
    inside = (row < stop)[:, None] & (column < width)[None, :]
    place = row.to(tl.int64)[:, None] * stride + column[None, :]
    x = widen(tl.load(x_ptr + place, inside, 0.0), RULE.interpreted)
    store_tiles(
        x, tile_values_ptr, tile_scales_ptr, row, column, tl.program_id(1), stop, width, RULE
    )
    store_columns(x, column_values_ptr, column_scales_ptr, column, tile, width, padded, RULE)
