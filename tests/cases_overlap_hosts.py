"""What ranks on hosts of a `bench.hosts.network` do to have overlap measured: one rank a host.

A rank holds both stages of DualPipeV, so a step consists of pairs nearly all of it, and experts are
on all hosts. Everybody who is compared trains the very same stages on the same micro-batches.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._profiler import _ExperimentalConfig
from torch.distributed.pipelining import PipelineStage, ScheduleDualPipeV
from torch.profiler import ProfilerActivity, profile

from counterflow.comm import dispatcher
from counterflow.comm.profile.analyse import analyse
from counterflow.comm.profile.read import read
from counterflow.model import DeepSeekV3, ModelConfig, build_parts, partition
from counterflow.parallel import Mesh, MeshShape, Pipeline
from counterflow.parallel.live import LiveChunk
from counterflow.parallel.phased import Communicate
from counterflow.parallel.schedule import Schedule, build
from counterflow.parallel.schedule.interleaving import DEFAULT_INTERLEAVING, Interleaving
from counterflow.parallel.stage import StageRunner

from .cases_hosts import Seen

COMMUNICATING = ("dispatch(F)", "combine(F)", "combine(B)", "dispatch(B)")
TOLERANCE = 1e-4  # gradients of torch to ours: the mean of losses is formed in another order
Grads = Sequence[Tensor | None]


class Sizes(NamedTuple):
    """Of the model and of a step; sequences are a micro-batch's on one rank.

    Much is computed for each byte that moves: to move it takes the same core, which a network card
    would not, and has to stay small beside what phases compute.
    """

    layers: int = 2  # of a stage
    hidden: int = 256
    heads: int = 48
    inner: int = 1024
    microbatches: int = 20
    sequences: int = 4
    length: int = 128

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=256,
            hidden_size=self.hidden,
            moe_intermediate_size=self.inner,
            num_hidden_layers=2 * self.layers,
            first_k_dense_replace=0,
            num_attention_heads=self.heads,
            q_lora_rank=self.hidden // 2,
            kv_lora_rank=self.hidden // 4,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
            n_routed_experts=8,
            num_experts_per_tok=4,
            n_group=2,
            topk_group=2,
            num_nextn_predict_layers=0,
            max_position_embeddings=self.length,
            aux_loss_alpha=0.0,  # torch has nowhere to add it
            initializer_range=0.05,
        )


@dataclass(frozen=True)
class Work:
    """One rank's stages, what they train on and in which order."""

    mesh: Mesh
    parts: list[DeepSeekV3]
    plan: Schedule
    inputs: Tensor
    targets: Tensor

    @classmethod
    def of(cls, rank: int, world: int, sizes: Sizes) -> Work:
        """All of it but a schedule's executor; a collective of all ranks."""
        one_core(rank)
        mesh = Mesh.create(MeshShape(1, world, world), timeout_s=100)
        config = sizes.config
        ways = dispatcher("dedup", mesh, num_experts=config.n_routed_experts, timeout_s=100)
        generator = torch.Generator().manual_seed(rank)
        shape = sizes.microbatches * sizes.sequences, sizes.length + 1
        tokens = torch.randint(0, config.vocab_size, shape, generator=generator)
        return cls(
            mesh,
            build_parts(config, partition(config, 2), ways),
            build("dualpipev", ranks=1, microbatches=sizes.microbatches),
            tokens[:, :-1],
            tokens[:, 1:],
        )

    def ours(self, overlap: Interleaving | None) -> Callable[[], object]:
        """A step by counterflow."""
        pipeline = Pipeline(
            self.parts,
            self.plan,
            self.mesh,
            self.parts[-1].loss,
            loss_names=("mtp", "balance"),
            overlap=overlap,
            timeout_s=100,
        )
        return lambda: pipeline.step(self.inputs, self.targets, sum_replicas=False)

    def theirs(self) -> Callable[[], object]:
        """A step by torch's DualPipeV, whose pair is a forward and then a backward."""
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        alone = groups[dist.get_rank()]
        assert isinstance(alone, dist.ProcessGroup)
        count = len(self.inputs) // self.plan.num_microbatches
        # Told the shapes: to find them out it would run the stages on numbers that may be NaN.
        tokens = self.inputs[:count]
        hidden_BLD = torch.zeros(*tokens.shape, self.parts[0].config.hidden_size)
        hidden_BLD.requires_grad_()
        stages = [
            PipelineStage(part, i, 2, torch.device("cpu"), given, hidden_BLD, group=alone)
            for i, (part, given) in enumerate(zip(self.parts, (tokens, hidden_BLD), strict=True))
        ]
        schedule = ScheduleDualPipeV(
            stages,  # pyright: ignore[reportArgumentType]
            self.plan.num_microbatches,
            loss_fn=self.parts[-1].loss,
        )
        return lambda: schedule.step(self.inputs, target=self.targets, losses=[])

    def run(self, step: Callable[[], object]) -> float:
        """Seconds of a step on the slowest rank, from a common start."""
        for part in self.parts:
            part.zero_grad()
        dist.barrier()
        began = time.perf_counter()
        step()
        took = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        return float(took)

    def grads(self) -> list[Tensor | None]:
        """Copies of this rank's gradients."""
        grads = [p.grad for part in self.parts for p in part.parameters()]
        return [None if grad is None else grad.clone() for grad in grads]


