"""Backends by name, what `auto` takes, and what GPU libraries are handed, over fakes of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterflow.fp8 import (
    E4M3,
    E5M2,
    Quantized,
    grouped_matmul,
    grouped_matmul_along_k,
    kernels,
    quantize_blocks,
    quantize_columns,
    quantize_tensor,
    quantize_tiles,
    scaled_matmul,
)
from counterflow.fp8.products import BACKENDS, Product, backend, choice, choose
from counterflow.fp8.products import cublas as cublas_module
from counterflow.fp8.products import deep_gemm as deep_gemm_module
from counterflow.fp8.products import transformer_engine as te_module
from counterflow.fp8.products import triton as triton_module
from counterflow.fp8.products.cublas import Cublas, arguments
from counterflow.fp8.products.deep_gemm import DeepGemm, aligned_rows
from counterflow.fp8.products.transformer_engine import TransformerEngine
from tests import fake_deep_gemm, fake_transformer_engine
from tests.fp8.operands import QUANTISERS

GPU_MODULES = (cublas_module, deep_gemm_module, te_module)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """What was found out about installed libraries is forgotten before and after a test."""

    def forget() -> None:
        deep_gemm_module._why_no_library.cache_clear()
        te_module._why_no_library.cache_clear()
        choice._said.clear()

    forget()
    yield
    forget()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors pass for those of a Hopper GPU."""
    for module in GPU_MODULES:
        monkeypatch.setattr(module, "why_no_gpu", lambda: None)
        monkeypatch.setattr(module, "why_not_hopper", lambda device: None)


def dense(m: int = 16, n: int = 128, k: int = 256, **options: Any) -> Product:
    torch.manual_seed(0)
    a, b = quantize_tiles(torch.randn(m, k)), quantize_blocks(torch.randn(n, k))
    given = {"out_dtype": torch.bfloat16, "accumulate": None, **options}
    return Product("dense", a, b, (), **given)


def test_every_name_is_served_or_says_what_is_missing_and_how_to_get_it() -> None:
    remedies = {
        "cublas": "CUDA 12.9",
        "deep_gemm": "DeepGEMM cannot be imported.*pip install",
        "transformer_engine": r"Transformer Engine cannot be imported.*counterflow\[te\]",
        "triton": r"Triton cannot be imported.*counterflow\[gpu\]",
    }
    for name in BACKENDS:
        missing = backend("reference").missing() if name == "auto" else None
        if name in remedies:
            missing = choice._CLASSES[name]().missing()
        if missing is None:
            assert backend(name).name == name
            continue
        with pytest.raises(ValueError, match=f"{name!r} cannot be used here: .*{remedies[name]}"):
            backend(name)


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match="no FP8 product backend 'cutlass'; choose from auto, ref"):
        scaled_matmul(dense().a, dense().b, backend="cutlass")


def test_auto_on_a_cpu_is_the_reference_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    product = dense()
    with caplog.at_level(logging.INFO, logger="counterflow.fp8"):
        found = [scaled_matmul(product.a, product.b) for _ in range(3)]
    assert torch.equal(found[0], scaled_matmul(product.a, product.b, backend="reference"))
    assert [record.getMessage() for record in caplog.records] == [
        "FP8 dense products on cpu: backend reference (on cpu the reference computes)"
    ]


