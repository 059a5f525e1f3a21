"""What this machine gives: products, memory, links, and a step's work besides its schedule.

All ranks measure at once, as they compute at once in a run: what they share has its effect.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm.collectives import gather, sum_over
from ..comm.cost import Links
from ..comm.dispatch import Dispatcher
from ..model import ModelConfig
from ..parallel.mesh import Mesh
from ..parallel.schedule import build
from . import fp8
from .config import Config
from .engine import Engine
from .preflight.bandwidth import CPU_SIZES, GPU_SIZES, time_collectives

_REPEATS = 7
_ROUNDS = 11  # of all-to-alls
_CPU_MATMUL, _GPU_MATMUL = 768, 8192
_CPU_COPY, _GPU_COPY = 64 << 20, 1 << 30
_ALONE_US = 1.0  # of a link that no rank uses


class Together:
    """Times work that all ranks of a mesh do at once.

    Args:
        mesh: of them.
        device: of this rank.
    """

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self._mesh, self._device = mesh, device

    def begin(self) -> float:
        """Wait for all ranks; the time then."""
        start = torch.zeros(1, device=self._device)
        sum_over(start, self._mesh.world_group, "measuring", board=self._mesh.waits)
        self._finish()
        return time.perf_counter()

    def ms(self, do: Callable[[], object]) -> float:
        """What `do` takes on this rank, once all have begun."""
        began = self.begin()
        do()
        self._finish()
        return (time.perf_counter() - began) * 1e3

    def median_ms(self, do: Callable[[], object]) -> float:
        """The mean over ranks of what `do` takes, the median of several times."""
        do()
        median = statistics.median(self.ms(do) for _ in range(_REPEATS))
        world = self._mesh.world_group
        return statistics.fmean(gather(median, world, "their times", board=self._mesh.waits))

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def matmul_tflops(together: Together, dtype: torch.dtype, device: torch.device) -> float:
    """1e12 FLOP/s of a large product of two square matrices."""
    size = _GPU_MATMUL if device.type == "cuda" else _CPU_MATMUL
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / together.median_ms(lambda: torch.mm(a, b, out=out)) * 1e-9


def fp8_tflops(together: Together, device: torch.device) -> float:
    """1e12 FLOP/s of a large product in FP8, by the backend that serves this device.

    Its operands are in FP8 already, with scales of tiles and blocks.
    """
    from ..fp8 import quantize_blocks, quantize_tiles, scaled_matmul

    size = _GPU_MATMUL if device.type == "cuda" else _CPU_MATMUL // 3
    rows = quantize_tiles(torch.randn(size, size, device=device))
    weight = quantize_blocks(torch.randn(size, size, device=device))
    return 2 * size**3 / together.median_ms(lambda: scaled_matmul(rows, weight)) * 1e-9


def memory_gbps(together: Together, device: torch.device) -> float:
    """1e9 bytes/s of a copy within memory, read and written."""
    size = _GPU_COPY if device.type == "cuda" else _CPU_COPY
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> Tensor:
        return target.copy_(source)

    return 2 * size / together.median_ms(copy) * 1e-6


def measured_links(mesh: Mesh, device: torch.device, timeout_s: float) -> tuple[Links, str]:
    """The links inside a node and across, by all-to-alls; a collective of all ranks.

    Returns:
        The links, and which of them no two ranks use: such a one gets the other's numbers.

    Raises:
        CommError: a rank is gone, or did not answer within the limit.
    """
    from datetime import timedelta

    nodes = mesh.nodes
    by_node = {node: [r for r, n in enumerate(nodes) if n == node] for node in sorted(set(nodes))}
    inside = [ranks for ranks in by_node.values() if len(ranks) > 1]
    across = [list(ranks) for ranks in zip(*by_node.values(), strict=False)]
    across = across if len(by_node) > 1 else []
    sizes = GPU_SIZES if device.type == "cuda" else CPU_SIZES
    found: dict[str, tuple[float, float]] = {}
    limit = timedelta(seconds=timeout_s)
    for name, groups in (("inside", inside), ("across", across)):
        mine: dist.ProcessGroup | None = None
        for ranks in groups:
            group = dist.new_group(ranks, timeout=limit)
            if mesh.rank in ranks:
                assert isinstance(group, dist.ProcessGroup)
                mine = group
        told: tuple[float, float] | None = None
        if mine is not None:
            few, *_, many = time_collectives(
                mine, device, (4 * mine.size(), *sizes), ("all_to_all",), rounds=_ROUNDS
            )
            seconds = max(many.seconds - few.seconds, 1e-9)
            sent = (many.num_bytes - few.num_bytes) * (mine.size() - 1) / mine.size()
            told = sent / seconds * 1e-9, few.seconds * 1e6
            dist.destroy_process_group(mine)
        every = gather(told, mesh.world_group, f"links {name}", board=mesh.waits)
        if known := [one for one in every if one is not None]:
            slowest, latest = min(of[0] for of in known), max(of[1] for of in known)
            found[name] = slowest, latest
    unused = next((name for name in ("inside", "across") if name not in found), "")
    if not found:  # one rank, which sends nothing to anybody
        return Links("measured", 1.0, 1.0, _ALONE_US, _ALONE_US), "inside and across"
    of_inside = found.get("inside") or found["across"]
    of_across = found.get("across") or found["inside"]
    links = Links("measured", of_inside[0], of_across[0], of_inside[1], of_across[1])
    return links, unused


@dataclass(frozen=True)
class StepParts:
    """What a step consists of, ms; the mean over ranks.

    Attributes:
        row: of its schedule.
        reduce: the mean of gradients over ranks.
        update: the optimizer's.
        rest: zeroing gradients, sums of losses, norm, routers' biases.
    """

    row: float
    reduce: float
    update: float
    rest: float


class StepTimer:
    """Times whole steps of a small model, one stage on each rank.

    Args:
        config: of a run.
        model: to be trained.
        mesh: of all ranks that measure.
        experts: the dispatcher of the run.
        device: where this rank computes.
    """

    def __init__(
        self,
        config: Config,
        model: ModelConfig,
        mesh: Mesh,
        experts: Dispatcher[Any],
        device: torch.device,
    ) -> None:
        train = config.train
        self._mesh, self._together = mesh, Together(mesh, device)
        self.engine = Engine(
            model,
            mesh,
            build("1f1b", ranks=1, microbatches=1),
            experts=experts,
            dtype=getattr(torch, train.dtype),
            device=device,
            recipe=fp8.make_recipe(config),
            recompute=fp8.make_recompute(config),
            betas=train.betas,
            moments=getattr(torch, config.moments),
            overlap=config.overlap.interleaving,
            zero=config.zero.stage,
            timeout_s=config.run.timeout_s,
        )
        generator = torch.Generator().manual_seed(mesh.rank)
        shape = train.sequences, config.data.sequence_length + 1
        tokens = torch.randint(0, model.vocab_size, shape, generator=generator).to(device)
        self._batch = tokens[:, :-1], tokens[:, 1:]
        self._taken: list[StepParts] = []

    def round(self) -> None:
        """Time a step and its parts; all ranks have to do so together."""
        engine, ms = self.engine, self._together.ms
        step = ms(lambda: engine.step(*self._batch, lr=1e-4))
        engine.settle()
        row = engine.pipeline.last_step_spans()[-1].end_ms
        engine.gradients(*self._batch)
        reduce = ms(engine.means.finish_gradients)
        update = ms(lambda: engine.optimizer.step(1e-4))
        engine.settle()
        rest = max(0.0, step - row - reduce - update)
        self._taken.append(StepParts(row, reduce, update, rest))

    def warm_up(self) -> None:
        """A round that does not count."""
        self.round()
        self._taken.clear()

    def results(self) -> StepParts:
        """The medians over rounds; a collective of all ranks."""
        keys = ("row", "reduce", "update", "rest")
        mine = [statistics.median(getattr(one, key) for one in self._taken) for key in keys]
        told = gather(mine, self._mesh.world_group, "parts of a step", board=self._mesh.waits)
        return StepParts(*(statistics.fmean(of) for of in zip(*told, strict=True)))
