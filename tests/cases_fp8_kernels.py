"""The Triton kernels beside the references: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from counterflow.fp8 import E4M3, E5M2, Quantized, quantize_reference, swiglu_reference
from counterflow.fp8.formats import TILE, tiles_in
from counterflow.fp8.kernels import product, quantize, swiglu
from counterflow.fp8.products.reference import Reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = {"e4m3": E4M3, "e5m2": E5M2}


def same_numbers(found: Tensor, expected: Tensor) -> None:
    """Equal bits, but that a NaN is like any other."""
    assert found.dtype == expected.dtype, f"{found.dtype} is not {expected.dtype}"
    assert found.shape == expected.shape, f"{found.shape} is not {expected.shape}"
    wide, expected_wide = found.float().cpu(), expected.float().cpu()
    nan = expected_wide.isnan()
    assert torch.equal(wide.isnan(), nan), "NaNs at other places"
    pairs = (t.masked_fill(nan, 0).view(torch.int32) for t in (wide, expected_wide))
    assert torch.equal(*pairs), f"{int((wide != expected_wide).sum())} numbers differ"


def same(found: Any, expected: Any) -> None:
    """Tensors, quantised tensors, None, and tuples of them."""
    if isinstance(expected, Tensor):
        same_numbers(found, expected)
        return
    assert (found is None) == (expected is None), "one is None"
    for a, b in zip(found or (), expected or (), strict=True):
        same(a, b)


def numbers(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers over many magnitudes, zeros of both signs, subnormals; NaN and infinities."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.randn(rows, columns, generator=generator).mul_(8).exp2_()
    places = torch.randperm(rows * columns, generator=generator)
    flat = x.view(-1)
    flat[places[5::9]] = 0.0
    flat[places[7::13]] = -0.0
    flat[places[8::17]] = 1e-40
    if rows > 2:
        x[1] = 0.0
        x[2] *= 2.0**-128
    x = x.to(dtype)
    if rows > 100:
        x.view(-1)[places[:3]] = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)
    return x


def quantisers(
    x: Tensor, counts: Sequence[int] | None, dtype: torch.dtype, power_of_two: bool
) -> None:
    options: dict[str, Any] = {"dtype": dtype, "power_of_two": power_of_two}
    y = x.cuda() if torch.cuda.is_available() else x
    tiles = quantize_reference.quantize_tiles(x, **options)
    columns = quantize_reference.quantize_columns(x, counts, **options)
    same(quantize.quantize_tiles(y, **options), tiles)
    same(quantize.quantize_columns(y, counts, **options), columns)
    same(quantize.quantize_both(y, counts, **options), (tiles, columns))
    same(quantize.quantize_blocks(y, **options), quantize_reference.quantize_blocks(x, **options))
    moved = Quantized(*(t.to(y.device) for t in tiles))
    same(
        quantize.transpose_tiles(moved, counts, power_of_two=power_of_two),
        quantize_reference.transpose_tiles(tiles, counts, power_of_two=power_of_two),
    )


def quantise_numbers(
    rows: int, columns: int, name: str, form: str, power_of_two: bool, counts: Sequence[int] | None
) -> None:
    x = numbers(rows, columns, DTYPES[name], seed=rows + columns)
    quantisers(x, counts, FORMATS[form], power_of_two)


def quantise_bits(bits: Sequence[int], form: str, power_of_two: bool) -> None:
    """One row of float32s by their bits."""
    x = torch.tensor([bits], dtype=torch.int64).to(torch.int32).view(torch.float32)
    quantisers(x, None, FORMATS[form], power_of_two)


def quantise_every_half(name: str, form: str) -> None:
    """All numbers of bfloat16 or float16, each in a tile with its like and with larger ones."""
    codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(-1, TILE)
    x = codes.view(DTYPES[name])
    limit = torch.finfo(DTYPES[name]).max
    beside = torch.where(x.isfinite(), x, 0.0).clone()
    beside[:, 0] = limit * 2.0 ** -torch.arange(len(x)).remainder(24)
    for y in (x, beside):
        options: dict[str, Any] = {"dtype": FORMATS[form], "power_of_two": True}
        z = y.cuda() if torch.cuda.is_available() else y
        same(quantize.quantize_tiles(z, **options), quantize_reference.quantize_tiles(y, **options))


def shapes_that_are_kept() -> None:
    """Leading dimensions, other strides, nothing at all."""
    options: dict[str, Any] = {"dtype": E4M3, "power_of_two": True}
    x = numbers(12, 260, torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for y in (x.view(2, 6, 260), x[:, 4:137], x.t(), x[0], x[:0], x[:, :0], x.double()):
        z = y.to(device)
        same(quantize.quantize_tiles(z, **options), quantize_reference.quantize_tiles(y, **options))
        if y.dim() > 1:
            found = quantize.quantize_blocks(z, **options)
            same(found, quantize_reference.quantize_blocks(y, **options))
        if y.dim() == 2:
            found = quantize.quantize_both(z, None, **options)
            same(found[1], quantize_reference.quantize_columns(y, None, **options))


def transpose_every_code(form: str, power_of_two: bool) -> None:
    """All codes, NaNs and infinities too, under scales that differ from row to row."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.uint8)
    values = codes.repeat(140, 1).view(FORMATS[form])
    values.view(torch.uint8)[3:] &= 0xBB  # most rows without NaN or infinity
    generator = torch.Generator().manual_seed(1)
    scales = torch.randint(-9, 9, (140, 2), generator=generator).float().exp2()
    q = Quantized(values, scales if power_of_two else scales * 1.1)
    moved = Quantized(*(t.cuda() for t in q)) if torch.cuda.is_available() else q
    same(
        quantize.transpose_tiles(moved, [5, 0, 135], power_of_two=power_of_two),
        quantize_reference.transpose_tiles(q, [5, 0, 135], power_of_two=power_of_two),
    )


