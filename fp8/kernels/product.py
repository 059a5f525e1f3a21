"""Products of FP8 matrices on a GPU, with a scale for each 128 along K, promoted to float32 there.

For each 128 along K the tensor cores start from zero and their sum is multiplied by both scales and
added to a float32 accumulator (arXiv 2412.19437, section 3.3.2): `products.reference` but for the
rounding inside the tensor cores. Operands come through the tensor memory accelerator.

One kernel serves all three products: a program computes a tile of the result for a group, by a
table that the host makes of the counts, so that nothing waits for the device. Groups need no
padding, and empty ones get no program.

Shapes: M, N, R rows; K summed over; E groups; P columns of groups padded to a multiple of 128.
"""

# Triton's language is not Python to a type checker: its blocks, constants and launches are its own.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportArgumentType=false
from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate as running_sum
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..formats import TILE, Quantized, tiles_in
from .numbers import TILE_SIZE, interpreted, loop_bound, narrow, on_its_device, to_device

# What a tensor memory descriptor asks of a row's length in bytes.
_ALIGNMENT = 16
# Rows of tiles that are walked together: what they read of b stays in the second-level cache.
_BAND = tl.constexpr(8)


class _Original:
    """What `out` holds before configurations are tried on it, each of which adds to it repeatedly.

    A hook of the tuner's: it is called before each trial, and with `reset_only` after the last.
    """

    def __init__(self) -> None:
        self.copy: Tensor | None = None

    def before(self, arguments: dict[str, Any], reset_only: bool = False) -> None:
        if reset_only:
            self._put_back(arguments)
        elif arguments["ACCUMULATE"] and self.copy is None:
            self.copy = arguments["out_ptr"].clone()

    def after(self, arguments: dict[str, Any], exception: Exception | None) -> None:
        if exception is not None:  # perhaps the tuner's end
            self._put_back(arguments)

    def _put_back(self, arguments: dict[str, Any]) -> None:
        if self.copy is not None:
            arguments["out_ptr"].copy_(self.copy)
            self.copy = None


def _config(
    m: int, n: int, halves: int, warps: int, stages: int, registers: int | None = None
) -> triton.Config:
    return triton.Config(
        {"BLOCK_M": m, "BLOCK_N": n, "HALVES": halves},
        num_warps=warps,
        num_stages=stages,
        maxnreg=registers,
        pre_hook=_set_blocks,
    )


def _set_blocks(arguments: dict[str, Any]) -> None:
    arguments["a_desc"].block_shape = [arguments["BLOCK_M"], TILE]
    arguments["b_desc"].block_shape = [arguments["BLOCK_N"], TILE]


# A program has BLOCK_M rows and HALVES times BLOCK_N columns, one half after the other, so that
# less waits to be added up. Of the first and the third several fit on a multiprocessor: one adds
# up in float32 while the tensor cores work for another. The last reads least for what it computes.
# None is over 128 rows, since the tables are made for tiles of that.
CONFIGS = [
    _config(128, 64, 2, 8, 3, registers=128),
    _config(128, 128, 1, 8, 5),
    _config(64, 128, 1, 4, 3),
    _config(128, 128, 2, 8, 4),
]


def _that_fit(
    configs: list[triton.Config], arguments: dict[str, Any], **constants: Any
) -> list[triton.Config]:
    """One half alone where each column has its scale: registers do not hold those as well."""
    del arguments
    return [c for c in configs if c.kwargs["HALVES"] == 1 or constants["B_ROWS"] > 1]


@on_its_device
def matmul(a: Quantized, b: Quantized, out: Tensor, accumulate: bool) -> None:
    """out [M, N] = a [M, K] @ b [N, K].T, or added to it.

    Args:
        a, b: tiles, blocks or one scale each, in any combination.
        out: bfloat16 or float32, contiguous.
        accumulate: add to out (float32).
    """
    k_tiles = tiles_in(a.values.shape[1])
    _launch(a, b, out, accumulate, len(a.values), b.values.shape[0], None, k_tiles)


@on_its_device
def grouped(a: Quantized, b: Quantized, counts: Sequence[int], out: Tensor) -> None:
    """out [R, N]: row r of group e is a[r] @ b[e].T, for a [R, K] and b [E, N, K]."""
    k_tiles = tiles_in(a.values.shape[1])
    table: list[tuple[int, ...]] = []
    for e, (n, stop) in enumerate(zip(counts, running_sum(counts), strict=True)):
        table += [(e, row, stop, 0, k_tiles) for row in range(stop - n, stop, TILE)]
    _launch(a, b, out, False, len(a.values), b.values.shape[1], table, k_tiles)


