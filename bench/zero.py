"""Optimizer memory and step time of ZeRO-1 against the whole optimizer, and what overlaps.

    python -m bench.zero [--dp 2] [--steps 5] [--hidden 384]

All ranks are processes on this machine and talk over its loopback by gloo, which computes on the
cores that train: what a network card would do beside them takes time from them here. A rank holds
both stages of DualPipeV, so that the last stage's gradients are complete while the first still
computes. Three engines train the same model on the same batches, a step each in turn: with the
whole optimizer, with shares whose collectives all start at the end of a step and are waited for
there, and with shares as they are. A time is the slowest rank's, a number the median of steps.

Exposed is what the calls that start collectives and wait for them take within a step, packing and
waiting for a slower rank included. Hidden: what is exposed less than where nothing overlaps.
Alone: all of them with nothing beside them and all ranks starting at once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from counterflow.launch.engine import Engine
from counterflow.model import ModelConfig
from counterflow.parallel import Mesh, MeshShape
from counterflow.parallel.schedule import build
from counterflow.parallel.zero import Shards
from tests.ranks import RankPool

from .machine import write_result

NAMES = WHOLE, SERIAL, SHARED = "whole optimizer", "shares, at the end", "shares"
MICROBATCHES, SEQUENCES, LENGTH = 4, 1, 128


def model(hidden: int) -> ModelConfig:
    """Some layers with experts; sizes follow the hidden one."""
    return ModelConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        moe_intermediate_size=hidden // 2,
        num_hidden_layers=6,
        first_k_dense_replace=1,
        num_attention_heads=4,
        q_lora_rank=hidden // 2,
        kv_lora_rank=hidden // 4,
        qk_nope_head_dim=hidden // 8,
        qk_rope_head_dim=hidden // 16,
        v_head_dim=hidden // 8,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        num_nextn_predict_layers=0,
        max_position_embeddings=LENGTH,
    )


class Clock:
    """Adds up what calls take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, call: Callable[..., None]) -> Callable[..., None]:
        """The same call, timed."""

        def run(*arguments: Any) -> None:
            start = time.perf_counter()
            call(*arguments)
            self.seconds += time.perf_counter() - start

        return run


def alone_s(shards: Shards, engine: Engine) -> float:
    """Seconds of one reduction and one gathering with nothing beside them."""
    for parameter in engine.parameters.values():
        parameter.grad = torch.ones_like(parameter, dtype=torch.float32)
    dist.barrier()
    start = time.perf_counter()
    shards.finish_gradients()
    shards.start_gather()
    shards.finish_gather()
    took = time.perf_counter() - start
    shards.drop_gradients()
    return took


def at_the_end(shards: Shards) -> None:
    """Let nothing of these shards overlap with anything."""
    start, finish = shards.start_gather, shards.finish_gather
    end_stage, finish_gradients = shards.end_stage, shards.finish_gradients

    def gather() -> None:
        start()
        finish()

    def ignore(stage: int) -> None:
        """`finish_gradients` ends stages that have not ended."""

    def reduce() -> None:
        shards.end_stage = end_stage
        finish_gradients()
        shards.end_stage = ignore

    shards.end_stage, shards.finish_gradients, shards.start_gather = ignore, reduce, gather


def watched(shards: Shards, clock: Clock) -> None:
    """Time everything that a step calls."""
    for name in ("end_stage", "finish_gradients", "start_gather", "finish_gather"):
        setattr(shards, name, clock.timed(getattr(shards, name)))


