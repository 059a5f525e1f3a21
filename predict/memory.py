"""What a step takes of each pipeline rank's memory, by what it is.

Weights, gradients and optimizer states are exact, ZeRO's shares to their rounding. Activations are
those that the schedule holds at its peak (`activations`), with experts' rows spread evenly. What a
layer works with for a moment, what moves on its way, and what CUDA, NCCL and torch's allocator take
are estimates. The savings are those of arXiv 2412.19437: ZeRO-1 (section 3.2), what is made again
and averages on the host (3.2.3), forms of eight and twelve bits and moments in BF16 (3.3.3).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from typing import Literal, NamedTuple

from ..model import ModelConfig
from ..model.inventory import Parameter, inventory
from ..model.stages import Part
from ..model.storage import Storage
from ..parallel.schedule import Schedule
from ..parallel.zero_ends import BUCKET_BYTES
from .activations import MicroBatch, peaks, residence, stage_activations
from .layout import Layout
from .prediction import RankMemory

Device = Literal["cuda", "cpu"]

# Estimates for a rank on a GPU: its context with torch's kernels, the buffers of NCCL's
# communicators, and what torch's allocator cannot use of what it holds.
_CONTEXT_BYTES = 600 << 20
_NCCL_BYTES = 1 << 30
_FRAGMENTED = 0.04
# A process on a CPU, torch imported.
_PROCESS_BYTES = 350 << 20
_MESSAGES = 4  # of a pipeline rank that are on their way or received ahead
_UPDATED_BYTES = 3 * 4 << 22  # that AdamW with bfloat16 moments works with, piece by piece
_BLOCK = 128**2  # numbers of a weight in FP8 that share a scale
_AVERAGE_BYTES = 4  # of a number of the moving average, a float32

STATES = ("weights", "master weights", "gradients", "moments")
ACTIVATIONS = (
    "activations of attention",
    "activations of experts",
    "activations of dense layers",
    "activations of heads",
)
EXCHANGED = ("pipeline messages", "dispatch buffers", "ZeRO buffers")
ALLOWANCE = ("NCCL buffers", "context", "fragmentation")

# What is predicted and not estimated.
EXACT = (*STATES, *ACTIVATIONS)
CATEGORIES = (
    *("weights", "FP8 weights", "master weights", "gradients", "moments"),
    *ACTIVATIONS,
    "working memory",
    *EXCHANGED,
    *ALLOWANCE,
)


class States(NamedTuple):
    """Bytes of a rank that are there throughout, and what an update takes beside them.

    Attributes:
        weights: parameters in the dtype that they compute in.
        masters: parameters in float32 whose products are computed by FP8 forms.
        fp8: these forms.
        gradients: of all parameters, in float32 at least.
        copies: float32 masters that AdamW has of parameters below float32; ZeRO shares them out.
        moments: both of AdamW; ZeRO shares them out.
        update: that the optimizer works with.
        buckets: of ZeRO's messages, beside the gradients, once the backwards have ended.
        averaged: bytes of the moving average, where there is one.
    """

    weights: int
    masters: int
    fp8: int
    gradients: int
    copies: int
    moments: int
    update: int
    buckets: int
    averaged: int

    @property
    def parameters(self) -> int:
        """Of the modules' parameters."""
        return self.weights + self.masters

    @property
    def optimizer(self) -> int:
        """Of the optimizer's states."""
        return self.copies + self.moments


class _Sharing(NamedTuple):
    """What of a layout decides how the states of a rank's parameters are kept."""

    moments: str
    zero: int
    dp: int
    ep: int


def storage_of(layout: Layout) -> Storage:
    """How a layout keeps weights and activations."""
    return Storage(
        layout.itemsize,
        fp8=layout.fp8,
        e5m6=layout.fp8 and layout.e5m6,
        norms=layout.recompute_norms,
        up_projections=layout.recompute_up_projections,
    )


def rank_memory(
    model: ModelConfig,
    layout: Layout,
    schedule: Schedule,
    *,
    device: Device = "cuda",
    snapshot: bool = True,
) -> tuple[RankMemory, ...]:
    """The most bytes that each pipeline rank takes; data-parallel ranks of one take the same.

    What takes long is worked out once for a schedule, which is told by identity: who asks for many
    layouts hands the same one over again.

    Args:
        model: of which a step is predicted.
        layout: how it is spread.
        schedule: of a step, usually `layout.make_schedule()`.
        device: where ranks compute.
        snapshot: checkpoints are written from a copy in the host's memory while training goes on.

    Returns:
        Per pipeline rank, by CATEGORIES.

    Raises:
        ValueError: the schedule is of another number of ranks, or the model cannot be cut so.
    """
    return _ranks(model, layout, schedule, storage_of(layout), device, snapshot)


