"""How unevenly routing loads the ranks, from what each received or, failing that, computed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .matching import Collective, Matched
from .report import Phase, Report

# The best first; "dispatch" is of traces without annotations, and "" in no phase.
_DISPATCHES = ("dispatch(F)", "dispatch", "")
_EXPERTS = "mlp(F)"


class LayerLoad(NamedTuple):
    """One layer's load on the ranks that share its experts.

    Attributes:
        layer: its number; None if it is not told.
        ranks: that share it, two or more.
        loads: of each, in the imbalance's unit.
    """

    layer: int | None
    ranks: tuple[int, ...]
    loads: tuple[int, ...]

    @property
    def ratio(self) -> float:
        """Largest load over the mean: 1.0 is balanced."""
        return max(self.loads) * len(self.loads) / sum(self.loads)


@dataclass(frozen=True)
class Imbalance:
    """Largest load over mean load, by layer and overall.

    Attributes:
        measure: what the loads are: "elements received", "bytes received", or "ns of computation",
            which stands in for them where no trace tells what was received. It holds whatever the
            phase computes, the shared expert too, so it shows less than the routing's imbalance.
        phase: in which; "dispatch" without direction where that could not be inferred, "" for all
            uneven all-to-alls, of traces that mark no dispatch.
        layers: by layer and the ranks that share it; at least one.
    """

    measure: str
    phase: str
    layers: tuple[LayerLoad, ...]

    @property
    def overall(self) -> float:
        """Sum of the layers' largest loads over the sum of their means: layers run in turn."""
        means = sum(sum(layer.loads) / len(layer.loads) for layer in self.layers)
        return sum(max(layer.loads) for layer in self.layers) / means

    @property
    def worst(self) -> LayerLoad:
        """The layer with the largest ratio."""
        return max(self.layers, key=lambda layer: layer.ratio)


def imbalance_of(matched: Sequence[Matched], reports: Mapping[int, Report]) -> Imbalance | None:
    """The routing's imbalance by the best measure that the traces tell; None if they tell none.

    Args:
        matched: collectives across ranks.
        reports: by rank.
    """
    uneven = [one for one in matched if all(_is_uneven(part) for part in one.parts.values())]
    phase = next(
        (name for name in _DISPATCHES if any(one.first.phase == name for one in uneven)), ""
    )
    dispatches = [one for one in uneven if one.first.phase == phase]
    for measure, received in (
        ("bytes received", _received_bytes),
        ("elements received", _received_elements),
    ):
        layers = _received(dispatches, received)
        if layers:
            return Imbalance(measure, phase, layers)
    layers = _computed(reports)
    return Imbalance("ns of computation", _EXPERTS, layers) if layers else None


def _is_uneven(part: Collective) -> bool:
    return part.exchange is not None and bool(part.exchange.received_splits)


def _received_bytes(part: Collective) -> int | None:
    return part.exchange.received_bytes if part.exchange else None


def _received_elements(part: Collective) -> int | None:
    return sum(part.exchange.received_splits) if part.exchange else None


def _received(
    matched: Sequence[Matched], received: Callable[[Collective], int | None]
) -> tuple[LayerLoad, ...]:
    """Loads by layer and group; () if a part does not tell, or nothing was received at all."""
    loads: defaultdict[tuple[int | None, tuple[int, ...]], dict[int, int]] = defaultdict(dict)
    for one in matched:
        by_rank = loads[one.first.layer, tuple(one.parts)]
        for rank, part in one.parts.items():
            amount = received(part)
            if amount is None:
                return ()
            by_rank[rank] = by_rank.get(rank, 0) + amount
    return _layers(loads)


def _computed(reports: Mapping[int, Report]) -> tuple[LayerLoad, ...]:
    """Time that the experts' phase computes, by layer if layers are told."""
    told_layers = any(phase.name == _EXPERTS for r in reports.values() for phase in r.layers)

    def phases(report: Report) -> tuple[Phase, ...]:
        return report.layers if told_layers else report.phases

    times: defaultdict[int | None, dict[int, int]] = defaultdict(dict)
    for rank, report in reports.items():
        for phase in phases(report):
            if phase.name == _EXPERTS:
                times[phase.layer][rank] = phase.compute
    return _layers({(layer, tuple(by_rank)): by_rank for layer, by_rank in times.items()})


def _layers(
    loads: Mapping[tuple[int | None, tuple[int, ...]], Mapping[int, int]],
) -> tuple[LayerLoad, ...]:
    found = [
        LayerLoad(layer, ranks, tuple(by_rank[rank] for rank in ranks))
        for (layer, ranks), by_rank in loads.items()
        if len(ranks) > 1 and sum(by_rank.values())
    ]
    return tuple(sorted(found, key=lambda one: (one.layer is None, one.layer or 0, one.ranks)))