def swiglus(
    rows: int, inner: int, name: str, stored: str, weighted: bool, counts: Sequence[int] | None
) -> None:
    """All functions of SwiGLU; `stored` is "" for h as it is, or the FP8 format it is kept in."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    h: Tensor | Quantized = numbers(rows, 2 * inner, DTYPES[name], seed=rows)
    if stored:
        h = quantize_reference.quantize_tiles(h, dtype=FORMATS[stored], power_of_two=rows % 2 == 0)
    there = Quantized(*(t.to(device) for t in h)) if isinstance(h, Quantized) else h.to(device)
    generator = torch.Generator().manual_seed(2)
    weights = torch.rand(rows, generator=generator) if weighted else None
    weights_there = None if weights is None else weights.to(device)
    grad = numbers(rows, inner, DTYPES[name], seed=rows + 1)
    grad_there = grad.to(device)
    expected = swiglu_reference
    same(swiglu.swiglu(there, weights_there), expected.swiglu(h, weights))
    same(
        swiglu.swiglu_quantized(there, weights_there, power_of_two=False),
        expected.swiglu_quantized(h, weights, power_of_two=False),
    )
    same(
        swiglu.swiglu_columns(there, weights_there, counts, dtype=E5M2),
        expected.swiglu_columns(h, weights, counts, dtype=E5M2),
    )
    same(
        swiglu.swiglu_backward(grad_there, there, weights_there),
        expected.swiglu_backward(grad, h, weights),
    )
    same(
        swiglu.swiglu_backward_quantized(grad_there, there, weights_there, counts),
        expected.swiglu_backward_quantized(grad, h, weights, counts),
    )


def swiglu_of_every_gate() -> None:
    """silu of all bfloat16 numbers, and its slope."""
    gate = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate = gate.view(-1, TILE)
    h, grad = torch.cat([gate, torch.ones_like(gate)], dim=1), torch.ones_like(gate)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    same(swiglu.swiglu(h.to(device)), swiglu_reference.swiglu(h))
    same(
        swiglu.swiglu_backward(grad.to(device), h.to(device)),
        swiglu_reference.swiglu_backward(grad, h),
    )


def operand(shape: Sequence[int], kind: str, form: str = "e4m3", seed: int = 0) -> Quantized:
    """Small integers under scales that are powers of two: every sum of products is exact."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 9, tuple(shape), generator=generator).float().to(FORMATS[form])
    *lead, rows, columns = shape
    of = {
        "tiles": (*lead, rows, tiles_in(columns)),
        "blocks": (*lead, tiles_in(rows), tiles_in(columns)),
        "tensor": (*lead, 1, 1),
    }[kind]
    return Quantized(values, torch.randint(-3, 4, of, generator=generator).float().exp2())