def test_auto_says_its_choice_once_for_all_sizes(
    monkeypatch: pytest.MonkeyPatch, hopper: None, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choice.Reference, "_compute", lambda self, product: product.nothing())
    with on_a_gpu(monkeypatch, "cublas"), caplog.at_level(logging.INFO, "counterflow.fp8"):
        for k in (250, 251, 252):  # each a reason of its own to pass cuBLAS over
            choice.Auto().run(dense(k=k))
    (message,) = (record.getMessage() for record in caplog.records)
    assert "backend reference" in message
    assert "K = 250" in message


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        ((8, 0), None, "capability 8.9 or higher, and cuda:0 has 8.0"),
        ((9, 4), "6.0", "NVIDIA"),
        ((8, 9), None, None),
        ((9, 0), None, None),
    ],
)
def test_kernels_are_left_out_on_gpus_for_which_they_do_not_compile(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(kernels, "why_no_triton", lambda: None)
    monkeypatch.setattr(kernels.importlib, "import_module", lambda *_: kernels)
    device = torch.device("cuda", 0)
    kernels.why_no_fp8.cache_clear()
    there: Any = SimpleNamespace(is_cuda=True, device=device)
    assert (kernels.kernels_for(there) is None) == (reason is not None)
    product = dense()
    monkeypatch.setattr(Product, "device", device)
    found = choice.Triton().why_not(product)
    kernels.why_no_fp8.cache_clear()
    if capability == (8, 9):
        assert "capability 9.0 or higher" in str(found)
    else:
        assert (found is None) == (reason is None)
        assert reason is None or reason in str(found)


def test_a_gpu_backend_refuses_operands_on_a_cpu() -> None:
    with fake_deep_gemm.installed():
        assert "operands are on cpu" in str(DeepGemm().why_not(dense()))
    assert "operands are on cpu" in str(Cublas().why_not(dense()))
    with fake_transformer_engine.installed():
        assert "operands are on cpu" in str(TransformerEngine().why_not(dense()))


@contextmanager
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, *there: str) -> Iterator[None]:
    """Within, operands count as on a Hopper GPU where these backends are installed."""
    with monkeypatch.context() as patch:
        patch.setattr(Product, "device", torch.device("cuda", 0))
        for name, kind in choice._CLASSES.items():
            if name not in ("reference", "emulation"):
                missing = None if name in there else f"no {name} here"
                patch.setattr(kind, "missing", lambda _, missing=missing: missing)
        patch.setattr(choice.Triton, "why_not", lambda *_: None)
        yield


def test_auto_on_a_gpu_takes_the_first_that_is_there_and_fits(
    monkeypatch: pytest.MonkeyPatch, hopper: None
) -> None:
    torch.manual_seed(0)
    fits, odd = dense(), dense(k=250)
    tiles = quantize_tiles(torch.randn(8, 256))
    grouped = [
        Product("grouped", tiles, quantise(torch.randn(2, 128, 256)), (4, 4), dtype, None)
        for quantise, dtype in (
            (quantize_blocks, torch.bfloat16),
            (quantize_blocks, torch.float32),
            (quantize_tiles, torch.bfloat16),
        )
    ]

    def chosen(product: Product, *there: str) -> str:
        with on_a_gpu(monkeypatch, *there):
            return choose(product)[0].name

    assert chosen(fits, "deep_gemm", "cublas", "triton") == "deep_gemm"
    assert chosen(fits, "cublas", "triton") == "cublas"
    assert chosen(fits, "transformer_engine", "triton") == "triton"
    assert chosen(odd, "deep_gemm", "cublas", "triton") == "triton"
    assert chosen(odd, "deep_gemm", "cublas") == "reference"
    assert [chosen(p, "deep_gemm", "cublas", "triton") for p in grouped] == [
        "deep_gemm",
        "triton",
        "triton",
    ]
    with on_a_gpu(monkeypatch, "cublas", "triton"):
        assert choose(odd)[1] == (
            "not deep_gemm: no deep_gemm here; not cublas: sizes must be multiples: K = 250 "
            "(of 16); pad them, or take backend='triton'"
        )


def scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor,
    scale_recipe_a: Any,
    scale_b: Tensor,
    scale_recipe_b: Any,
    output_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """torch's, by the rules of its CUDA implementation, computed with the reference."""
    (m, k), n = mat_a.shape, mat_b.shape[1]
    assert mat_a.stride() == (k, 1)
    assert mat_b.stride() == (1, k)
    assert k % 16 == n % 16 == 0
    kinds = F.ScalingType
    assert (scale_recipe_a, scale_recipe_b) in [
        (kinds.BlockWise1x128, kinds.BlockWise128x128),
        (kinds.BlockWise128x128, kinds.BlockWise1x128),
        (kinds.BlockWise1x128, kinds.BlockWise1x128),
    ]
    tiles = -(-k // 128)

    def logical(scales: Tensor, rows: int, kind: Any) -> Tensor:
        if kind == kinds.BlockWise1x128:
            shape = (rows, tiles)
        else:
            shape = (tiles + -tiles % 4, -(-rows // 128))
        assert scales.dtype == torch.float32
        assert tuple(scales.shape) == shape
        assert scales.stride(0) == 1
        assert scales.stride(1) == shape[0] or (shape[1] == 1 and scales.stride(1) == 1)
        return scales if kind == kinds.BlockWise1x128 else scales[:tiles].t()

    return scaled_matmul(
        Quantized(mat_a, logical(scale_a, m, scale_recipe_a)),
        Quantized(mat_b.t(), logical(scale_b, n, scale_recipe_b)),
        out_dtype=output_dtype,
        backend="reference",
    )


@pytest.mark.parametrize("layout_a", list(QUANTISERS))
@pytest.mark.parametrize("layout_b", list(QUANTISERS))
@pytest.mark.parametrize("sizes", [(8, 16, 16), (136, 272, 656), (256, 128, 1024)])
def test_cublas_gets_what_its_rules_ask_for(
    layout_a: str,
    layout_b: str,
    sizes: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
    hopper: None,
) -> None:
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    monkeypatch.setattr(Cublas, "missing", lambda self: None)
    m, n, k = sizes
    torch.manual_seed(0)
    a, b = QUANTISERS[layout_a](torch.randn(m, k)), QUANTISERS[layout_b](torch.randn(n, k))
    before = torch.randn(m, n)
    into = before.clone()
    assert torch.equal(Cublas().matmul(a, b), scaled_matmul(a, b))
    assert Cublas().matmul(a, b, accumulate=into) is into
    assert torch.equal(into, before + scaled_matmul(a, b, out_dtype=torch.float32))
    if layout_b != "tiles":
        transposed = Quantized(b.values.mT.contiguous(), b.scales.mT.contiguous()).mT
        assert torch.equal(Cublas().matmul(a, transposed), scaled_matmul(a, b))


@pytest.mark.parametrize("layout_a", list(QUANTISERS))
@pytest.mark.parametrize("layout_b", list(QUANTISERS))
@pytest.mark.parametrize("sizes", [(256, 128, 1024), (128, 384, 640), (128, 128, 128)])
def test_torch_takes_the_layouts_made_for_cublas(
    layout_a: str, layout_b: str, sizes: tuple[int, int, int]
) -> None:
    # torch's own shape function checks strides and paddings, without a GPU.
    m, n, k = sizes
    a, b = QUANTISERS[layout_a](torch.ones(m, k)), QUANTISERS[layout_b](torch.ones(n, k))

    def there(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    found = F.scaled_mm(*(there(x) for x in arguments(a, b)), output_dtype=torch.float32)
    assert found.shape == (m, n)
    wrong = arguments(a, b)._replace(scales_a=torch.ones(m, -(-k // 128) + 1))
    with pytest.raises((RuntimeError, ValueError)):
        F.scaled_mm(*(there(x) for x in wrong), output_dtype=torch.float32)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: dense(m=12), r"M = 12 \(of 8\)"),
        (lambda: dense(n=24), r"N = 24 \(of 16\)"),
        (lambda: dense(k=200), r"K = 200 \(of 16\)"),
        (
            lambda: Product(
                "dense",
                quantize_tiles(torch.ones(16, 128), dtype=E5M2),
                quantize_tiles(torch.ones(16, 128), dtype=E5M2),
                (),
                torch.bfloat16,
                None,
            ),
            "E5M2 by E5M2",
        ),
    ],
)
@pytest.mark.parametrize("kind", [Cublas, TransformerEngine])
def test_cublas_says_what_it_cannot_multiply(
    kind: type[Cublas | TransformerEngine],
    make: Callable[[], Product],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    hopper: None,
) -> None:
    monkeypatch.setattr(kind, "missing", lambda self: None)
    product = make()
    if kind is TransformerEngine and "N = 24" in reason:  # which it can
        assert kind().why_not(product) is None
        return
    with pytest.raises(ValueError, match=f"{kind.name!r} cannot compute this product: .*{reason}"):
        kind().run(product)


@pytest.fixture(params=["2.6", "2.1"])
def deep_gemm(request: pytest.FixtureRequest, hopper: None) -> Iterator[list[str]]:
    with fake_deep_gemm.installed(request.param) as calls:
        yield calls


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(37, 200, 384), (1, 8, 128)])
@pytest.mark.parametrize("layout_a", list(QUANTISERS))
@pytest.mark.parametrize("layout_b", list(QUANTISERS))
def test_deep_gemm_computes_dense_products(
    deep_gemm: list[str],
    layout_a: str,
    layout_b: str,
    sizes: tuple[int, int, int],
    out_dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    m, n, k = sizes
    a, b = QUANTISERS[layout_a](torch.randn(m, k)), QUANTISERS[layout_b](torch.randn(n, k))
    found = scaled_matmul(a, b, out_dtype=out_dtype, backend="deep_gemm")
    assert torch.equal(found, scaled_matmul(a, b, out_dtype=out_dtype))
    assert deep_gemm == ["fp8_gemm_nt"]


def test_deep_gemm_turns_transposed_weights_around(deep_gemm: list[str]) -> None:
    torch.manual_seed(0)
    g, w = quantize_tiles(torch.randn(37, 256)), quantize_blocks(torch.randn(256, 384))
    assert torch.equal(scaled_matmul(g, w.mT, backend="deep_gemm"), scaled_matmul(g, w.mT))
    several = quantize_blocks(torch.randn(2, 256, 384))
    counts = [20, 17]
    found = grouped_matmul(g, several.mT, counts, backend="deep_gemm")
    assert torch.equal(found, grouped_matmul(g, several.mT, counts))
    assert deep_gemm == ["fp8_gemm_nt", "m_grouped_fp8_gemm_nt_contiguous"]


def test_deep_gemm_accumulates_into_float32(deep_gemm: list[str]) -> None:
    torch.manual_seed(0)
    a, b = quantize_columns(torch.randn(300, 64)), quantize_columns(torch.randn(300, 136))
    before = torch.randn(64, 136)
    into, expected = before.clone(), before.clone()
    assert scaled_matmul(a, b, accumulate=into, backend="deep_gemm") is into
    assert torch.equal(into, scaled_matmul(a, b, accumulate=expected))


@pytest.mark.parametrize(
    "counts", [[128, 256, 128], [100, 0, 130, 1], [0, 0, 5], [128, 0, 128], [7]], ids=str
)
def test_deep_gemm_computes_grouped_products_of_any_counts(
    deep_gemm: list[str], counts: list[int]
) -> None:
    torch.manual_seed(0)
    a = quantize_tiles(torch.randn(sum(counts), 256))
    b = quantize_blocks(torch.randn(len(counts), 136, 256))
    found = grouped_matmul(a, b, counts, backend="deep_gemm")
    assert torch.equal(found, grouped_matmul(a, b, counts))
    assert deep_gemm.count("m_grouped_fp8_gemm_nt_contiguous") == 1


def test_rows_of_groups_are_aligned_as_deep_gemm_asks(hopper: None) -> None:
    with fake_deep_gemm.installed(alignment=256):
        a = quantize_tiles(torch.randn(150, 256))
        b = quantize_blocks(torch.randn(2, 128, 256))
        found = grouped_matmul(a, b, [20, 130], backend="deep_gemm")
        assert torch.equal(found, grouped_matmul(a, b, [20, 130]))
    groups, source, target = aligned_rows([2, 0, 3], 4)
    assert groups.tolist() == [0, 0, -1, -1, 2, 2, 2, -1]
    assert source is not None
    assert target is not None
    assert target.tolist() == [0, 1, 4, 5, 6]
    assert source[target].tolist() == [0, 1, 2, 3, 4]
    assert aligned_rows([4, 0, 8], 4)[1:] == (None, None)


@pytest.mark.parametrize("counts", [[128, 256], [100, 0, 130, 1], [0, 5], [7]], ids=str)
def test_deep_gemm_computes_products_grouped_along_k(
    deep_gemm: list[str], counts: list[int]
) -> None:
    torch.manual_seed(0)
    a = quantize_columns(torch.randn(sum(counts), 128), counts)
    b = quantize_columns(torch.randn(sum(counts), 256), counts)
    before = torch.randn(len(counts), 128, 256)
    into, expected = before.clone(), before.clone()
    assert grouped_matmul_along_k(a, b, counts, accumulate=into, backend="deep_gemm") is into
    assert torch.equal(into, grouped_matmul_along_k(a, b, counts, accumulate=expected))
    assert deep_gemm == ["k_grouped_fp8_gemm_nt_contiguous"]


def test_deep_gemm_says_what_it_cannot_multiply(deep_gemm: list[str]) -> None:
    x = torch.ones(16, 256)
    a, b = quantize_tiles(x), quantize_blocks(torch.ones(2, 128, 256))
    one = Quantized(b.values[0], b.scales[0])
    strided = torch.zeros(16, 256)[:, ::2]
    columns = quantize_columns(torch.ones(10, 64), [10])
    calls: dict[str, Callable[[], Any]] = {
        "float8_e4m3fn, got torch.float8_e5m2": lambda: scaled_matmul(
            quantize_tiles(x, dtype=E5M2), one, backend="deep_gemm"
        ),
        r"K = 64 \(of 128\)": lambda: scaled_matmul(
            quantize_tiles(x[:, :64]), quantize_tiles(x[:, :64]), backend="deep_gemm"
        ),
        r"N = 3 \(of 8\)": lambda: scaled_matmul(a, quantize_tiles(x[:3]), backend="deep_gemm"),
        "writes bfloat16, not torch.float32": lambda: grouped_matmul(
            a, b, [8, 8], out_dtype=torch.float32, backend="deep_gemm"
        ),
        "b in blocks of 128x128": lambda: grouped_matmul(
            a, quantize_tiles(torch.ones(2, 128, 256)), [8, 8], backend="deep_gemm"
        ),
        "into a contiguous tensor": lambda: scaled_matmul(
            a, one, accumulate=strided, backend="deep_gemm"
        ),
        r"M = 64 \(of 128\), N = 64 \(of 128\)": lambda: grouped_matmul_along_k(
            columns, columns, [10], accumulate=torch.zeros(1, 64, 64), backend="deep_gemm"
        ),
    }
    for reason, call in calls.items():
        with pytest.raises(
            ValueError, match=f"'deep_gemm' cannot compute this product: .*{reason}"
        ):
            call()
    assert not deep_gemm


def test_an_older_deep_gemm_is_named(hopper: None) -> None:
    with (
        fake_deep_gemm.installed("1.0"),
        pytest.raises(ValueError, match=r"installed has no fp8_gemm_nt, .*version 2\.1 or newer"),
    ):
        backend("deep_gemm")


def test_a_kernel_that_does_not_compile_is_told_with_the_remedy(
    deep_gemm: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("NVCC compilation failed")

    monkeypatch.setattr("deep_gemm.fp8_gemm_nt", fails)
    with pytest.raises(RuntimeError, match=r"failed: NVCC compilation failed; if it is.*CUDA_HOME"):
        scaled_matmul(dense().a, dense().b, backend="deep_gemm")


@pytest.fixture
def te(hopper: None) -> Iterator[list[str]]:
    with fake_transformer_engine.installed() as calls:
        yield calls


@pytest.mark.parametrize("sizes", [(8, 8, 16), (136, 272, 656)])
@pytest.mark.parametrize("layout_a", list(QUANTISERS))
@pytest.mark.parametrize("layout_b", list(QUANTISERS))
def test_transformer_engine_computes_dense_products(
    te: list[str], layout_a: str, layout_b: str, sizes: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    m, n, k = sizes
    a = QUANTISERS[layout_a](torch.randn(m, k))
    b = QUANTISERS[layout_b](torch.randn(n, k), dtype=E5M2)
    for out_dtype in (torch.bfloat16, torch.float32):
        found = scaled_matmul(a, b, out_dtype=out_dtype, backend="transformer_engine")
        assert torch.equal(found, scaled_matmul(a, b, out_dtype=out_dtype))
    before = torch.randn(m, n)
    into, expected = before.clone(), before.clone()
    assert scaled_matmul(a, b, accumulate=into, backend="transformer_engine") is into
    assert torch.equal(into, scaled_matmul(a, b, accumulate=expected))
    assert te == ["TN"] * 3


def test_transformer_engine_reads_transposed_weights(te: list[str]) -> None:
    torch.manual_seed(0)
    g, w = quantize_tiles(torch.randn(40, 256)), quantize_blocks(torch.randn(256, 384))
    found = scaled_matmul(g, w.mT, backend="transformer_engine")
    assert torch.equal(found, scaled_matmul(g, w.mT))


def test_transformer_engine_leaves_grouped_products_to_others(te: list[str]) -> None:
    a, b = quantize_tiles(torch.ones(8, 128)), quantize_tensor(torch.ones(1, 8, 128))
    with pytest.raises(ValueError, match="serves dense products; take backend='deep_gemm'"):
        grouped_matmul(a, b, [8], backend="transformer_engine")


def test_an_older_transformer_engine_is_named(hopper: None) -> None:
    with (
        fake_transformer_engine.installed("2.8"),
        pytest.raises(ValueError, match=r"installed is older.*2\.12 or newer"),
    ):
        backend("transformer_engine")


class FakeKernels:
    """The Triton kernels' signatures, computed with the reference into what they are given."""

    @staticmethod
    def matmul(a: Quantized, b: Quantized, out: Tensor, accumulate: bool) -> None:
        found = scaled_matmul(a, b, out_dtype=out.dtype)
        out.copy_(out + found if accumulate else found)

    @staticmethod
    def grouped(a: Quantized, b: Quantized, counts: Sequence[int], out: Tensor) -> None:
        out.copy_(grouped_matmul(a, b, counts, out_dtype=out.dtype))

    @staticmethod
    def grouped_along_k(
        a: Quantized, b: Quantized, counts: Sequence[int], accumulate: Tensor
    ) -> None:
        assert accumulate.is_contiguous()
        grouped_matmul_along_k(a, b, counts, accumulate=accumulate)


def test_triton_gets_a_tensor_to_write_or_to_add_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_module, "_kernels", lambda: FakeKernels)
    monkeypatch.setattr(triton_module, "_interpreted", lambda: True)
    monkeypatch.setattr(choice.Triton, "missing", lambda self: None)
    product, counts = dense(), [10, 0, 6]
    a, b = product.a, product.b
    for dtype in (torch.bfloat16, torch.float32):
        found = scaled_matmul(a, b, out_dtype=dtype, backend="triton")
        assert found.dtype == dtype
        assert torch.equal(found, scaled_matmul(a, b, out_dtype=dtype))
    into, expected = torch.ones(16, 128), torch.ones(16, 128)
    assert scaled_matmul(a, b, accumulate=into, backend="triton") is into
    assert torch.equal(into, scaled_matmul(a, b, accumulate=expected))
    several = quantize_blocks(torch.randn(3, 128, 256))
    found = grouped_matmul(a, several, counts, backend="triton")
    assert torch.equal(found, grouped_matmul(a, several, counts))
    columns = quantize_columns(torch.randn(16, 8), counts)
    into, expected = torch.ones(3, 8, 8), torch.ones(3, 8, 8)
    assert (
        grouped_matmul_along_k(columns, columns, counts, accumulate=into, backend="triton") is into
    )
    grouped_matmul_along_k(columns, columns, counts, accumulate=expected)
    assert torch.equal(into, expected)
    with pytest.raises(ValueError, match="accumulates into a contiguous tensor"):
        scaled_matmul(a, b, accumulate=torch.ones(128, 16).t(), backend="triton")
    monkeypatch.setattr(triton_module, "_interpreted", lambda: False)
    with pytest.raises(ValueError, match="run on a GPU, and the operands are on cpu"):
        scaled_matmul(a, b, backend="triton")


def test_a_library_that_breaks_on_import_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    for name in ("deep_gemm", "transformer_engine"):
        (tmp_path / f"{name}.py").write_text("raise OSError('libcudart.so.12 not found')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("deep_gemm", "transformer_engine"):
        with pytest.raises(ValueError, match=f"{name!r} cannot be used.*libcudart.*pip install"):
            backend(name)
    assert quantize_tiles(torch.ones(2, 2)).values.dtype == E4M3
