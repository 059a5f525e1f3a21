"""Compiles the Triton kernels for Hopper where there is no GPU, by calling what launches them.

    python -m tests.cases_fp8_compile

The launch is left out: a driver that only names its target stands in for CUDA's, so that arguments
are specialised as in a real call. Prints one JSON object: for each function a list of the kernels
that it would launch, and under "by counts" how many there are for all routings.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from counterflow.fp8 import E4M3, E5M2, Quantized
from counterflow.fp8.formats import TILE, padded_rows
from counterflow.fp8.kernels import product, quantize, swiglu

TARGET = GPUTarget("cuda", 90, 32)


class NoDriver:
    """What Triton asks of a driver in order to compile."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


def compiled(run: Callable[[], object]) -> list[Any]:
    """The kernels that `run` would launch."""
    found: list[Any] = []
    original = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["warmup"] = True
        kernel: Any = original(self, *args, **kwargs)
        found.append(kernel.result() if hasattr(kernel, "result") else kernel)
        return kernel

    JITFunction.run = compile_only
    try:
        run()
    finally:
        JITFunction.run = original
    return found


def described(kernel: Any) -> dict[str, Any]:
    """What the tests look at."""
    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run(
            [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run(
            [tool, "-sass", cubin], capture_output=True, text=True, check=True
        ).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", sass, re.M)
    return {
        "registers": int(numbers["REG"]),
        "stack_bytes": int(numbers["STACK"]) + int(numbers["LOCAL"]),
        "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "instructions": len(opcodes),
        "copy_engine": sum(op.startswith("UTMALDG") for op in opcodes),
        "widest_load": max(
            (int(op.rpartition(".")[2]) for op in opcodes if re.fullmatch(r"LDG.*\.(64|128)", op)),
            default=32,
        ),
        "wgmma": sorted(set(re.findall(r"wgmma\.mma_async\.\S+", ptx))),
        "to_fp8": sorted(set(re.findall(r"cvt\S*e[45]m[23]x2\.f32", ptx))),
        "flushes": sorted(set(re.findall(r"^\s*(\S+\.ftz\.\S*)", ptx, re.M))),
        "fused": len(re.findall(r"^\s*fma\.", ptx, re.M)),
        "approximate": sorted(set(re.findall(r"^\s*(\S+\.approx\S*|div\.full\S*)", ptx, re.M))),
    }


class Untuned:
    """In place of the tuned kernel: launches the first configurations that it would try.

    Attributes:
        most: how many of them.
    """

    def __init__(self, tuned: Any) -> None:
        self.tuned = tuned
        self.most = len(tuned.configs)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = dict(zip(self.tuned.arg_names, args, strict=False))
            fitting = self.tuned.early_config_prune(self.tuned.configs, names, **kwargs)
            for config in fitting[: self.most]:
                config.pre_hook({**names, **config.kwargs})
                self.tuned.fn[grid](*args, **kwargs, **config.all_kwargs())

        return launch


def kernels_by_counts(untuned: Untuned) -> dict[str, int]:
    """How many kernels a grouped product compiles for several routings."""
    untuned.most = 1
    found: dict[str, list[Any]] = {"grouped": [], "grouped_along_k": []}
    b = Quantized(torch.zeros(2, 384, 512).to(E4M3), torch.zeros(2, 3, 4))
    into = torch.zeros(2, 256, 384)
    for counts in ([100, 156], [1, 100], [1920, 128], [8, 0]):
        rows, padded = sum(counts), padded_rows(counts)
        a = Quantized(torch.zeros(rows, 512).to(E4M3), torch.zeros(rows, 4))
        out = torch.zeros(rows, 384, dtype=torch.bfloat16)
        x, y = (
            Quantized(torch.zeros(n, padded).to(E4M3), torch.zeros(n, padded // TILE))
            for n in (256, 384)
        )
        found["grouped"] += compiled(partial(product.grouped, a, b, counts, out))
        found["grouped_along_k"] += compiled(partial(product.grouped_along_k, x, y, counts, into))
    return {name: len({kernel.hash for kernel in kernels}) for name, kernels in found.items()}


def all_kernels(untuned: Untuned) -> dict[str, list[dict[str, Any]]]:
    """Each function's kernels at shapes whose divisibility is that of DeepSeek-V3's."""
    x = torch.zeros(256, 512, dtype=torch.bfloat16)
    counts = [100, 156]
    options: dict[str, Any] = {"dtype": E4M3, "power_of_two": True}
    tiles = Quantized(torch.zeros(256, 512).to(E4M3), torch.zeros(256, 4))
    turned = Quantized(torch.zeros(384, 512).to(E4M3), torch.zeros(384, 4))
    blocks = Quantized(torch.zeros(384, 512).to(E4M3), torch.zeros(3, 4))
    experts = Quantized(torch.zeros(2, 384, 512).to(E4M3), torch.zeros(2, 3, 4))
    weights = torch.ones(256)
    grad = torch.zeros(256, 256, dtype=torch.bfloat16)
    out = torch.zeros(256, 384, dtype=torch.bfloat16)
    runs: dict[str, Callable[[], object]] = {
        "quantize_tiles": lambda: quantize.quantize_tiles(x, **options),
        "quantize_tiles float32": lambda: quantize.quantize_tiles(
            x, dtype=E5M2, power_of_two=False
        ),
        "quantize_blocks": lambda: quantize.quantize_blocks(x, **options),
        "quantize_columns": lambda: quantize.quantize_columns(x, counts, **options),
        "quantize_both": lambda: quantize.quantize_both(x, counts, **options),
        "transpose_tiles": lambda: quantize.transpose_tiles(tiles, counts, power_of_two=True),
        "swiglu_quantized": lambda: swiglu.swiglu_quantized(x, weights),
        "swiglu_columns": lambda: swiglu.swiglu_columns(tiles, weights, counts),
        "swiglu_backward": lambda: swiglu.swiglu_backward(grad, tiles, weights),
        "swiglu_backward_quantized": lambda: swiglu.swiglu_backward_quantized(
            grad, tiles, weights, counts
        ),
        "matmul": lambda: product.matmul(tiles, blocks, out, False),
        "grouped": lambda: product.grouped(tiles, experts, counts, out),
        "grouped_along_k": lambda: product.grouped_along_k(
            tiles, turned, [100, 300], torch.zeros(2, 256, 384)
        ),
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for name, run in runs.items():
        # Only its table distinguishes the grouped kernel from the dense one.
        untuned.most = 1 if name == "grouped" else len(product.CONFIGS)
        found[name] = [described(kernel) for kernel in compiled(run)]
    return found


if __name__ == "__main__":
    driver.set_active(NoDriver())  # pyright: ignore[reportArgumentType]
    untuned = Untuned(product._tuned_kernel)
    product._tuned_kernel = untuned
    kernels: dict[str, Any] = all_kernels(untuned)
    sys.stdout.write(json.dumps({**kernels, "by counts": kernels_by_counts(untuned)}))