def turned(q: Quantized) -> Quantized:
    """The same operand as the transposed view of a copy: of one row, with a stride of 1."""
    return Quantized(*(t.mT.clone(memory_format=torch.contiguous_format).mT for t in q))


def dense_products(m: int, n: int, k: int, a_kind: str, b_kind: str, form: str = "e4m3") -> None:
    a, b = operand((m, k), a_kind), operand((n, k), b_kind, form, seed=1)
    once = Reference().matmul(a, b)
    for dtype in (torch.bfloat16, torch.float32):
        found = torch.empty(m, n, dtype=dtype)
        product.matmul(a, b, found, False)
        same(found, Reference().matmul(a, b, out_dtype=dtype))
    found = torch.empty_like(once)
    product.matmul(turned(a), turned(b), found, False)
    same(found, once)
    total = torch.randn(m, n, generator=torch.Generator().manual_seed(2))
    expected = Reference().matmul(a, b, out_dtype=torch.float32, accumulate=total.clone())
    product.matmul(a, b, total, True)
    same(total, expected)


def grouped_products(counts: Sequence[int], n: int, k: int, b_kind: str) -> None:
    rows = sum(counts)
    a, b = operand((rows, k), "tiles"), operand((len(counts), n, k), b_kind, seed=1)
    found = torch.empty(rows, n, dtype=torch.bfloat16)
    product.grouped(a, b, counts, found)
    same(found, Reference().grouped(a, b, counts, out_dtype=torch.bfloat16))


def products_along_k(counts: Sequence[int], m: int, n: int) -> None:
    padded = sum(map(tiles_in, counts)) * TILE
    a, b = operand((m, padded), "tiles"), operand((n, padded), "tiles", seed=1)
    total = torch.randn(len(counts), m, n, generator=torch.Generator().manual_seed(2))
    expected = Reference().grouped_along_k(a, b, counts, accumulate=total.clone())
    product.grouped_along_k(a, b, counts, total)
    same(total, expected)


@contextmanager
def tuned(chosen: int) -> Iterator[Any]:
    """Within, products are tuned as on a GPU, by times after which configuration `chosen` is taken.

    Yields the tuner.
    """
    tuner, original = product._tuned_kernel, product._kernel_and_blocks
    trials = iter(())

    def fits(*args: Any, **kwargs: Any) -> list[Any]:
        nonlocal trials
        found = product._that_fit(*args, **kwargs)
        trials = iter(found)
        return found

    def time(launch: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
        if next(trials) is not product.CONFIGS[chosen]:
            return [1.0]
        launch()  # repeatedly: a result that is added to must not keep it
        launch()
        return [0.0]

    product._kernel_and_blocks = lambda: (tuner, {})
    tuner.do_bench, tuner.early_config_prune = time, fits
    tuner.cache.clear()
    try:
        yield tuner
    finally:
        product._kernel_and_blocks = original


def products_of_a_configuration(chosen: int) -> None:
    """Each product once with the configuration, but where it does not fit."""
    with tuned(chosen) as tuner:
        dense_products(70, 200, 160, "tiles", "blocks")
        grouped_products([3, 0, 130], 140, 160, "blocks")
        products_along_k([3, 0, 130], 70, 140)
        fitting = list(tuner.cache.values())
    is_whole = product.CONFIGS[chosen].kwargs["HALVES"] == 1
    taken = [config is product.CONFIGS[chosen] for config in fitting]
    assert all(taken) if is_whole else sum(taken) == len(taken) - 1, "not what was to be tried"


def counts_and_tuning() -> None:
    """Groups of other sizes are no reason to tune anew."""
    with tuned(1) as tuner:
        for counts in ([3, 0, 130], [128, 5, 0], [0, 0, 1]):
            grouped_products(counts, 8, 160, "blocks")
        assert len(tuner.cache) == 1, f"grouped: {list(tuner.cache)}"
        tuner.cache.clear()
        for counts in ([3, 0, 130], [128, 5, 0], [0, 0, 1]):
            products_along_k(counts, 8, 8)
        assert len(tuner.cache) == 1, f"grouped_along_k: {list(tuner.cache)}"
