"""The best order in which a pair of layers issues its phases, for measured times of these phases.

The order of the published trace is good where computation and communication take about as long. For
other times another order may be shorter; there are few enough to try them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..schedule.interleaving import PUBLISHED_ORDER
from .amounts import check_amount, unknown_name
from .phases import NAMES

# Parts of mlp that need no communication; they may be given apart.
SHARED = ("shared(F)", "shared(B)", "shared(W)")
# What each phase needs within a layer, and what the next layer's first phase needs of this one.
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "attn(F)": (),
    "dispatch(F)": ("attn(F)",),
    "shared(F)": ("attn(F)",),
    "mlp(F)": ("dispatch(F)",),
    "combine(F)": ("mlp(F)",),
    "combine(B)": (),
    "shared(B)": (),
    "mlp(B)": ("combine(B)",),
    "dispatch(B)": ("mlp(B)",),
    "attn(B)": ("dispatch(B)", "shared(B)"),
    "shared(W)": ("shared(B)",),
    "mlp(W)": ("mlp(B)",),
    "attn(W)": ("attn(B)",),
}
_OF_LAYER_BEFORE: Mapping[str, tuple[str, ...]] = {
    "attn(F)": ("combine(F)", "shared(F)"),
    "combine(B)": ("attn(B)",),
    "shared(B)": ("attn(B)",),
}


@dataclass(frozen=True)
class BestOrder:
    """What the search found.

    Attributes:
        order: for `Interleaving(pair=...)`.
        time: that this many layers take in it, in the unit of the phases' times.
        published: that they take in the order of the published trace.
        bound: that no order can be faster than: the longer of the two lanes.
        layers: of each chunk.
        tried: how many orders.
    """

    order: tuple[str, ...]
    time: float
    published: float
    bound: float
    layers: int
    tried: int


def best_order(times: Mapping[str, float], *, layers: int = 4) -> BestOrder:
    """Try all orders of a pair of chunks with these times and return the fastest.

    Of several as fast it is the one that shares the longest beginning with the published order.

    Args:
        times: of each of `phases.NAMES` and, where they are not part of mlp's, of any of SHARED.
        layers: of each chunk; more weigh what happens between layers higher.

    Raises:
        ValueError: a phase is missing, unknown or negative.
    """
    for name in times:
        if name not in _NEEDS:
            raise ValueError(f"phases: {unknown_name(name, (*NAMES, *SHARED))}")
        check_amount(f"phases: {name}", times[name])
    for name in NAMES:
        if name not in times:
            raise ValueError(f"phases: no time for {name!r}; each of {', '.join(NAMES)} has one")
    if layers < 1:
        raise ValueError(f"layers={layers} must be a whole number from 1 up")
    communicating = [name for name in times if name.startswith(("dispatch", "combine"))]
    computing = [name for name in times if name not in communicating]
    published = _with_shared(PUBLISHED_ORDER, times)
    best: tuple[float, tuple[int, ...], tuple[str, ...]] | None = None
    tried = 0
    for one in _orders(computing):
        for other in _orders(communicating):
            order = _merged(one, other, published)
            if order is None:
                continue
            tried += 1
            time = pair_time(order, times, layers)
            if best is None or time <= best[0]:
                found = time, tuple(published.index(name) for name in order), order
                best = found if best is None else min(best, found)
    assert best is not None  # the published order is among them
    lanes = [sum(times[name] for name in lane) for lane in (computing, communicating)]
    return BestOrder(
        best[2], best[0], pair_time(published, times, layers), max(lanes) * layers, layers, tried
    )


def pair_time(order: Sequence[str], times: Mapping[str, float], layers: int) -> float:
    """How long a forward and a backward of `layers` layers take together in `order`.

    The same as the end of `Phases.pair`, with the shared experts apart if they are.
    """
    lane = {name: name.startswith(("dispatch", "combine")) for name in order}
    free = {False: 0.0, True: 0.0}
    before: dict[str, float] = {}
    for _ in range(layers):
        ended: dict[str, float] = {}
        for name in order:
            start = free[lane[name]]
            for need in _NEEDS[name]:
                start = max(start, ended.get(need, 0.0))
            for need in _OF_LAYER_BEFORE.get(name, ()):
                start = max(start, before.get(need, 0.0))
            free[lane[name]] = ended[name] = start + times[name]
        before = ended
    return max(free.values())


def _with_shared(order: Sequence[str], names: Mapping[str, float]) -> tuple[str, ...]:
    """The order with shared experts, where they are apart, as `Interleaving` places them unnamed.

    That is right before the routed ones in the forward and right after them in the backward.
    """
    found: list[str] = []
    for name in order:
        both = [name.replace("mlp", "shared"), name]
        with_shared = [each for each in dict.fromkeys(both) if each == name or each in names]
        found += with_shared if name.endswith("(F)") else with_shared[::-1]
    return tuple(found)


def _orders(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """All orders of one lane's phases in which none comes before one that it needs there."""
    reachable = {name: _needed(name) & set(names) for name in names}

    def extend(done: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if len(done) == len(names):
            yield done
        for name in names:
            if name not in done and reachable[name] <= set(done):
                yield from extend((*done, name))

    return extend(())


def _needed(name: str) -> set[str]:
    """Everything that a phase needs, directly or not, within its layer."""
    found: set[str] = set()
    for need in _NEEDS[name]:
        found |= {need} | _needed(need)
    return found


def _merged(
    computing: Sequence[str], communicating: Sequence[str], published: Sequence[str]
) -> tuple[str, ...] | None:
    """One order with these two lanes, nothing before what it needs; None where there is none.

    Where either lane could go on, the phase that the published order has first does.
    """
    lanes = [list(computing), list(communicating)]
    names = {*computing, *communicating}
    order: list[str] = []
    while lanes[0] or lanes[1]:
        ready = [
            lane
            for lane in lanes
            if lane and all(need in order or need not in names for need in _NEEDS[lane[0]])
        ]
        if not ready:
            return None
        chosen = min(ready, key=lambda lane: published.index(lane[0]))
        order.append(chosen.pop(0))
    return tuple(order)
