"""Step time of counterflow's pipelines over gloo against torch.distributed.pipelining's.

    python -m bench.pipeline [--ranks 2 4] [--rows 512] [--repeats 15]

Every contender trains the same blocks on the same micro-batches, in the same processes, in turns:
each round runs every contender once, so that whatever else the machine does hits all alike. A
rank's step time is the slowest rank's; a ratio is the median over rounds of ours / theirs in the
same round. Two blocks a rank: schedules with two stages a rank (DualPipeV) hold one block in a
stage, the others two.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleDualPipeV

from counterflow.parallel import Mesh, MeshShape, Pipeline
from counterflow.parallel.schedule import build
from tests.ranks import RankPool

from .machine import write_result

PAIRS = (
    ("counterflow dualpipe", "torch Schedule1F1B"),
    ("counterflow dualpipe", "torch ScheduleDualPipeV"),
    ("counterflow dualpipev", "torch ScheduleDualPipeV"),
    ("counterflow dualpipev", "torch Schedule1F1B"),
    ("counterflow 1f1b", "torch Schedule1F1B"),
)


class Block(nn.Module):
    """A residual feed-forward block, [rows, width] -> [rows, width]."""

    def __init__(self, index: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(index)
        self.index = index
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def contenders(
    rank: int, world: int, microbatches: int, rows: int, width: int
) -> dict[str, tuple[Callable[[], object], list[nn.Sequential]]]:
    """Per contender: one training step, and this rank's modules."""
    torch.manual_seed(7)
    batch = torch.randn(microbatches * rows, width)
    targets = torch.randn(microbatches * rows, width)
    cpu = torch.device("cpu")
    made: dict[str, tuple[Callable[[], object], list[nn.Sequential]]] = {}

    def stage(index: int, num_stages: int) -> nn.Sequential:
        per = 2 * world // num_stages
        return nn.Sequential(*(Block(index * per + i, width) for i in range(per)))

    for name in ("dualpipe", "dualpipev", "1f1b"):
        plan = build(name, ranks=world, microbatches=microbatches)
        held = plan.placement.stages(rank)
        modules = [stage(s, plan.num_stages) for s in held]
        mesh = Mesh.create(MeshShape(pp=world))
        pipeline = Pipeline(modules, plan, mesh, F.mse_loss)

        def ours(pipeline: Pipeline = pipeline, modules: list[nn.Sequential] = modules) -> object:
            for module in modules:
                module.zero_grad()
            return pipeline.step(batch, targets)

        made[f"counterflow {name}"] = (ours, modules)

    v_modules = [stage(rank, 2 * world), stage(2 * world - 1 - rank, 2 * world)]
    v_stages = [
        PipelineStage(m, s, 2 * world, cpu)
        for m, s in zip(v_modules, (rank, 2 * world - 1 - rank), strict=True)
    ]
    dualpipev = ScheduleDualPipeV(v_stages, microbatches, loss_fn=F.mse_loss)  # pyright: ignore[reportArgumentType]

    def torch_v() -> object:
        for module in v_modules:
            module.zero_grad()
        if rank == 0:
            return dualpipev.step(batch, target=targets, losses=[])
        return dualpipev.step()

    made["torch ScheduleDualPipeV"] = (torch_v, v_modules)

    one = stage(rank, world)
    single = Schedule1F1B(PipelineStage(one, rank, world, cpu), microbatches, loss_fn=F.mse_loss)

    def torch_1f1b() -> object:
        one.zero_grad()
        if rank == 0:
            return single.step(batch)
        if rank == world - 1:
            return single.step(target=targets, losses=[])
        return single.step()

    made["torch Schedule1F1B"] = (torch_1f1b, [one])
    return made


def checksums(modules: list[nn.Sequential], world: int) -> Tensor:
    """Norm and sum of every parameter's gradient, [block, parameter, 2], the mean over holders."""
    rows = torch.zeros(2 * world, 6, 3, dtype=torch.float64)
    for block in (b for m in modules for b in m if isinstance(b, Block)):
        for place, parameter in enumerate(block.parameters()):
            assert parameter.grad is not None
            grad = parameter.grad.double()
            rows[block.index, place] = torch.stack([grad.norm(), grad.sum(), torch.tensor(1.0)])
    dist.all_reduce(rows)
    return rows[..., :2] / rows[..., 2:]


def case(rank: int, world: int, sizes: dict[str, int]) -> dict[str, Any]:
    sizes = dict(sizes)
    repeats = sizes.pop("repeats")
    made = contenders(rank, world, **sizes)
    found: dict[str, Tensor] = {}
    for name, (step, modules) in made.items():
        step()  # warm-up: buffers, connections
        found[name] = checksums(modules, world)
    for name, sums in found.items():
        torch.testing.assert_close(
            sums, found["torch Schedule1F1B"], rtol=1e-3, atol=1e-6, msg=name
        )
    times: dict[str, list[float]] = {name: [] for name in made}
    names = list(made)
    for turn in range(repeats):
        # Another one begins each round: what ran before leaves its traces in caches and memory.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            step = made[name][0]
            dist.barrier()
            began = time.perf_counter()
            step()
            took = torch.tensor(time.perf_counter() - began)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            times[name].append(float(took))
    return {"times_s": times}


def measure(ranks: int, **sizes: int) -> dict[str, Any]:
    """All contenders on `ranks` ranks; prints and returns medians and ratios."""
    with RankPool() as pool:
        times = pool.run(case, world=ranks, timeout_s=900.0, sizes=sizes)[0]["times_s"]
    print(f"{ranks} ranks, {sizes['microbatches']} micro-batches of {sizes['rows']} rows")
    for name, seconds in times.items():
        print(f"  {name:26} {statistics.median(seconds) * 1e3:8.1f} ms")
    ratios = {
        f"{ours} / {theirs}": statistics.median(
            a / b for a, b in zip(times[ours], times[theirs], strict=True)
        )
        for ours, theirs in PAIRS
    }
    for name, ratio in ratios.items():
        print(f"  {name:52} {ratio:6.3f}")
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {"ranks": ranks, **sizes, "median_s": medians, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--microbatches", type=int, default=4, help="for each rank")
    parser.add_argument("--rows", type=int, default=512, help="rows of a micro-batch")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    runs = [
        measure(
            ranks,
            microbatches=options.microbatches * ranks,
            rows=options.rows,
            width=options.width,
            repeats=options.repeats,
        )
        for ranks in options.ranks
    ]
    print(f"wrote {write_result('pipeline', {'runs': runs})}")


if __name__ == "__main__":
    main()
