"""The same collective on several ranks: by process group and sequence number, else by order.

NCCL's metadata numbers a group's collectives, which settles what belongs together. Without it, the
n-th collective of a kind within a phase and layer is the n-th on every rank that has this phase and
layer, if all of them have equally many; of pipeline stages or replicas whose annotations tell no
difference this makes one group of several, unless the ranks of the group are told
(`is_of_one_group` says where that is certain). What cannot be matched even so is left out, counted
and told.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from .trace import Exchange, Interval


class Collective(NamedTuple):
    """One rank's part in a collective.

    Attributes:
        interval: when its kernel, or on a CPU its move, ran; ns on the rank's clock.
        kind: what it does and whose it is: ("dispatch", "DeepEP"), ("allreduce", "NCCL").
        phase: that it belongs to; "" if none.
        layer: likewise; None if not told.
        exchange: what it says of itself; None if nothing.
        binds: each rank needs something of every other, so that none ends before all have begun.
    """

    interval: Interval
    kind: tuple[str, str]
    phase: str = ""
    layer: int | None = None
    exchange: Exchange | None = None
    binds: bool = True

    @property
    def duration(self) -> int:
        """How long it ran, ns."""
        return self.interval[1] - self.interval[0]

    @property
    def name(self) -> str:
        """What its phase is called; without one, what it does."""
        told = self.exchange.collective if self.exchange else ""
        return self.phase or told or self.kind[0] or self.kind[1]


class Matched(NamedTuple):
    """A collective and all ranks' parts in it.

    Attributes:
        parts: by rank; two ranks or more.
        by_sequence: matched by group and sequence number, not by order.
    """

    parts: Mapping[int, Collective]
    by_sequence: bool

    @property
    def first(self) -> Collective:
        """The part of the first rank, which tells the name, phase and layer for all."""
        return next(iter(self.parts.values()))


def is_of_one_group(
    matched: Matched, world_size: int | None, groups: Collection[tuple[int, ...]] = ()
) -> bool:
    """Whether its ranks are known to be of one group, rather than taken for one.

    Where nothing tells the group, ranks of several groups can be alike: two replicas' experts. Not
    among three ranks or fewer that are all there are, as a group of one exchanges nothing.

    Args:
        matched: with all its parts.
        world_size: ranks of the run; None if not told.
        groups: ranks of all process groups there are; () if not told. If each that has any two of
            the collective's ranks has all of them, the collective's has.
    """
    exchange = matched.first.exchange
    told = exchange is not None and bool(exchange.group or exchange.group_ranks)
    few = world_size is not None and world_size <= _SURELY_ONE
    ranks = set(matched.parts)
    only = bool(groups) and all(
        ranks <= set(group) for group in groups if len(ranks.intersection(group)) > 1
    )
    return matched.by_sequence or told or few or only


class Unmatched(NamedTuple):
    """Collectives of one kind that were not matched across ranks.

    Attributes:
        name: phase and layer, or the collective's kind.
        counts: (rank, how many it has that were left out), of the ranks that have any.
        reason: why, as the end of a sentence.
    """

    name: str
    counts: tuple[tuple[int, int], ...]
    reason: str


class Matching(NamedTuple):
    """All collectives of all ranks: those found on every rank, and the rest."""

    matched: tuple[Matched, ...]
    unmatched: tuple[Unmatched, ...]


_Group: TypeAlias = tuple[str, tuple[int, ...]]  # name and ranks: subgroups may share a name
_Parts: TypeAlias = dict[int, Collective]

_SURELY_ONE = 3  # ranks
_NOT_ON_ALL = "not every rank of the group has it, as traces begin or end at different moments"


def match(collectives: Mapping[int, Sequence[Collective]]) -> Matching:
    """What belongs together.

    Args:
        collectives: by rank, each rank's in the order of their start.
    """
    numbered: dict[int, list[Collective]] = {}
    others: dict[int, list[Collective]] = {}
    for rank, parts in collectives.items():
        numbered[rank] = [part for part in parts if _is_numbered(part)]
        others[rank] = [part for part in parts if not _is_numbered(part)]
    by_number, left = _by_sequence(numbered)
    by_order, also_left = _by_order(others)
    base = next(iter(collectives), 0)
    found = sorted(
        [*by_number, *by_order],
        key=lambda one: (base not in one.parts, one.first.interval),
    )
    return Matching(tuple(found), (*left, *also_left))


def _is_numbered(part: Collective) -> bool:
    exchange = part.exchange
    return exchange is not None and exchange.sequence is not None and bool(exchange.group)


def _group(part: Collective) -> _Group:
    return (part.exchange.group, part.exchange.group_ranks) if part.exchange else ("", ())


def _by_sequence(
    collectives: Mapping[int, Sequence[Collective]],
) -> tuple[list[Matched], list[Unmatched]]:
    members: defaultdict[_Group, set[int]] = defaultdict(set)
    found: defaultdict[tuple[_Group, object], _Parts] = defaultdict(dict)
    for rank, parts in collectives.items():
        seen: Counter[tuple[object, ...]] = Counter()
        for part in parts:
            exchange = part.exchange
            assert exchange is not None
            group = _group(part)
            members[group].add(rank)
            # Several kernels may carry one number (coalesced collectives): told apart by order.
            number = (exchange.sequence, exchange.collective)
            found[group, (*number, seen[group, number])][rank] = part
            seen[group, number] += 1
    matched: list[Matched] = []
    left: list[tuple[str, _Parts]] = []
    for (group, _), parts in found.items():
        traced = members[group]
        reason = _several_groups(parts, traced)
        if reason:
            left.append((reason, parts))
        elif len(traced) == 1:
            left.append((f"no other rank of group {group[0]!r} has a trace with any", parts))
        elif len(parts) < len(traced):
            left.append((_NOT_ON_ALL, parts))
        else:
            matched.append(Matched(parts, by_sequence=True))
    return matched, _told(left)


def _by_order(
    collectives: Mapping[int, Sequence[Collective]],
) -> tuple[list[Matched], list[Unmatched]]:
    alike: defaultdict[tuple[object, ...], dict[int, list[Collective]]] = defaultdict(dict)
    for rank, parts in collectives.items():
        for part in parts:
            told = part.exchange.collective if part.exchange else ""
            key = (part.kind, told, _group(part), part.phase, part.layer)
            alike[key].setdefault(rank, []).append(part)
    matched: list[Matched] = []
    left: list[tuple[str, _Parts]] = []
    for runs in alike.values():
        together = [
            dict(zip(runs, each, strict=True)) for each in zip(*runs.values(), strict=False)
        ]
        reason = _several_groups(together[0], runs)
        if len(runs) == 1:
            reason = "only one rank has any"
        elif len({len(parts) for parts in runs.values()}) > 1:
            reason = "ranks have different numbers of them, so the n-th need not be the same one"
        if not reason:
            matched.extend(Matched(parts, by_sequence=False) for parts in together)
            continue
        for rank, parts in runs.items():
            left.extend((reason, {rank: part}) for part in parts)
    return matched, _told(left)


def _several_groups(parts: _Parts, ranks: Collection[int]) -> str:
    """Why ranks that have a group of one name cannot all be of one group; "" if they can."""
    exchange = next(iter(parts.values())).exchange
    if exchange is None or exchange.group_ranks or exchange.group_size is None:
        return ""
    if len(ranks) <= exchange.group_size:
        return ""
    return (
        f"{len(ranks)} ranks have a group {exchange.group!r} of {exchange.group_size}: several "
        "groups share the name"
    )


def _told(left: Iterable[tuple[str, _Parts]]) -> list[Unmatched]:
    """One entry for what has the same name, layer and reason."""
    counts: defaultdict[tuple[str, str], Counter[int]] = defaultdict(Counter)
    for reason, parts in left:
        for rank, part in parts.items():
            name = part.name if part.layer is None else f"{part.name} layer {part.layer}"
            counts[name, reason][rank] += 1
    return [
        Unmatched(name, tuple(sorted(by_rank.items())), reason)
        for (name, reason), by_rank in counts.items()
    ]