def _ranks(
    model: ModelConfig,
    layout: Layout,
    schedule: Schedule,
    kept: Storage,
    device: Device,
    snapshot: bool,
) -> tuple[RankMemory, ...]:
    """As `rank_memory`, activations `kept` in some way of their own."""
    if schedule.num_ranks != layout.pp:
        raise ValueError(
            f"a schedule of {schedule.num_ranks} ranks cannot run on pp={layout.pp}; build it for "
            "as many"
        )
    parts = layout.parts(model, schedule.num_stages)
    given = MicroBatch(layout.sequences, layout.length, layout.ep)
    stages = [
        stage_activations(model, kept, given, part, padded_heads=device == "cpu") for part in parts
    ]
    at_once = 2 if residence(schedule).pairs else 1
    messages, buffers = _exchanged(model, layout)
    found: list[RankMemory] = []
    for rank, peak in enumerate(peaks(schedule, stages)):
        held = schedule.placement.stages(rank)
        states = rank_states(model, layout, tuple(parts[stage] for stage in held), device=device)
        working = at_once * max(stages[stage].working for stage in held)
        # Activations are gone when gradients are reduced and the optimizer computes, one after the
        # other: what these take, and layers before them, lies in the same place.
        buckets = max(0, states.buckets - peak.total)
        sizes = {
            "weights": states.weights,
            "FP8 weights": states.fp8,
            "master weights": states.masters + states.copies,
            "gradients": states.gradients,
            "moments": states.moments,
            **dict(zip(ACTIVATIONS, peak, strict=True)),
            "working memory": max(0, max(working, states.update - peak.total) - buckets),
            "pipeline messages": messages,
            "dispatch buffers": buffers,
            "ZeRO buffers": buckets,
        }
        sizes |= _allowance(sum(sizes.values()), device)
        staging = 0
        averaged = states.averaged if layout.ema else 0
        if snapshot:
            # All that the rank holds, whoever else holds it too; of averages not what is on its way
            # into them.
            staging = states.parameters + states.optimizer + averaged
        found.append(RankMemory(sizes, host=2 * averaged + staging, staging=staging))
    return tuple(found)


