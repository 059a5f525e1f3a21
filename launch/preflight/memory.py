"""What a run will take of each rank's memory, and whether that is there, before anything starts.

The bytes are those of `predict.memory`. A run is refused for the exact ones alone: what a layer
works with for a moment, what moves on its way, and what CUDA and NCCL take are estimates, and
called so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...parallel.schedule import Schedule
from ...predict.activations import Split, StageActivations, peaks
from ...predict.memory import ACTIVATIONS, ALLOWANCE, EXCHANGED, Device, rank_memory, rank_states
from ..config import Config
from ..plan_layout import layout_of
from .finding import Finding, Verdict

CHECK = "memory"
GIB = 2**30

PARTS = (
    "parameters",
    "FP8 forms",
    "gradients",
    "optimizer",
    "activations",
    "working memory",
    "dispatch and transfers",
    "allowance",
)


# Of them what is predicted and not estimated.
EXACT = ("parameters", "gradients", "optimizer", "activations")


@dataclass(frozen=True)
class RankEstimate:
    """Bytes that a rank takes at most, by what they are.

    Attributes:
        stages: that it holds.
        parts: by the names in PARTS.
        host: of the parameters' moving average, in CPU memory.
        staging: of an asynchronous checkpoint's copy, in CPU memory.
    """

    stages: tuple[int, ...]
    parts: Mapping[str, int]
    host: int
    staging: int = 0

    @property
    def exact(self) -> int:
        """Bytes of it that are no estimate."""
        return sum(self.parts[name] for name in EXACT)

    @property
    def total(self) -> int:
        """Bytes of the memory where the rank computes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryEstimate:
    """What each pipeline rank takes; data-parallel ranks of one take the same.

    Attributes:
        ranks: by pipeline rank.
        device: "cuda" or "cpu".
        chunk_peak: most micro-batch chunks that each holds at once.
    """

    ranks: tuple[RankEstimate, ...]
    device: str
    chunk_peak: tuple[float, ...]

    @property
    def worst(self) -> int:
        """The pipeline rank that takes most."""
        totals = [rank.total for rank in self.ranks]
        return totals.index(max(totals))


def estimate_memory(config: Config, schedule: Schedule, *, device: str) -> MemoryEstimate:
    """Bytes of each pipeline rank of a run.

    Args:
        config: the run.
        schedule: of its largest step.
        device: "cuda" or "cpu", where it computes.
    """
    model, layout = config.model, layout_of(config)
    where: Device = "cuda" if device == "cuda" else "cpu"
    snapshot = config.checkpoint.enabled and config.checkpoint.asynchronous
    stages = layout.parts(model, schedule.num_stages)
    ranks: list[RankEstimate] = []
    found = rank_memory(model, layout, schedule, device=where, snapshot=snapshot)
    for pp_rank, memory in enumerate(found):
        held = schedule.placement.stages(pp_rank)
        states = rank_states(model, layout, tuple(stages[s] for s in held), device=where)
        of = memory.parts
        parts = {
            "parameters": states.parameters,
            "FP8 forms": of["FP8 weights"],
            "gradients": of["gradients"],
            "optimizer": states.optimizer,
            "activations": sum(of[name] for name in ACTIVATIONS),
            "working memory": of["working memory"],
            "dispatch and transfers": sum(of[name] for name in EXCHANGED),
            "allowance": sum(of[name] for name in ALLOWANCE),
        }
        assert tuple(parts) == PARTS
        assert sum(parts.values()) == memory.total
        averages = memory.host - memory.staging
        ranks.append(RankEstimate(held, parts, host=averages, staging=memory.staging))
    chunk = StageActivations(Split(attention=1), Split(attention=1), 0)
    chunks = tuple(float(peak.total) for peak in peaks(schedule, [chunk] * schedule.num_stages))
    return MemoryEstimate(tuple(ranks), device, chunks)


def memory_findings(
    estimate: MemoryEstimate,
    *,
    memory_bytes: int,
    ranks: int,
    node: str = "",
    host_bytes: int = 0,
) -> list[Finding]:
    """Whether a run fits: refused where what is exact does not, a warning where estimates do not.

    That it does not is the configuration's fault, unless few nodes have less memory than others.

    Args:
        estimate: of the run.
        memory_bytes: of one GPU; without GPUs of the whole machine; 0 if unknown.
        ranks: of the run on this machine.
        node: where that memory was found, "" if it was only told.
        host_bytes: of the machine, where `memory_bytes` is of a GPU; 0 if unknown.
    """
    on_cpu = estimate.device == "cpu"
    count = len(estimate.ranks)
    host = sum(rank.host + rank.staging for rank in estimate.ranks) / count * ranks
    if on_cpu:
        # Which pipeline ranks a machine gets nobody knows here: as many of each as can be.
        exact = sum(rank.exact for rank in estimate.ranks) / count * ranks
        needed = sum(rank.total for rank in estimate.ranks) / count * ranks + host
        what, of = f"{ranks} ranks take about", "the machine's"
    else:
        worst = estimate.worst
        exact = max(rank.exact for rank in estimate.ranks)
        needed = estimate.ranks[worst].total
        what, of = f"pipeline rank {worst} takes about", "a GPU's"
    found: list[Finding] = []
    if memory_bytes and needed > memory_bytes:
        bad = exact > memory_bytes
        largest = estimate.ranks[estimate.worst].parts
        most = sorted(largest, key=lambda name: -largest[name])[:3]
        shares = ", ".join(f"{name} {largest[name] / GIB:.1f}" for name in most)
        sure = f"at least {exact / GIB:.1f}" if bad else f"{exact / GIB:.1f} of it for sure"
        message = (
            f"{what} {needed / GIB:.1f} GiB, {sure}; {of} memory is {memory_bytes / GIB:.1f} "
            f"({shares} GiB); {_remedy(most[0])}"
        )
        verdict: Verdict = "bad" if bad else "warning"
        found.append(Finding(CHECK, verdict, message, node, kind="too small", configured=True))
    if not on_cpu and host_bytes and host > host_bytes:
        message = (
            f"{ranks} ranks keep about {host / GIB:.1f} GiB in the machine's memory of "
            f"{host_bytes / GIB:.1f} (moving averages, and the copy that an asynchronous "
            "checkpoint is written from); set checkpoint.asynchronous to false"
        )
        found.append(Finding(CHECK, "warning", message, node, kind="host"))
    return found


def _remedy(part: str) -> str:
    return {
        "optimizer": "set zero.stage to 1, train.moments to bfloat16, or raise mesh.dp",
        "activations": "lower train.sequences or data.sequence_length, or set recompute.norms and "
        "recompute.up_projections",
        "working memory": "lower train.sequences or data.sequence_length",
        "dispatch and transfers": "lower train.sequences or data.sequence_length",
    }.get(part, "raise mesh.pp or mesh.ep, or take a smaller model")
