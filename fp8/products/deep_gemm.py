"""Products by DeepGEMM 2.1 or newer (github.com/deepseek-ai/DeepGEMM) on Hopper.

Two kernels serve: one takes `b` in blocks of 128x128 and writes BF16 ("1D2D": forward passes and
input gradients), the other takes both in tiles of 1x128 and adds to float32 ("1D1D": weight
gradients). Both want E4M3, rows along K, and scales in float32, which the library itself lays out.

Shapes: M, N, R rows; K summed over; E groups; P columns of padded groups.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..formats import E4M3, TILE, Quantized, tiles_in
from .base import Backend, Product, tile_scales
from .hopper import block_scales, dense, indivisible, row_major, why_no_gpu, why_not_hopper
from .reference import slices

_GET_IT = "pip install from github.com/deepseek-ai/DeepGEMM, version 2.1 or newer"
_DENSE = "fp8_gemm_nt"
_GROUPED = "m_grouped_fp8_gemm_nt_contiguous"
_ALONG_K = "k_grouped_fp8_gemm_nt_contiguous"
# Newer versions ask for one alignment of rows and of columns, older ones for each.
_ALIGNMENTS = ("get_mk_alignment_for_contiguous_layout", "get_m_alignment_for_contiguous_layout")
_TILES = (1, 1, TILE)


class DeepGemm(Backend):
    """Transposed operands are copied, and groups padded where the kernels want it so."""

    name: ClassVar[str] = "deep_gemm"

    def missing(self) -> str | None:
        return _why_no_library() or why_no_gpu()

    def why_not(self, product: Product) -> str | None:
        a, b = product.a.values, product.b.values
        if not a.dtype == b.dtype == E4M3:
            return f"it multiplies float8_e4m3fn, got {a.dtype} and {b.dtype}"
        sizes = {"N": (b.shape[-2], 8), "K": (a.shape[1], TILE)}
        if product.kind == "grouped":
            if product.out_dtype != torch.bfloat16:
                return f"its grouped product writes bfloat16, not {product.out_dtype}"
            if block_scales(product.b) is None:
                return "its grouped product takes b in blocks of 128x128: see quantize_blocks"
        if product.kind == "grouped_along_k":
            # A block of results that hangs over would reach into the next group's.
            sizes = {"M": (len(a), TILE), "N": (len(b), TILE)}
        into = product.accumulate
        if into is not None and not into.is_contiguous():
            return "it accumulates into a contiguous tensor"
        return why_not_hopper(product.device) or indivisible(sizes)

    def _compute(self, product: Product) -> Tensor:
        if product.kind == "dense":
            return _dense(product)
        return _grouped(product) if product.kind == "grouped" else _along_k(product)


def _dense(product: Product) -> Tensor:
    a, b, into = product.a, product.b, product.accumulate
    blocks = block_scales(b)
    if into is None and product.out_dtype == torch.bfloat16 and blocks is not None:
        found = a.values.new_empty(product.shape, dtype=torch.bfloat16)
        _call(_DENSE, _in_tiles(a), (row_major(b.values), blocks), found)
        return found
    found = a.values.new_zeros(product.shape, dtype=torch.float32) if into is None else dense(into)
    _call(_DENSE, _in_tiles(a), _in_tiles(b), found, c=found, recipe=_TILES)
    return into if into is not None else found.to(product.out_dtype)


def _grouped(product: Product) -> Tensor:
    a, b, counts = product.a, product.b, product.counts
    blocks, (values, scales) = block_scales(b), _in_tiles(a)
    assert blocks is not None
    alignment = int(_find(_ALIGNMENTS)())
    groups, source, target = aligned_rows(counts, alignment)
    if source is not None:
        source = source.to(product.device, non_blocking=True)
        values = values.view(torch.uint8)[source].view(E4M3)
        scales = scales[source]
    found = values.new_empty(len(values), product.shape[1], dtype=torch.bfloat16)
    groups = groups.to(product.device, non_blocking=True)
    _call(_GROUPED, (values, scales), (row_major(b.values), blocks), found, groups)
    return found if target is None else found[target.to(product.device, non_blocking=True)]


def _along_k(product: Product) -> Tensor:
    into, padded = product.accumulate, [tiles_in(n) * TILE for n in product.counts]
    assert into is not None
    columns = torch.tensor(padded, dtype=torch.int32).to(product.device, non_blocking=True)
    operands = [
        (group_after_group(q.values, padded), dense(tile_scales(q))) for q in (product.a, product.b)
    ]
    target = dense(into)
    _call(_ALONG_K, *operands, target, padded, columns, target)
    return into


def aligned_rows(
    counts: Sequence[int], alignment: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """How rows of groups lie where each group starts at a multiple of `alignment`.

    Returns:
        Three tensors. The group of each row there, int32, -1 for rows that fill up; which row
        comes there, int64 (for filling, any); where each row went, int64. The last two are None
        if all groups are aligned as they are.
    """
    sizes = torch.tensor(counts, dtype=torch.int64)
    padded = (sizes + alignment - 1) // alignment * alignment
    groups = torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), padded)
    if torch.equal(sizes, padded):
        return groups, None, None
    shift = (padded.cumsum(0) - padded) - (sizes.cumsum(0) - sizes)
    target = torch.arange(int(sizes.sum())) + torch.repeat_interleave(shift, sizes)
    source = torch.zeros(len(groups), dtype=torch.int64)
    source[target] = torch.arange(len(target))
    is_row = torch.zeros(len(groups), dtype=torch.bool)
    is_row[target] = True
    return groups.masked_fill(~is_row, -1), source, target


def group_after_group(values: Tensor, columns: Sequence[int]) -> Tensor:
    """[D, P] as one row of codes in which each group's [D, columns] follows the last one's."""
    codes = values.view(torch.uint8)
    parts = [codes[:, group].reshape(-1) for _, group in slices(columns)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(values.dtype)


def _in_tiles(q: Quantized) -> tuple[Tensor, Tensor]:
    return row_major(q.values), dense(tile_scales(q))


def _call(name: str, *arguments: Any, **options: Any) -> None:
    try:
        _find((name,))(*arguments, **options)
    except RuntimeError as error:
        raise RuntimeError(
            f"DeepGEMM's {name} failed: {error}; if it is compilation, of which each new shape has "
            "one, that takes a CUDA toolkit (CUDA_HOME, nvcc or NVRTC) and a cache it can write to "
            "(DG_JIT_CACHE_DIR); backend='cublas' (dense) and 'triton' take neither"
        ) from error


def _find(names: Sequence[str]) -> Callable[..., Any]:
    """The first function of these names that the library has."""
    library = _library()
    return next(getattr(library, name) for name in names if hasattr(library, name))


def _library() -> ModuleType:
    return importlib.import_module("deep_gemm")


@cache
def _why_no_library() -> str | None:
    try:
        library = _library()
    except Exception as error:  # a broken installation may raise anything
        return f"DeepGEMM cannot be imported ({error!r}); {_GET_IT}"
    lacks = [
        names[0]
        for names in ((_DENSE,), (_GROUPED,), (_ALONG_K,), _ALIGNMENTS)
        if not any(hasattr(library, name) for name in names)
    ]
    if lacks:
        return f"the DeepGEMM that is installed has no {', '.join(lacks)}; {_GET_IT}"
    return None