def one_core(rank: int) -> None:
    """Leave this process one of the machine's cores, if there is one for each rank.

    Ranks that share cores would hide each other's communication by taking turns.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= dist.get_world_size():
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), {cores[rank]})


def largest_difference(grads: Grads, others: Grads) -> float:
    """Of two lists of gradients: the largest |a - b| / max |b| of a parameter; 0 where equal."""
    found = 0.0
    for a, b in zip(grads, others, strict=True):
        if a is None or b is None:
            assert a is b, "one has a gradient that the other lacks"
        else:
            found = max(found, float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)))
    return found


class PhaseTimes(NamedTuple):
    """What phases take when nothing runs beside them, and what they send.

    Attributes:
        ms: of a layer, by phase and direction, such as "mlp(B)".
        beside_ms: of one micro-batch, what is in no layer: embedding, head and loss.
        link_bytes: that a layer's four exchanges send over this host's link, headers included.
    """

    ms: dict[str, float]
    beside_ms: float
    link_bytes: float


def phase_times(work: Work, repeats: int) -> PhaseTimes:
    """Run micro-batches phase by phase, one after the other; medians over layers and repeats."""
    first, last = (
        StageRunner(i, part, part.loss if i else None, frozenset({0}), cut=True)
        for i, part in enumerate(work.parts)
    )
    count = len(work.inputs) // work.plan.num_microbatches
    inputs, targets = work.inputs[:count], work.targets[:count]
    ms: dict[str, list[float]] = {}
    beside: list[float] = []
    sent: list[int] = []
    for turn in range(repeats + 1):
        took: list[tuple[str, bool, float]] = []
        before = Seen.now().link.tx_bytes
        one = first.begin(0, (inputs,), None, training=True)
        _forward(one, took)
        outputs, _ = first.outcome(one)
        other = last.begin(0, outputs, (targets,), training=True)
        _forward(other, took)
        _backward(other, took)
        one.seed(other.input_grads())
        _backward(one, took)
        for runner in (first, last):
            runner.end_backward(0)
        if not turn:
            continue  # a first one finds buffers and connections small
        sent.append(Seen.now().link.tx_bytes - before)
        beside.append(sum(t for _, in_layer, t in took if not in_layer))
        for name, in_layer, t in took:
            if in_layer:
                ms.setdefault(name, []).append(t)
    layers = sum(len(part.part.layers) for part in work.parts)
    medians = {name: statistics.median(of) for name, of in ms.items()}
    return PhaseTimes(medians, statistics.median(beside), statistics.median(sent) / layers)


def _timed(name: str, layer: str, took: list[tuple[str, bool, float]], do: Any) -> None:
    began = time.perf_counter()
    do()
    took.append((name, bool(layer), (time.perf_counter() - began) * 1e3))


def _each(live: LiveChunk) -> list[tuple[int, str, str, bool]]:
    """Number, name, layer and whether it communicates, of each phase."""
    phases = [(phase, layer.label) for layer in live.layers for phase in layer.phases]
    return [
        (number, phase.name, label, isinstance(phase, Communicate))
        for number, (phase, label) in enumerate(phases)
    ]


def _forward(live: LiveChunk, took: list[tuple[str, bool, float]]) -> None:
    for number, name, layer, communicates in _each(live):
        dist.barrier()  # or a wait for the other rank would be taken for communication

        def do(number: int = number, communicates: bool = communicates) -> None:
            if communicates:
                live.prepare(number)
                live.finish(number, live.start(number))
            else:
                live.compute(number)

        _timed(f"{name}(F)", layer, took, do)


def _backward(live: LiveChunk, took: list[tuple[str, bool, float]]) -> None:
    for number, name, layer, communicates in reversed(_each(live)):
        dist.barrier()

        def do(number: int = number, communicates: bool = communicates) -> None:
            if communicates:
                live.finish_backward(number, live.start_backward(number))
            else:
                live.backward(number, loss_scale=1.0, defer=True)

        _timed(f"{name}(B)", layer, took, do)
        if not communicates:
            _timed(f"{name}(W)", layer, took, lambda number=number: live.weights(number))


class Hidden(NamedTuple):
    """What a trace says of dispatch and combine, ms.

    Attributes:
        comm: time in which they ran.
        overlapped: of it, in which something computed.
        compute: time in which something computed.
        span: from the step's begin to its end.
        by_phase: share hidden of each phase.
    """

    comm: float
    overlapped: float
    compute: float
    span: float
    by_phase: dict[str, float]

    @property
    def share(self) -> float:
        """Hidden of dispatch and combine."""
        return self.overlapped / self.comm


def traced(path: Path, work: Callable[[], object]) -> None:
    """Do something with torch's profiler on all threads of this process; write its trace."""
    everyone = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=everyone) as profiler:
        work()
    profiler.export_chrome_trace(str(path))