def saved(
    model: ModelConfig, layout: Layout, schedule: Schedule, *, device: Device = "cuda"
) -> dict[str, int]:
    """What each of a layout's savings spares the fullest rank, bytes, by the saving's name.

    Each is turned off alone. They overlap, so that they do not add up: an output that is made again
    takes nothing, in whatever form it was kept otherwise. What the layout does not use is not
    there.

    Args: as of `rank_memory`.
    """
    kept = storage_of(layout)

    def fullest(layout: Layout, kept: Storage, beside: tuple[int, ...] = ()) -> int:
        ranks = _ranks(model, layout, schedule, kept, device, snapshot=False)
        return max(
            rank.total + more for rank, more in zip(ranks, beside or (0,) * len(ranks), strict=True)
        )

    least = fullest(layout, kept)
    found: dict[str, int] = {}
    for name, on, changed in (
        ("FP8 activations", kept.fp8, replace(kept, fp8=False, e5m6=False)),
        ("E5M6", kept.e5m6, replace(kept, e5m6=False)),
        ("norms made again", kept.norms, replace(kept, norms=False)),
        ("up-projections made again", kept.up_projections, replace(kept, up_projections=False)),
    ):
        if on:
            found[name] = fullest(layout, changed) - least
    if layout.moments == "bfloat16":
        found["BF16 moments"] = fullest(replace(layout, moments="float32"), kept) - least
    if layout.zero:
        found["ZeRO-1"] = fullest(replace(layout, zero=0), kept) - least
    if layout.ema:
        ranks = rank_memory(model, layout, schedule, device=device, snapshot=False)
        # Half of what the host has of them is on its way.
        averages = tuple(_with_fragments(rank.host // 2, device) for rank in ranks)
        found["average on the host"] = fullest(layout, kept, averages) - least
    return found


def rank_states(
    model: ModelConfig, layout: Layout, parts: tuple[Part, ...], *, device: Device
) -> States:
    """Of a rank that holds these parts; what several of them have is one parameter.

    Args:
        model: of which they are.
        layout: how it is spread.
        parts: the rank's.
        device: where it computes.
    """
    sharing = _Sharing(layout.moments, layout.zero, layout.dp, layout.ep)
    # What is made again changes no state, so that layouts which differ in it share an entry.
    storage = Storage(layout.itemsize, fp8=layout.fp8)
    return _states(model, parts, storage, sharing, device)


@lru_cache(maxsize=4096)
def _states(
    model: ModelConfig,
    parts: tuple[Part, ...],
    storage: Storage,
    sharing: _Sharing,
    device: Device,
) -> States:
    sums = Counter[str]()
    updated: list[int] = []  # bytes of each parameter's share that AdamW updates
    for parameter, count in _alike(model, parts):
        numel = _held(parameter, sharing)
        size, sharers = parameter.itemsize(storage), _sharers(parameter, sharing)
        masters = storage.fp8 and parameter.product
        sums["masters" if masters else "weights"] += count * numel * size
        if masters:  # on a GPU also turned, as its products read both along the contraction
            forms = 2 if device == "cuda" else 1
            sums["fp8"] += count * forms * (numel + 4 * -(-numel // _BLOCK))
        # Below float32 gradients are added up in float32.
        sums["gradients"] += count * numel * storage.wide
        shared = -(-numel // sharers)
        sums["copies"] += count * shared * master_bytes(parameter, storage)
        sums["moments"] += count * shared * moment_bytes(storage, sharing.moments)
        updated += [shared * storage.wide] * count
        sums["averaged"] += count * _AVERAGE_BYTES * shared
    # Torch's optimizer makes copies while it computes, on a GPU of all parameters at once.
    update = sum(updated) if device == "cuda" else 2 * max(updated, default=0)
    if sharing.moments == "bfloat16":
        update = _UPDATED_BYTES
    return States(
        *(sums[name] for name in ("weights", "masters", "fp8", "gradients", "copies", "moments")),
        update=update,
        buckets=_buckets(model, parts, storage, sharing, device) if sharing.zero else 0,
        averaged=sums["averaged"],
    )


def _buckets(
    model: ModelConfig,
    parts: tuple[Part, ...],
    storage: Storage,
    sharing: _Sharing,
    device: Device,
) -> int:
    """Bytes of ZeRO's messages beside the gradients, whose place packed ones take.

    First one more bucket than there are gradients is packed, and shares of the sums arrive; gloo,
    which the CPU has, adds up on a copy. Then, gradients being gone, shares of the parameters are
    sent and wholes arrive.
    """
    reduced = gathered = 0
    for parameter, count in _alike(model, parts):
        sharers = _sharers(parameter, sharing)
        if sharers == 1:
            continue
        numel = _held(parameter, sharing)
        shared = -(-numel // sharers)
        copied = numel if device == "cpu" else 0
        reduced += count * (shared + copied) * storage.wide
        moving = (shared + numel) * parameter.itemsize(storage)
        gathered += count * ((shared - numel) * storage.wide + moving)
    largest = 0
    for part in parts:  # a bucket's parameters are of one stage, group and dtype
        kinds: dict[tuple[bool, int], list[int]] = {}
        for parameter in inventory(model, part):
            num_bytes = _held(parameter, sharing) * storage.wide
            kinds.setdefault((parameter.routed, parameter.itemsize(storage)), []).append(num_bytes)
        for sizes in kinds.values():
            largest = max(largest, min(sum(sizes), max(BUCKET_BYTES, *sizes)))
    return max(reduced + largest, gathered, 0)


@lru_cache(maxsize=4096)
def _alike(model: ModelConfig, parts: tuple[Part, ...]) -> tuple[tuple[Parameter, int], ...]:
    """Parameters of a rank without their names, and how many it has of each."""
    named = {p.name: p for part in parts for p in inventory(model, part)}
    return tuple(Counter(p._replace(name="") for p in named.values()).items())


def _held(parameter: Parameter, sharing: _Sharing) -> int:
    """Numbers of a parameter that a rank holds: of experts its own."""
    return parameter.numel // (sharing.ep if parameter.routed else 1)


def _sharers(parameter: Parameter, sharing: _Sharing) -> int:
    """Ranks that share the states of a parameter out: with ZeRO, those that hold the same numbers.

    Experts are held by dp / ep of the ranks that see other data.
    """
    if not sharing.zero:
        return 1
    return sharing.dp // sharing.ep if parameter.routed else sharing.dp


def moment_bytes(storage: Storage, moments: str) -> int:
    """Of both moments of a number; "float32" stands for the dtype of what is updated."""
    return 2 * (2 if moments == "bfloat16" else storage.wide)


def master_bytes(parameter: Parameter, storage: Storage) -> int:
    """Of the float32 that AdamW updates for a number of a parameter below it; else 0."""
    return storage.wide if parameter.itemsize(storage) < storage.wide else 0


def _exchanged(model: ModelConfig, layout: Layout) -> tuple[int, int]:
    """Estimate of messages between stages, and of rows sent and received by experts' exchange."""
    hidden = model.hidden_size
    messages = _MESSAGES * layout.tokens * hidden * layout.itemsize if layout.pp > 1 else 0
    if layout.ep == 1:
        return messages, 0
    rows = layout.tokens * model.num_experts_per_tok
    ways = (layout.payload_sizes.parts(hidden, spread=spread) for spread in (True, False))
    row_bytes = sum(size * items for way in ways for size, items in way)
    return messages, 2 * rows * row_bytes


def _allowance(used: int, device: Device) -> dict[str, int]:
    lost = _with_fragments(used, device) - used
    libraries = (0, _PROCESS_BYTES) if device == "cpu" else (_NCCL_BYTES, _CONTEXT_BYTES)
    return dict(zip(ALLOWANCE, (*libraries, lost), strict=True))


def _with_fragments(used: int, device: Device) -> int:
    return used if device == "cpu" else used + round(_FRAGMENTED * used)