def case(rank: int, world: int, hidden: int, steps: int) -> dict[str, Any]:
    """What one rank measured."""
    mesh = Mesh.create(MeshShape(1, world), timeout_s=300)
    plan = build("dualpipev", ranks=1, microbatches=MICROBATCHES)
    kinds = {WHOLE: 0, SERIAL: 1, SHARED: 1}
    engines = {
        name: Engine(model(hidden), mesh, plan, dtype=torch.bfloat16, zero=zero)
        for name, zero in kinds.items()
    }
    clocks = {name: Clock() for name in engines}
    serial, shared = engines[SERIAL].means, engines[SHARED].means
    assert isinstance(serial, Shards)
    assert isinstance(shared, Shards)
    alone = [alone_s(shared, engines[SHARED]) for _ in range(steps + 1)][1:]
    at_the_end(serial)
    watched(serial, clocks[SERIAL])
    watched(shared, clocks[SHARED])
    generator = torch.Generator().manual_seed(rank)
    shape = (steps + 1, MICROBATCHES * SEQUENCES, LENGTH + 1)
    tokens = torch.randint(0, 4096, shape, generator=generator)
    times: dict[str, list[float]] = {name: [] for name in engines}
    exposed: dict[str, list[float]] = {name: [] for name in engines}
    losses: dict[str, list[float]] = {name: [] for name in engines}
    names = list(engines)
    for step, batch in enumerate(tokens):
        for name in names[step % 3 :] + names[: step % 3]:
            dist.barrier()
            before, start = clocks[name].seconds, time.perf_counter()
            result = engines[name].step(batch[:, :-1], batch[:, 1:], lr=1e-3)
            losses[name].append(result.loss)
            if step:  # the first is to warm up
                times[name].append(time.perf_counter() - start)
                exposed[name].append(clocks[name].seconds - before)
    engines[SHARED].settle()
    return {
        "state_bytes": {name: _state_bytes(engine) for name, engine in engines.items()},
        "times_s": times,
        "exposed_s": exposed,
        "alone_s": alone,
        "same_losses": losses[WHOLE] == losses[SHARED] == losses[SERIAL],
        "parameters": sum(p.numel() for p in engines[WHOLE].parameters.values()),
    }


def _state_bytes(engine: Engine) -> int:
    states = engine.optimizer.state_dict().values()
    return sum(
        tensor.numel() * tensor.element_size()
        for state in states
        for key, tensor in state.items()
        if key != "step"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--dp", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=384)
    options = parser.parse_args()
    with RankPool() as pool:
        found = pool.run(
            case, world=options.dp, timeout_s=900, hidden=options.hidden, steps=options.steps
        )
    step_s = {name: _slowest([rank["times_s"][name] for rank in found]) for name in NAMES}
    exposed = {name: _slowest([rank["exposed_s"][name] for rank in found]) for name in NAMES[1:]}
    alone = _slowest([rank["alone_s"] for rank in found])
    shares = [rank["state_bytes"][SHARED] / rank["state_bytes"][WHOLE] for rank in found]
    hidden = 1 - exposed[SHARED] / exposed[SERIAL]
    print(
        f"dp {options.dp}, {found[0]['parameters'] / 1e6:.1f} M bfloat16 parameters\n"
        f"optimizer states of a rank: {found[0]['state_bytes'][WHOLE] / 2**20:.1f} MiB whole, "
        f"shared {', '.join(f'{share:.4f}' for share in shares)} of that"
    )
    for name in NAMES:
        print(f"step, {name}: {step_s[name] * 1e3:.0f} ms")
    print(
        f"reduce-scatter and all-gather: {alone * 1e3:.0f} ms alone, exposed "
        f"{exposed[SERIAL] * 1e3:.0f} ms at the end, {exposed[SHARED] * 1e3:.0f} ms overlapped "
        f"({hidden:.0%} hidden)"
    )
    result = {
        "dp": options.dp,
        "hidden": options.hidden,
        "step_s": step_s,
        "exposed_s": exposed,
        "alone_s": alone,
        "hidden_share": hidden,
        "state_share": shares,
        "ranks": found,
    }
    print(f"written to {write_result('zero', result)}")
    return 0 if all(rank["same_losses"] for rank in found) or options.dp > 2 else 1


def _slowest(of_ranks: Sequence[Sequence[float]]) -> float:
    """Median over steps of the slowest rank's."""
    return statistics.median(map(max, zip(*of_ranks, strict=True)))


class _Raw(argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines."""


if __name__ == "__main__":
    raise SystemExit(main())