def hidden(path: Path) -> Hidden:
    """What counterflow's own profiler finds in a trace."""
    report = analyse(read(path))
    phases = {p.name: p for p in report.phases if p.name in COMMUNICATING}
    comm = sum(p.comm for p in phases.values())
    exposed = sum(p.exposed for p in phases.values())
    return Hidden(
        comm / 1e6,
        (comm - exposed) / 1e6,
        report.totals.compute / 1e6,
        report.totals.span / 1e6,
        {name: 1 - p.exposed / p.comm for name, p in phases.items()},
    )


def timed_phases(rank: int, world: int, sizes: Sizes, repeats: int = 2) -> PhaseTimes:
    """What phases take on this rank."""
    return phase_times(Work.of(rank, world, sizes), repeats)


def with_and_without(rank: int, world: int, sizes: Sizes, folder: str) -> dict[str, Any]:
    """How gradients differ without overlap and by torch, and what traces show."""
    work = Work.of(rank, world, sizes)
    grads: dict[str, list[Tensor | None]] = {}
    found: dict[str, Any] = {}
    for name, overlap in {"hidden_without": None, "hidden": DEFAULT_INTERLEAVING}.items():
        step = work.ours(overlap)
        work.run(step)
        path = Path(folder) / f"{name}{rank}.json"
        traced(path, lambda step=step: work.run(step))
        grads[name] = work.grads()
        found[name] = hidden(path)
    work.run(work.theirs())
    ours = grads["hidden"]
    return {
        **found,
        "to_without": largest_difference(ours, grads["hidden_without"]),
        "to_torch": largest_difference(ours, work.grads()),
    }
