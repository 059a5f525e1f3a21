"""FP8 on a real GPU: kernels have the references' bits, and every backend its products."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from counterflow.fp8 import Quantized, quantize_blocks, quantize_columns, quantize_tiles
from counterflow.fp8.formats import TILE, padded_rows, tiles_in
from counterflow.fp8.products import BACKENDS, Backend, backend
from counterflow.fp8.products.base import Kind
from counterflow.fp8.products.reference import Reference

pytest.importorskip("triton", reason="needs Triton")

# Hopper's tensor cores keep 13 bits behind the point of the largest of 32 products that they add
# (arXiv 2412.19437, section 3.3.2, and 2505.09343): a partial sum over 128 takes four such steps,
# each off by 2**-13 of its largest magnitude or so. Then one rounding to bfloat16.
OF_MAGNITUDES, OF_RESULT = 4 * 2.0**-13, 2.0**-8

# What each backend documents that it computes, at sizes that are multiples of 128.
SERVES = {
    "cublas": {"dense"},
    "deep_gemm": {"dense", "grouped", "grouped_along_k"},
    "transformer_engine": {"dense"},
    "triton": {"dense", "grouped", "grouped_along_k"},
}
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="backends of products are for Hopper",
)


def on_gpu(q: Quantized) -> Quantized:
    return Quantized(q.values.cuda(), q.scales.cuda())


def magnitudes(q: Quantized) -> Quantized:
    return Quantized(q.values.float().abs().to(q.values.dtype), q.scales)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
@pytest.mark.parametrize("power_of_two", [True, False], ids=["power_of_two", "float32"])
@pytest.mark.parametrize("columns", [1, 129, 1024])
def test_quantisers_have_the_references_bits(
    dtype: str, form: str, power_of_two: bool, columns: int
) -> None:
    import tests.cases_fp8_kernels as cases

    cases.quantise_numbers(1300, columns, dtype, form, power_of_two, [1, 0, 299, 1000])


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_every_number_of_sixteen_bits_and_every_code(form: str) -> None:
    import tests.cases_fp8_kernels as cases

    for dtype in ("bfloat16", "float16"):
        cases.quantise_every_half(dtype, form)
    for power_of_two in (True, False):
        cases.transpose_every_code(form, power_of_two)
    cases.shapes_that_are_kept()


@pytest.mark.parametrize("inner", [1, 200, 1024])
@pytest.mark.parametrize("stored", ["", "e4m3"])
@pytest.mark.parametrize("weighted", [True, False])
def test_swiglu_has_the_references_bits(inner: int, stored: str, weighted: bool) -> None:
    import tests.cases_fp8_kernels as cases

    for rows, counts in ((1300, [1, 0, 299, 1000]), (1301, None)):
        for dtype in ("bfloat16", "float32"):
            cases.swiglus(rows, inner, dtype, stored, weighted, counts)
    cases.swiglu_of_every_gate()


def serving(kind: Kind) -> list[Backend]:
    """Every backend that is installed here and documents this kind of product."""
    found: list[Backend] = []
    for name in BACKENDS:
        if kind not in SERVES.get(name, set()):
            continue
        try:
            found.append(backend(name))
        except ValueError:  # not installed
            assert name != "triton"
    return found


def close(found: Tensor, expected: Tensor, sizes: Tensor) -> None:
    """Within what tensor cores lose, of sums of magnitudes, and a rounding to bfloat16."""
    expected = expected.float()
    error = (found.float().cpu() - expected).abs()
    allowed = OF_MAGNITUDES * sizes.float() + OF_RESULT * expected.abs()
    assert bool((error <= allowed).all()), float((error - allowed).max())


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@hopper
@pytest.mark.parametrize("shape", [(256, 384, 1024), (128, 256, 4096)], ids=str)
def test_every_backend_has_the_references_dense_product(shape: Sequence[int]) -> None:
    m, n, k = shape
    x, w = random(m, k, seed=0), random(n, k, seed=1)
    # Outliers take bits from their tiles. They meet zeros, or else they would be all of the sums.
    x[:, ::77] *= 1000
    w[:, ::77] = 0
    a, b = quantize_tiles(x), quantize_blocks(w)
    expected = Reference().matmul(a, b)
    sizes = Reference().matmul(magnitudes(a), magnitudes(b), out_dtype=torch.float32)
    for by in serving("dense"):
        close(by.matmul(on_gpu(a), on_gpu(b)), expected, sizes)


@hopper
@pytest.mark.parametrize("shape", [(256, 384, 1024), (128, 128, 128)], ids=str)
def test_every_backend_has_the_references_bits_where_sums_are_exact(shape: Sequence[int]) -> None:
    import tests.cases_fp8_kernels as cases

    # Products of small integers fit in the tensor cores' bits: nothing is cut off.
    m, n, k = shape
    a, b = cases.operand((m, k), "tiles"), cases.operand((n, k), "blocks", seed=1)
    total = torch.randn(m, n, generator=torch.Generator().manual_seed(2))
    for by in serving("dense"):
        for dtype in (torch.bfloat16, torch.float32):
            found = by.matmul(on_gpu(a), on_gpu(b), out_dtype=dtype)
            cases.same(found, Reference().matmul(a, b, out_dtype=dtype))
        found = by.matmul(on_gpu(a), on_gpu(b), accumulate=total.cuda())
        cases.same(found, Reference().matmul(a, b, accumulate=total.clone()))


@hopper
@pytest.mark.parametrize("counts", [[1, 0, 299, 128], [128, 256]], ids=str)
def test_every_backend_has_the_references_bits_of_exact_sums_of_groups(counts: list[int]) -> None:
    import tests.cases_fp8_kernels as cases

    n, k, groups = 384, 512, len(counts)
    a = cases.operand((sum(counts), k), "tiles")
    b = cases.operand((groups, n, k), "blocks", seed=1)
    for by in serving("grouped"):
        found = by.grouped(on_gpu(a), on_gpu(b), counts)
        cases.same(found, Reference().grouped(a, b, counts))
    padded = padded_rows(counts)
    across = cases.operand((n, padded), "tiles", seed=2)
    along = cases.operand((k, padded), "tiles", seed=3)
    total = torch.randn(groups, n, k, generator=torch.Generator().manual_seed(4))
    added = Reference().grouped_along_k(across, along, counts, accumulate=total.clone())
    for by in serving("grouped_along_k"):
        into = total.cuda()
        by.grouped_along_k(on_gpu(across), on_gpu(along), counts, accumulate=into)
        cases.same(into, added)


@hopper
@pytest.mark.parametrize("b_kind", ["tiles", "blocks", "tensor"])
@pytest.mark.parametrize("a_kind", ["tiles", "blocks", "tensor"])
def test_triton_serves_every_layout_and_size(a_kind: str, b_kind: str) -> None:
    import tests.cases_fp8_kernels as cases

    for m, n, k in ((1, 1, 1), (1, 128, 128), (128, 1, 128), (130, 129, 300), (300, 260, 512)):
        a, b = cases.operand((m, k), a_kind), cases.operand((n, k), b_kind, "e5m2", seed=1)
        expected = Reference().matmul(a, b)
        there = on_gpu(a), on_gpu(b)
        cases.same(backend("triton").matmul(*there), expected)
        cases.same(backend("triton").matmul(*map(cases.turned, there)), expected)


@hopper
def test_every_backend_has_the_references_grouped_products() -> None:
    counts, n, k = [1, 0, 299, 128], 384, 512
    x, w = random(sum(counts), k, seed=2), random(len(counts), n, k, seed=3)
    grad = random(sum(counts), n, seed=4)
    # Outliers meet zeros: those of x in its columns those of w, those of grad in its rows x's.
    x[:, ::77] *= 1000
    w[..., ::77] = 0
    grad[5::77] *= 1000
    x[5::77] = 0
    a, b = quantize_tiles(x), quantize_blocks(w)
    expected = Reference().grouped(a, b, counts)
    sizes = Reference().grouped(magnitudes(a), magnitudes(b), counts, out_dtype=torch.float32)
    for by in serving("grouped"):
        close(by.grouped(on_gpu(a), on_gpu(b), counts), expected, sizes)
    across, along = quantize_columns(grad, counts), quantize_columns(x, counts)
    zero = torch.zeros(len(counts), n, k)
    added = Reference().grouped_along_k(across, along, counts, accumulate=zero.clone())
    sizes = Reference().grouped_along_k(
        magnitudes(across), magnitudes(along), counts, accumulate=zero.clone()
    )
    for by in serving("grouped_along_k"):
        into = zero.cuda()
        by.grouped_along_k(on_gpu(across), on_gpu(along), counts, accumulate=into)
        close(into, added, sizes)


def test_the_tables_of_groups_do_not_wait_for_the_device() -> None:
    from counterflow.fp8.kernels.numbers import group_tiles

    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    table = group_tiles([5, 0, 300], device)
    assert not torch.cuda.current_stream().query(), "the host went on while the device was busy"
    assert table.shape == (2, 1 + sum(map(tiles_in, [0, 300])))
    assert table.tolist() == [[0, 5, 5 + TILE, 5 + 2 * TILE], [5, 5 + TILE, 5 + 2 * TILE, 305]]
