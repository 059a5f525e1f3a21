"""What this machine's GPU gives, and what training reaches on it.

    python -m bench.gpu [--repeats 20]

First the ceilings (copy bandwidth, bf16 matrix product), then the grouped expert product beside
one product for each expert, the reordering of rows in a dispatch, and a training step of a small
DeepSeek-V3-style model on one GPU. Times are medians; results go to bench/results/gpu.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from counterflow.comm import dispatcher
from counterflow.launch.engine import Engine
from counterflow.model import ModelConfig, num_active_parameters
from counterflow.model.grouped import grouped_linear
from counterflow.parallel import Mesh, MeshShape
from counterflow.parallel.schedule import build

from .machine import write_result


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Median time of `run` on the GPU, ms, after three runs that do not count."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def ceilings(repeats: int) -> dict[str, float]:
    """Copy bandwidth, TB/s counting bytes read and written, and bf16 matrix product, TFLOP/s."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), repeats)
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    matmul_ms = median_ms(lambda: a @ b, repeats)
    return {
        "copy_tb_per_s": 2 * (1 << 31) / copy_ms * 1e3 / 1e12,
        "bf16_matmul_tflop_per_s": 2 * n**3 / matmul_ms * 1e3 / 1e12,
    }


def experts(repeats: int) -> dict[str, float]:
    """One MoE layer's up-projection at V3's sizes, 32 experts, forward only, TFLOP/s."""
    num, rows, hidden, inner = 32, 32768, 7168, 2 * 2048
    generator = torch.Generator().manual_seed(0)
    cuts = sorted(torch.randint(0, rows, (num - 1,), generator=generator).tolist())
    counts = [b - a for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]
    x = torch.randn(rows, hidden, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(num, inner, hidden, dtype=torch.bfloat16, device="cuda")

    def one_by_one() -> list[torch.Tensor]:
        pieces = zip(x.split(counts), weight, strict=True)
        return [piece @ w.t() for piece, w in pieces]

    flops = 2 * rows * hidden * inner
    with torch.no_grad():
        grouped = median_ms(lambda: grouped_linear(x, weight, counts), repeats)
        loop = median_ms(one_by_one, repeats)
    return {
        "grouped_tflop_per_s": flops / grouped * 1e3 / 1e12,
        "one_by_one_tflop_per_s": flops / loop * 1e3 / 1e12,
    }


def dispatch(repeats: int) -> dict[str, float]:
    """Putting rows in order and summing them at V3's sizes on one GPU, where nothing is sent.

    Bandwidths count each row once read and once written, as `copy_tb_per_s` does.
    """
    tokens, top_k, hidden, num = 4096, 8, 7168, 32
    generator = torch.Generator().manual_seed(0)
    choice = torch.rand(tokens, num, generator=generator).topk(top_k).indices.cuda()
    weights = torch.rand(tokens, top_k, generator=generator).cuda()
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    d = dispatcher("flat", Mesh(MeshShape()), num_experts=num)
    out = d.dispatch(x, choice, weights)
    moved = 2 * out.rows_ND.numel() * out.rows_ND.element_size()

    def bandwidth(milliseconds: float) -> float:
        return moved / milliseconds * 1e3 / 1e12

    again = median_ms(lambda: d.dispatch(x, choice, weights, out.handle), repeats)
    back = median_ms(lambda: d.combine(out.rows_ND, out.handle), repeats)
    return {
        "preprocess_ms": median_ms(lambda: d.start_preprocess(choice).finish(), repeats),
        "dispatch_tb_per_s": bandwidth(again),
        "combine_tb_per_s": bandwidth(back),
    }


def training(repeats: int) -> dict[str, float]:
    """A step of a model with V3's proportions at a sixteenth of its experts, one GPU, bf16."""
    config = ModelConfig(
        vocab_size=32768,
        hidden_size=2048,
        intermediate_size=8192,
        moe_intermediate_size=1024,
        num_hidden_layers=8,
        first_k_dense_replace=1,
        num_attention_heads=16,
        q_lora_rank=768,
        kv_lora_rank=512,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        max_position_embeddings=4096,
    )
    microbatches, length = 4, 4096
    plan = build("1f1b", ranks=1, microbatches=microbatches)
    engine = Engine(
        config,
        Mesh(MeshShape()),
        plan,
        dtype=torch.bfloat16,
        device=torch.device("cuda", torch.cuda.current_device()),
    )
    tokens = torch.randint(0, config.vocab_size, (microbatches, length + 1), device="cuda")
    step_ms = median_ms(lambda: engine.step(tokens[:, :-1], tokens[:, 1:], lr=1e-4), repeats)
    num_tokens = microbatches * length
    return {
        "step_ms": step_ms,
        "tokens_per_s": num_tokens / step_ms * 1e3,
        # 6 FLOPs a token and active parameter; attention's own products are left out.
        "model_tflop_per_s": 6 * num_active_parameters(config) * num_tokens / step_ms * 1e3 / 1e12,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu: this machine has no CUDA GPU")
    parts: dict[str, dict[str, Any]] = {
        "ceilings": ceilings(repeats),
        "experts": experts(repeats),
        "dispatch": dispatch(repeats),
        "training": training(max(3, repeats // 4)),
    }
    path = write_result("gpu", parts)
    for part, values in parts.items():
        for name, value in values.items():
            print(f"{part:10} {name:26} {value:12.2f}")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
