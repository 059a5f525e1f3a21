"""FP8 on this machine's GPU: quantising kernels beside a copy, products beside cuBLAS and DeepGEMM.

    python -m bench.fp8_kernels [--repeats 20] [--only kernels|products]   # --only writes nothing
    python -m bench.fp8_kernels --tiny     # on a CPU: each case once, at small sizes; no result

Shapes are DeepSeek-V3's. All times of a comparison come from one run whose candidates take turns,
and are medians of the GPU's own: the host runs ahead of it, and caches are cold. A kernel's bytes
are what it must read and write at least, once each. Results: bench/results/fp8_kernels.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from typing import Any

import torch
from torch import Tensor

from counterflow.fp8 import (
    Quantized,
    quantize_blocks,
    quantize_both,
    quantize_columns,
    quantize_tiles,
    swiglu_reference,
    transpose_tiles,
)
from counterflow.fp8.kernels import kernels_for
from counterflow.fp8.products import BACKENDS, Backend, backend

from .machine import write_result

COMPARED = ("cublas", "deep_gemm")
HIDDEN, INNER = 7168, 2048
# (N, K) of MLA's projections, the dense MLP's halves taken together, and an expert's two products.
DENSE = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
GROUPED = ((4096, 7168), (7168, 2048))
# What share of the rows each of eight experts gets.
SHARES = (0.02, 0.05, 0.08, 0.1, 0.13, 0.17, 0.2, 0.25)
CHANGING = "grouped wgrad, changing"  # as routings do, from one call to the next
FLUSH_BYTES = 1 << 28  # several times what a second-level cache holds
SPIN_CYCLES = 2_000_000  # about 1 ms, in which the host starts what is to be timed


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        name: what it is.
        work: bytes or FLOPs.
        run: does it.
    """

    name: str
    work: float
    run: Callable[[], object]


