"""What stages keep of a micro-batch, in bytes, and the most that a schedule has them keep at once.

Layers are those of `model.memory`; the output head and multi-token prediction are added here.
Shapes: T tokens of a micro-batch, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

from ..model import ModelConfig
from ..model.memory import (
    PADDING,
    Kept,
    Load,
    kept_between_halves,
    kept_for_backward,
    tiled_bytes,
)
from ..model.stages import Part
from ..model.storage import Storage
from ..parallel.schedule import Op, Pair, Schedule, actions

_INDEX = 8  # bytes of an int64


class Split(NamedTuple):
    """Bytes of activations by where they are from.

    Attributes:
        attention: with the norm before it.
        experts: routed and shared, the router and the norm before them.
        dense: feed-forward of layers without experts, and the norm before it.
        head: final norms, output heads and losses, and what joins the embedding and the hidden
            state for multi-token prediction.
    """

    attention: int = 0
    experts: int = 0
    dense: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


class StageActivations(NamedTuple):
    """Bytes that one chunk of a stage takes.

    Attributes:
        kept: from its forward to its backward.
        waiting: between the halves I and W of the backward.
        working: at most, for a moment, while one of its layers or the head computes: an estimate.
    """

    kept: Split
    waiting: Split
    working: int


class MicroBatch(NamedTuple):
    """What a rank is given at once.

    Attributes:
        sequences, length: how many, of how many tokens.
        ep: ranks that share a set of experts, each with a micro-batch of this size.
    """

    sequences: int
    length: int
    ep: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.sequences * self.length


@lru_cache(maxsize=4096)
def stage_activations(
    model: ModelConfig, storage: Storage, given: MicroBatch, part: Part, *, padded_heads: bool
) -> StageActivations:
    """Of one stage; experts get their rows as evenly as can be.

    Args:
        model: of which it is a part.
        storage: how activations are kept.
        given: the micro-batch.
        part: which.
        padded_heads: count what only CPUs keep.
    """
    found = [
        _layer(model, storage, given, moe=model.is_moe(index), padded_heads=padded_heads)
        for index in part.layers
    ]
    if part.head:
        found.append(_head(model, storage, given))
        found += (
            _prediction(model, storage, given, depth, padded_heads=padded_heads)
            for depth in range(1, model.num_nextn_predict_layers + 1)
        )
    return _added(found)


def _added(found: Sequence[StageActivations]) -> StageActivations:
    return StageActivations(
        kept=Split(*(sum(column) for column in zip(*(one.kept for one in found), strict=True))),
        waiting=Split(
            *(sum(column) for column in zip(*(one.waiting for one in found), strict=True))
        ),
        working=max((one.working for one in found), default=0),
    )


@lru_cache(maxsize=1024)
def _layer(
    model: ModelConfig, storage: Storage, given: MicroBatch, *, moe: bool, padded_heads: bool
) -> StageActivations:
    load = _load(model, given)

    def split(kept: Kept) -> Split:
        padding = 0 if padded_heads else kept.items.get(PADDING, 0)
        attention, rest = kept.attention - padding, kept.total - kept.attention
        return Split(attention, experts=rest) if moe else Split(attention, dense=rest)

    # While a layer is differentiated, all that is made again and a gradient of each of it.
    plain = kept_for_backward(model, Storage(storage.itemsize), load, moe=moe)
    return StageActivations(
        split(kept_for_backward(model, storage, load, moe=moe)),
        split(kept_between_halves(model, storage, load, moe=moe)),
        split(plain).total,
    )


def _load(model: ModelConfig, given: MicroBatch) -> Load:
    """A micro-batch's tokens, and the rows that this rank's experts get of its group's."""
    experts = model.n_routed_experts
    each, more = divmod(given.tokens * model.num_experts_per_tok * given.ep, experts)
    local = experts // given.ep
    # Of E experts `more` have one row more; this rank's share of them, rounded up.
    more = min(local, -(-more // given.ep))
    return Load(given.tokens, given.sequences, (each + 1,) * more + (each,) * (local - more))


def _head(model: ModelConfig, storage: Storage, given: MicroBatch) -> StageActivations:
    """Norm, output head and cross-entropy, which is computed in float32."""
    hidden = given.tokens * model.hidden_size * storage.itemsize
    logits = given.tokens * model.vocab_size
    normed = 0 if storage.norms else hidden
    # The norm keeps its input, the head its own, cross-entropy the logarithms of the shares.
    kept = hidden + normed + logits * storage.wide
    waiting = hidden + logits * storage.itemsize  # the head's input, or what it is made of again
    working = logits * (storage.itemsize + 2 * storage.wide)
    return StageActivations(Split(head=kept), Split(head=waiting), working)


def _prediction(
    model: ModelConfig, storage: Storage, given: MicroBatch, depth: int, *, padded_heads: bool
) -> StageActivations:
    """One depth of multi-token prediction, which sees `depth` tokens less of each sequence."""
    given = given._replace(length=given.length - depth)
    layer = _layer(
        model,
        storage,
        given,
        moe=model.is_moe(model.num_hidden_layers + depth - 1),
        padded_heads=padded_heads,
    )
    tokens, hidden, size = given.tokens, model.hidden_size, storage.itemsize
    joined = tiled_bytes(tokens, 2 * hidden) if storage.fp8 else 2 * tokens * hidden * size
    # Of the norms before the projection one keeps the embedding, the other the hidden state,
    # which for the first depth is what the output head keeps; and the embedding its tokens.
    shared = depth == 1 and not storage.norms
    inputs = (1 if shared else 2) * tokens * hidden * size + tokens * _INDEX
    gradient = tokens * hidden * (1 if storage.fp8 else size)
    projection = StageActivations(Split(head=joined + inputs), Split(head=joined + gradient), 0)
    return _added([layer, _head(model, storage, given), projection])


class _Moment(NamedTuple):
    """How many chunks a rank holds of each of its stages, as many numbers as it has stages.

    Attributes:
        kept: whose forward has run and whose backward has not.
        waiting: between I and W.
    """

    kept: tuple[int, ...]
    waiting: tuple[int, ...]


class Residence(NamedTuple):
    """What of a schedule decides how many activations its ranks hold, whatever their sizes.

    Attributes:
        fullest: per rank, moments of its row of which any other has at most as much of everything.
        pairs: whether steps are pairs, in which two chunks are worked on at once.
    """

    fullest: tuple[tuple[_Moment, ...], ...]
    pairs: bool


class _ByIdentity:
    """A schedule as the key of a cache: by value, its thousands of steps would be hashed each time.

    The cache holds the schedule, so that no other can come to stand in its place in memory.
    """

    __slots__ = ("schedule",)

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __hash__(self) -> int:
        return id(self.schedule)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and other.schedule is self.schedule


def residence(schedule: Schedule) -> Residence:
    """Of a schedule; worked out once for each object."""
    return _residence(_ByIdentity(schedule))


@lru_cache(maxsize=128)
def _residence(key: _ByIdentity) -> Residence:
    schedule = key.schedule
    return Residence(
        tuple(_fullest(schedule, rank) for rank in range(schedule.num_ranks)),
        any(isinstance(step, Pair) for row in schedule.rows for step in row),
    )


def _fullest(schedule: Schedule, rank: int) -> tuple[_Moment, ...]:
    """A rank's fullest moments, by the order of its row.

    As `parallel.simulate.memory` counts: what a forward keeps is there from its start on, what a
    backward lets go until its end, so that both chunks of a pair are held at once.
    """
    place = {stage: i for i, stage in enumerate(schedule.placement.stages(rank))}
    kept, waiting = [0] * len(place), [0] * len(place)
    moments: dict[_Moment, None] = {_Moment(tuple(kept), tuple(waiting)): None}
    for step in schedule.rows[rank]:
        parts = actions(step)
        for stage, op, _ in parts:
            if op is Op.F:
                kept[place[stage]] += 1
        if parts[0].op is Op.F:
            moments[_Moment(tuple(kept), tuple(waiting))] = None
        for stage, op, _ in parts:
            if op is Op.B or op is Op.I:
                kept[place[stage]] -= 1
            if op is Op.I:
                # In FP8 this may be more than what was kept: it is filled up to whole tiles, and
                # holds gradients too.
                waiting[place[stage]] += 1
            elif op is Op.W:
                waiting[place[stage]] -= 1
        if parts[-1].op is Op.I:
            moments[_Moment(tuple(kept), tuple(waiting))] = None
    return _undominated(moments)


def _undominated(moments: Iterable[_Moment]) -> tuple[_Moment, ...]:
    """Those of which no other has at least as much of everything."""
    found: list[_Moment] = []
    for moment in sorted(moments, key=lambda m: -sum(m.kept) - sum(m.waiting)):
        counts = (*moment.kept, *moment.waiting)
        if not any(
            all(a <= b for a, b in zip(counts, (*other.kept, *other.waiting), strict=True))
            for other in found
        ):
            found.append(moment)
    return tuple(found)


def peaks(schedule: Schedule, stages: Sequence[StageActivations]) -> list[Split]:
    """The most bytes of activations that each rank holds at once, as they are then.

    Args:
        schedule: whose rows say what is held.
        stages: what a chunk of each stage takes.
    """
    totals = [(stage.kept.total, stage.waiting.total) for stage in stages]
    found: list[Split] = []
    for rank, moments in enumerate(residence(schedule).fullest):
        held = schedule.placement.stages(rank)
        sizes = [totals[stage] for stage in held]
        most = max(moments, key=partial(_size, sizes))
        found.append(_split([stages[stage] for stage in held], most))
    return found


def _size(sizes: Sequence[tuple[int, int]], moment: _Moment) -> int:
    return sum(
        kept * one + waiting * other
        for (one, other), kept, waiting in zip(sizes, moment.kept, moment.waiting, strict=True)
    )


def _split(stages: Sequence[StageActivations], moment: _Moment) -> Split:
    sums = [0] * len(Split._fields)
    for stage, kept, waiting in zip(stages, moment.kept, moment.waiting, strict=True):
        for i, (one, other) in enumerate(zip(stage.kept, stage.waiting, strict=True)):
            sums[i] += kept * one + waiting * other
    return Split(*sums)
