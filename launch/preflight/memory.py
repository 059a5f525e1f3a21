"""What a run will take of each rank's memory, and whether that is there, before anything starts.

Parameters, gradients and optimizer states are exact, ZeRO's shares to their rounding. Activations
are those that the schedule holds at its peak, each chunk by what its layers keep (`activations`),
with experts' rows spread evenly. A run is refused for these alone.
What a layer works with for a moment, what moves on its way, and what CUDA and NCCL take are
estimates, and called so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...fp8.formats import tiles_in
from ...parallel.schedule import Op, Pair, Schedule, actions
from ...parallel.simulate import Costs, Memory, memory_of, simulate
from ..config import Config
from .activations import StageActivations, activations
from .finding import Finding, Verdict
from .sizes import Weight, stage_weights

CHECK = "memory"
GIB = 2**30

# Estimates for a rank on a GPU: its context with torch's kernels, the buffers of NCCL's
# communicators, and what torch's allocator cannot use of what it holds.
_CONTEXT_BYTES = 600 << 20
_NCCL_BYTES = 1 << 30
_FRAGMENTED = 0.04
# A process on a CPU, torch imported.
_PROCESS_BYTES = 350 << 20
_MESSAGES = 4  # of a pipeline rank that are on their way or received ahead
_UPDATED_BYTES = 3 * 4 << 22  # that AdamW with bfloat16 moments works with, piece by piece

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
    weights = stage_weights(config, schedule)
    stages = activations(config, schedule.num_stages, padded_heads=device == "cpu")
    peaks = activation_peaks(schedule, stages)
    pairs = any(isinstance(step, Pair) for row in schedule.rows for step in row)
    ranks: list[RankEstimate] = []
    for pp_rank, peak in enumerate(peaks):
        held = schedule.placement.stages(pp_rank)
        mine: dict[str, Weight] = {}
        for stage in held:
            mine |= weights[stage]  # what two stages of a rank share is one parameter
        parts = _static(config, mine, device)
        working = (2 if pairs else 1) * max(stages[stage].working for stage in held)
        # Activations are gone when the optimizer computes, so what it works with may fit there.
        update = update_bytes(config, mine, device)
        parts["activations"] = peak
        parts["working memory"] = max(working, update - peak)
        parts["dispatch and transfers"] = _moving(config)
        parts["allowance"] = _allowance(sum(parts.values()), device)
        parts = {name: parts[name] for name in PARTS}
        averaged = 0
        if config.train.ema_decay is not None:
            averaged = sum(-(-_local(config, w) // _sharers(config, w)) for w in mine.values())
        saved = 0
        if config.checkpoint.enabled and config.checkpoint.asynchronous:
            # All that the rank holds, whoever else holds it too; of averages not what is on its way
            # into them.
            saved = parts["parameters"] + parts["optimizer"] + 4 * averaged
        ranks.append(RankEstimate(held, parts, host=8 * averaged, staging=saved))
    chunks = tuple(rank.peak for rank in memory_of(simulate(schedule, Costs()), Memory()))
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


def _local(config: Config, weight: Weight) -> int:
    """Numbers of a parameter that one rank has."""
    return weight.numel // (config.mesh.ep if weight.routed else 1)


def _sharers(config: Config, weight: Weight) -> int:
    """Ranks that share the states of a parameter out: with ZeRO, those that hold the same numbers.

    Experts are held by dp / ep of the ranks that see other data.
    """
    shape = config.mesh
    if not config.zero.stage:
        return 1
    return shape.dp // shape.ep if weight.routed else shape.dp


def _static(config: Config, weights: Mapping[str, Weight], device: str) -> dict[str, int]:
    """What is there throughout: parameters, gradients, optimizer states."""
    found: dict[str, int] = dict.fromkeys(PARTS[:4], 0)
    for weight in weights.values():
        numel = _local(config, weight)
        found["parameters"] += numel * weight.dtype.itemsize
        # Below float32 gradients are added up in float32.
        found["gradients"] += numel * weight.updated.itemsize
        states = weight.moment_bytes(config.moments) + weight.master_bytes
        sharers = _sharers(config, weight)
        found["optimizer"] += -(-states * numel // (weight.numel * sharers))
        if weight.fp8:  # on a GPU also turned, as its products read both along the contraction
            copies = 2 if device == "cuda" else 1
            found["FP8 forms"] += copies * (numel + 4 * -(-numel // 128**2))
    return found


def update_bytes(config: Config, weights: Mapping[str, Weight], device: str) -> int:
    """Copies that the optimizer makes while it computes; torch's, on a GPU, of all at once.

    Args:
        config: the run.
        weights: of one rank, by name.
        device: "cuda" or "cpu".
    """
    if config.moments == "bfloat16":
        return _UPDATED_BYTES
    sizes = [
        -(-_local(config, w) // _sharers(config, w)) * w.updated.itemsize for w in weights.values()
    ]
    return sum(sizes) if device == "cuda" else 2 * max(sizes, default=0)


def activation_peaks(schedule: Schedule, stages: Sequence[StageActivations]) -> list[int]:
    """The most bytes of activations that each rank holds at once, by the order of its row.

    As `parallel.simulate.memory` counts, except that what waits between I and W may be more than
    what was kept before: in FP8 it is filled up to whole tiles, and holds gradients too.
    """
    peaks: list[int] = []
    for row in schedule.rows:
        held = peak = 0
        for step in row:
            parts = actions(step)
            held += sum(stages[stage].kept for stage, op, _ in parts if op is Op.F)
            peak = max(peak, held)
            for stage, op, _ in parts:
                kept, waiting = stages[stage].kept, stages[stage].waiting
                if op is Op.B:
                    held -= kept
                elif op is Op.I:
                    held += waiting - kept
                elif op is Op.W:
                    held -= waiting
            peak = max(peak, held)
        peaks.append(peak)
    return peaks


def _moving(config: Config) -> int:
    """Estimate of messages between stages, and of rows sent and received by experts' exchange."""
    import torch

    size = getattr(torch, config.train.dtype).itemsize
    hidden = config.model.hidden_size
    tokens = config.train.sequences * config.data.sequence_length
    messages = _MESSAGES * tokens * hidden * size if config.mesh.pp > 1 else 0
    if config.mesh.ep == 1:
        return messages
    rows = tokens * config.model.num_experts_per_tok
    there = hidden + 4 * tiles_in(hidden) if config.payload == "fp8" else hidden * size
    back = hidden * (size if config.payload == "exact" else 2)
    return messages + 2 * rows * (there + back)


def _allowance(used: int, device: str) -> int:
    if device == "cpu":
        return _PROCESS_BYTES
    return _CONTEXT_BYTES + _NCCL_BYTES + round(_FRAGMENTED * used)