def interleaved_ms(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median time of each on the GPU, ms; they take turns, after three rounds that do not count."""
    for run in [*runs] * 3:
        run()
    flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, found in zip(runs, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flushed.zero_()
            torch.cuda._sleep(SPIN_CYCLES)
            begin.record()
            run()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end))
    return [statistics.median(found) for found in times]


def uneven(rows: int) -> list[int]:
    """Rows of eight experts."""
    ends = [0, *(round(rows * sum(SHARES[: i + 1])) for i in range(len(SHARES)))]
    return [b - a for a, b in pairwise(ends)]


def nbytes(*tensors: object) -> int:
    """Bytes of tensors, quantised or not, and of what tuples hold."""
    total = 0
    for t in tensors:
        if isinstance(t, Quantized | Tensor):
            total += t.nbytes() if isinstance(t, Quantized) else t.nbytes
        elif isinstance(t, tuple | list):
            total += nbytes(*t)
    return total


def kernel_cases(rows: int, hidden: int, inner: int, device: str) -> list[Case]:
    """Every quantising kernel, with the bytes of its operands and of its result."""
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device, dtype=torch.bfloat16)

    x, weight = normal(rows, hidden), normal(2 * inner, hidden)
    h, grad = normal(rows, 2 * inner), normal(rows, inner)
    factors = torch.rand(rows, generator=random, device=device)
    counts = uneven(rows)
    tiles, h_tiles = quantize_tiles(x), quantize_tiles(h)
    home: Any = kernels_for(x, "swiglu") or swiglu_reference
    runs: list[tuple[str, tuple[object, ...], Callable[[], object]]] = [
        ("quantize_tiles", (x,), lambda: quantize_tiles(x)),
        ("quantize_tiles float32", (x,), lambda: quantize_tiles(x, power_of_two=False)),
        ("quantize_columns", (x,), lambda: quantize_columns(x, counts)),
        ("quantize_both", (x,), lambda: quantize_both(x, counts)),
        ("quantize_blocks", (weight,), lambda: quantize_blocks(weight)),
        ("transpose_tiles", (tiles,), lambda: transpose_tiles(tiles, counts)),
        ("swiglu", (h, factors), lambda: home.swiglu(h, factors)),
        ("swiglu_quantized", (h, factors), lambda: home.swiglu_quantized(h, factors)),
        (
            "swiglu_columns",
            (h_tiles, factors),
            lambda: home.swiglu_columns(h_tiles, factors, counts),
        ),
        (
            "swiglu_backward",
            (grad, h_tiles, factors),
            lambda: home.swiglu_backward(grad, h_tiles, factors),
        ),
        (
            "swiglu_backward_quantized",
            (grad, h_tiles, factors),
            lambda: home.swiglu_backward_quantized(grad, h_tiles, factors, counts),
        ),
    ]
    return [Case(name, nbytes(*read, run()), run) for name, read, run in runs]


def kernels(tokens: Sequence[int], repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of the first table: each kernel's bandwidth and its share of a copy's."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = Case("copy", 2 * source.nbytes, lambda: target.copy_(source))
    for rows in tokens:
        cases = [copy, *kernel_cases(rows, HIDDEN, INNER, "cuda")]
        times = interleaved_ms([case.run for case in cases], repeats)
        rates = [case.work / ms / 1e9 for case, ms in zip(cases, times, strict=True)]
        for case, ms, rate in zip(cases, times, rates, strict=True):
            yield {
                "kernel": case.name,
                "tokens": rows,
                "us": ms * 1e3,
                "tb_per_s": rate,
                "of_copy": rate / rates[0],
            }


def backends() -> list[Backend]:
    """Those that are installed; the references are no competition on a GPU."""
    found: list[Backend] = []
    for name in BACKENDS:
        if name in ("auto", "reference", "emulation"):
            continue
        try:
            found.append(backend(name))
        except ValueError as error:
            print(f"without {name}: {error}")
    return found


def changing_counts(rows: int, seed: int) -> list[int]:
    """Rows of eight experts as of one micro-batch among many, each with a routing of its own."""
    random = torch.Generator().manual_seed(seed)
    shares = torch.tensor(SHARES)[torch.randperm(len(SHARES), generator=random)]
    shares *= 0.5 + torch.rand(len(SHARES), generator=random)
    ends = [0, *(shares.cumsum(0) / shares.sum() * rows).round().int().tolist()]
    return [b - a for a, b in pairwise(ends)]


def changing_wgrad(
    rows: int, n: int, k: int, device: str, routings: int
) -> tuple[Callable[[Backend], object], Callable[[], object]]:
    """Weight gradients of experts whose counts no call of a backend shares with its last ones.

    What a backend does anew for counts it has not seen (tables, tuning, compiling) is in its times.
    """
    random = torch.Generator(device).manual_seed(1)
    grad, x = (
        torch.randn(rows, size, generator=random, device=device, dtype=torch.bfloat16)
        for size in (n, k)
    )
    every = [changing_counts(rows, seed) for seed in range(routings)]
    operands = [(quantize_columns(grad, c), quantize_columns(x, c), c) for c in every]
    into = torch.zeros(len(SHARES), n, k, device=device)
    turns: defaultdict[str, Iterator[Any]] = defaultdict(lambda: cycle(operands))

    def in_fp8(by: Backend) -> object:
        a, b, counts = next(turns[by.name])
        return by.grouped_along_k(a, b, counts, accumulate=into)

    def in_bf16() -> object:
        _, _, counts = next(turns["bf16"])
        return [g.t() @ y for g, y in zip(grad.split(counts), x.split(counts), strict=True)]

    return in_fp8, in_bf16


def product_runs(
    kind: str, rows: int, n: int, k: int, device: str
) -> tuple[Callable[[Backend], object], Callable[[], object]]:
    """A product of DeepSeek-V3's by a backend, and the same in bfloat16.

    Kinds: forward x [rows, K] @ w [N, K].T; dgrad grad [rows, N] @ w; wgrad grad.T @ x, added in
    float32. "grouped " before it has a w for each expert.
    """
    random = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device, dtype=torch.bfloat16)

    grouped, pass_name = kind.startswith("grouped"), kind.split()[-1]
    counts = uneven(rows) if grouped else [rows]
    if pass_name == "wgrad":
        grad, x = normal(rows, n), normal(rows, k)
        a, b = quantize_columns(grad, counts), quantize_columns(x, counts)
        into = torch.zeros(len(counts), n, k, device=device)

        def in_bf16() -> object:
            pairs = zip(grad.split(counts), x.split(counts), strict=True)
            return [g.t() @ y for g, y in pairs]

        if grouped:
            return (lambda by: by.grouped_along_k(a, b, counts, accumulate=into)), in_bf16
        return (lambda by: by.matmul(a, b, accumulate=into[0])), in_bf16
    out, inner = (n, k) if pass_name == "forward" else (k, n)
    x, w = normal(rows, inner), normal(len(counts), out, inner)
    a, b = quantize_tiles(x), quantize_blocks(w)

    def in_bf16_by_rows() -> object:
        return [y @ one.t() for y, one in zip(x.split(counts), w, strict=True)]

    if grouped:
        return (lambda by: by.grouped(a, b, counts)), in_bf16_by_rows
    dense = Quantized(b.values[0], b.scales[0])
    return (lambda by: by.matmul(a, dense)), in_bf16_by_rows


def product(kind: str, rows: int, n: int, k: int, repeats: int) -> dict[str, Any]:
    """A row of the second table: TFLOP/s by backend, and ratios."""
    if kind == CHANGING:
        # One call to see who serves, and three rounds that do not count.
        by_backend, in_bf16 = changing_wgrad(rows, n, k, "cuda", repeats + 4)
    else:
        by_backend, in_bf16 = product_runs(kind, rows, n, k, "cuda")
    names, runs, refused = ["bf16"], [in_bf16], {}
    for candidate in backends():
        try:
            by_backend(candidate)
        except ValueError as error:
            refused[candidate.name] = str(error)
            continue
        names.append(candidate.name)
        runs.append(lambda by=candidate: by_backend(by))
    flops = 2 * rows * n * k
    times = interleaved_ms(runs, repeats)
    rates = {name: flops / ms / 1e9 for name, ms in zip(names, times, strict=True)}
    best = max((rates[name] for name in COMPARED if name in rates), default=None)
    return {
        "product": kind,
        "rows": rows,
        "n": n,
        "k": k,
        "tflop_per_s": rates,
        "of_best": {x: r / best for x, r in rates.items()} if best else None,
        "of_bf16": {x: r / rates["bf16"] for x, r in rates.items()},
        "refused": refused,
    }


def products(tokens: Sequence[int], repeats: int) -> Iterator[dict[str, Any]]:
    for rows in tokens:
        for kinds, shapes in (("", DENSE), ("grouped ", GROUPED)):
            for n, k in shapes:
                for which in ("forward", "dgrad", "wgrad"):
                    yield product(f"{kinds}{which}", rows, n, k, repeats)
        for n, k in GROUPED:
            yield product(CHANGING, rows, n, k, repeats)


def show(row: dict[str, Any]) -> None:
    """A line of either table."""
    if "kernel" in row:
        print(
            f"{row['kernel']:26} {row['tokens']:6} {row['us']:9.1f} us "
            f"{row['tb_per_s']:6.2f} TB/s {row['of_copy']:6.1%} of a copy",
            flush=True,
        )
        return
    parts = [f"{name} {rate:6.0f}" for name, rate in row["tflop_per_s"].items()]
    if row["of_best"]:
        parts += [f"{name}/best {r:.2f}" for name, r in row["of_best"].items() if name == "triton"]
    sizes = f"{row['rows']}x{row['n']}x{row['k']}"
    print(f"{row['product']:22} {sizes:18} TFLOP/s: {', '.join(parts)}", flush=True)


def try_all() -> None:
    """Each case once, small, on a CPU by the references."""
    for case in kernel_cases(130, 256, 128, "cpu"):
        print(f"{case.name:26} ran, {case.work:.0f} bytes")
    for kinds in ("", "grouped "):
        for which in ("forward", "dgrad", "wgrad"):
            by_backend, in_bf16 = product_runs(f"{kinds}{which}", 130, 128, 256, "cpu")
            by_backend(backend("reference"))
            in_bf16()
            print(f"{kinds + which:26} ran")
    by_backend, in_bf16 = changing_wgrad(130, 128, 256, "cpu", 2)
    for _ in range(2):
        by_backend(backend("reference"))
        in_bf16()
    print(f"{CHANGING:26} ran")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument(
        "--only", choices=["kernels", "products"], help="one table alone, which is not written"
    )
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(arguments)
    if args.tiny:
        try_all()
        return
    if not torch.cuda.is_available():
        raise SystemExit(
            "bench.fp8_kernels: this machine has no CUDA GPU; --tiny tries it on a CPU"
        )
    result: dict[str, Any] = {}
    for part, rows in (
        ("kernels", kernels(args.tokens, args.repeats)),
        ("products", products(args.tokens, args.repeats)),
    ):
        if args.only not in (None, part):
            continue
        result[part] = []
        for row in rows:
            show(row)
            result[part].append(row)
    if args.only is None:
        print(f"wrote {write_result('fp8_kernels', result)}")


if __name__ == "__main__":
    main()