@on_its_device
def grouped_along_k(a: Quantized, b: Quantized, counts: Sequence[int], accumulate: Tensor) -> None:
    """accumulate [E, M, N] += a's columns of group e @ b's columns of group e, transposed.

    Args:
        a, b: tiles, values [M, P] and [N, P], from `quantize_columns(.., counts)`.
        accumulate: float32, contiguous.
    """
    rows = len(a.values)
    table: list[tuple[int, ...]] = []
    first = 0
    for e, n in enumerate(counts):
        stop = first + tiles_in(n)
        if n:
            table += [(e, row, rows, first, stop) for row in range(0, rows, TILE)]
        first = stop
    _launch(a, b, accumulate, True, rows, len(b.values), table, 0, group_along_k=True)


def _launch(
    a: Quantized,
    b: Quantized,
    out: Tensor,
    accumulate: bool,
    rows: int,
    columns: int,
    table: list[tuple[int, ...]] | None,
    k_tiles: int,
    *,
    group_along_k: bool = False,
) -> None:
    """Starts the kernel; `table` has (group, first row, end of rows, first tile along K, end).

    `k_tiles` is the length of the sums, 0 where groups have lengths of their own.
    """
    assert out.is_contiguous()
    if not out.numel() or (table is not None and not table):
        return
    a_values, b_values = _readable(a.values), _readable(b.values.flatten(0, -2))
    a_scales, a_rows, a_strides = _scales(a)
    b_scales, b_rows, b_strides = _scales(b)
    lines = None if table is None else to_device(table, out.device)
    tiles_m = triton.cdiv(rows, TILE) if table is None else len(table)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        parts = TILE // meta["BLOCK_M"]
        return (tiles_m * parts * triton.cdiv(columns, meta["BLOCK_N"] * meta["HALVES"]),)

    kernel, fixed = _kernel_and_blocks()
    kernel[grid](
        TensorDescriptor.from_tensor(a_values, [fixed.get("BLOCK_M", TILE), TILE]),
        TensorDescriptor.from_tensor(b_values, [fixed.get("BLOCK_N", TILE), TILE]),
        out,
        a_scales,
        b_scales,
        lines,
        tiles_m,
        rows,
        columns,
        k_tiles,
        *a_strides[-2:],
        *(0, *b_strides)[-3:],
        A_ROWS=a_rows,
        B_ROWS=b_rows,
        ACCUMULATE=accumulate,
        ALONG_K=group_along_k,
        INTERPRETED=interpreted(),
        **fixed,
    )


def _kernel_and_blocks() -> tuple[Any, dict[str, Any]]:
    """The kernel, and its blocks where no configurations are tried: in the interpreter."""
    return (_product_kernel, CONFIGS[0].kwargs) if interpreted() else (_tuned_kernel, {})


def _readable(values: Tensor) -> Tensor:
    """[rows, K] as a descriptor takes it; a row that is no multiple of 16 bytes costs a copy."""
    short = -values.shape[1] % _ALIGNMENT
    if short:
        return F.pad(values.view(torch.uint8), (0, short)).view(values.dtype)
    fits = values.stride(1) == 1 and not values.stride(0) % _ALIGNMENT
    if fits and not values.data_ptr() % _ALIGNMENT:
        return values
    # Not .contiguous(), to which a dimension of size 1 is that with any stride.
    return values.clone(memory_format=torch.contiguous_format)


def _scales(q: Quantized) -> tuple[Tensor, int, tuple[int, ...]]:
    """Scales as float32, how many rows share one, and their strides (0 where one serves all)."""
    scales = q.scales.float()
    rows, columns = q.values.shape[-2:]
    high, wide = scales.shape[-2:]
    if (high, wide) == (rows, tiles_in(columns)):
        return scales, 1, scales.stride()
    strides = list(scales.stride())
    if wide == 1:
        strides[-1] = 0
    if high == 1:
        strides[-2] = 0
    return scales, TILE, tuple(strides)


@triton.jit
def _place(num_m, num_n):
    """Which tile of rows and which of columns this program has: bands of rows, columns in them."""
    program = tl.program_id(0)
    band = program // (_BAND * num_n)
    first = band * _BAND
    height = tl.minimum(num_m - first, _BAND)
    within = program % (_BAND * num_n)
    return first + within % height, within // height


@triton.jit
def _load_scales(ptr, row, stop, stride, ROWS: tl.constexpr):
    """Scales of rows, or a single one for all of them where they share it."""
    if ROWS == 1:
        found = tl.load(ptr + row * stride, row < stop, 0.0)
    else:
        found = tl.load(ptr + row // ROWS * stride, row < stop, 0.0)
    return found


@triton.jit
def _promoted(
    acc, a, a_scale, b_desc, b_scales, b_first, n, k, columns, stride, B_ROWS: tl.constexpr
):
    """acc + a @ b.T of 128 along K, with scales; n is the first column of the result's tile."""
    partial = tl.dot(a, b_desc.load([b_first + n, k * TILE_SIZE]).T)
    if B_ROWS == 1:
        column = n + tl.arange(0, partial.shape[1])
        b_scale = _load_scales(b_scales, column, columns, stride, 1)
        acc += partial * (a_scale[:, None] * b_scale[None, :])
    else:  # a block has 128 columns of the result, and so all of this tile's
        b_scale = tl.load(b_scales + n // B_ROWS * stride, n < columns, 0.0)
        acc += partial * (a_scale * b_scale)[:, None]
    return acc


@triton.jit
def _store(
    acc, out_ptr, row, stop, n, columns, ACCUMULATE: tl.constexpr, INTERPRETED: tl.constexpr
):
    column = n + tl.arange(0, acc.shape[1])
    inside = (row < stop)[:, None] & (column < columns)[None, :]
    place = out_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    if ACCUMULATE:
        acc += tl.load(place, inside, 0.0)
    tl.store(place, narrow(acc, out_ptr.dtype.element_ty, INTERPRETED), inside)


# What follows the counts of groups is not looked at to choose a compiled kernel.
@triton.jit(do_not_specialize=["tiles_m", "rows", "a_stride", "b_stride"])
def _product_kernel(
    a_desc,
    b_desc,
    out_ptr,
    a_scales_ptr,
    b_scales_ptr,
    table_ptr,
    tiles_m,
    rows,
    columns,
    k_tiles,
    a_stride,
    a_stride_k,
    b_stride_group,
    b_stride,
    b_stride_k,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ALONG_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HALVES: tl.constexpr,
):
    parts: tl.constexpr = TILE_SIZE // BLOCK_M
    m, n = _place(tiles_m * parts, tl.cdiv(columns, BLOCK_N * HALVES))
    n *= BLOCK_N * HALVES
    if table_ptr is None:
        group = 0
        start = m * BLOCK_M
        stop = rows
        first = 0
        end = k_tiles
    else:
        line = table_ptr + (m // parts) * 5
        group = tl.load(line)
        start = tl.load(line + 1) + (m % parts) * BLOCK_M
        stop = tl.load(line + 2)
        first = tl.load(line + 3)
        end = tl.load(line + 4)
    row = start + tl.arange(0, BLOCK_M)
    b_group = 0 if ALONG_K else group
    b_first = b_group * columns
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HALVES == 2:
        acc_2 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(loop_bound(first, INTERPRETED), loop_bound(end, INTERPRETED)):
        a = a_desc.load([start, k * TILE_SIZE])
        a_scale = _load_scales(a_scales_ptr + k * a_stride_k, row, stop, a_stride, A_ROWS)
        b_scales = b_scales_ptr + b_group * b_stride_group + k * b_stride_k
        acc = _promoted(acc, a, a_scale, b_desc, b_scales, b_first, n, k, columns, b_stride, B_ROWS)
        if HALVES == 2:
            acc_2 = _promoted(
                acc_2,
                a,
                a_scale,
                b_desc,
                b_scales,
                b_first,
                n + BLOCK_N,
                k,
                columns,
                b_stride,
                B_ROWS,
            )
    if ALONG_K:
        out_ptr += group.to(tl.int64) * rows * columns
    _store(acc, out_ptr, row, stop, n, columns, ACCUMULATE, INTERPRETED)
    if HALVES == 2:
        _store(acc_2, out_ptr, row, stop, n + BLOCK_N, columns, ACCUMULATE, INTERPRETED)


# Nothing in the key follows the counts of groups, so that a routing is not a reason to tune anew.
_original = _Original()
_tuned_kernel = triton.autotune(
    CONFIGS,
    key=["columns", "k_tiles", "A_ROWS", "B_ROWS", "ACCUMULATE", "ALONG_K"],
    pre_hook=_original.before,
    post_hook=_original.after,
    prune_configs_by={"early_config_prune": _that_fit},
)(_product_kernel)
