"""What explains the difference between a run and its simulation, in sentences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from .comparison import (
    AFTER,
    BEFORE,
    BETWEEN,
    COMPUTING,
    COPYING,
    OUTSIDE,
    STANDING,
    TRANSFER,
    WAITING,
    Comparison,
    Part,
    PhaseTime,
    RankDifference,
)

_MOST = 8  # parts of the longest row that are told
_LEAST_SHARE = 0.02  # of the largest part, or of a phase's simulated time: less is not told
_PLACES = {
    BEFORE: "before its first action",
    BETWEEN: "between its actions",
    AFTER: "after its last action",
}
_KINDS = {
    "F": "forwards (F)",
    "B": "backwards (B)",
    "I": "backwards for inputs (I)",
    "W": "weight gradients (W)",
    "pair": "pairs",
}


def findings_of(comparison: Comparison) -> tuple[str, ...]:
    """The sentences, what matters most first."""
    longest = comparison.longest
    found: list[str] = []
    if longest is not None:
        found += _of_row(comparison, longest)
    if comparison.actions and longest is not None:
        found += _of_waiting(comparison, longest)
    elif not comparison.actions:
        found += _of_phases(comparison)
    return tuple(found)


def parts_told(comparison: Comparison, rank: RankDifference) -> tuple[Part, ...]:
    """What a rank's difference consists of, as finely as the simulation tells it.

    Without simulated phases all of a simulated action counts as computing without one, so that
    single parts differ by what nobody predicted. Then there is one part a kind of action, its
    `part` and `phase` empty. The differences add up to the row's either way.
    """
    if _simulated_phases(comparison) or not comparison.actions:
        return rank.parts
    lengths: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for part in rank.parts:
        measured, simulated = lengths[part.kind]
        lengths[part.kind] = measured + part.measured, simulated + part.simulated
    whole = [Part(kind, "", "", *both) for kind, both in lengths.items()]
    return tuple(sorted(whole, key=lambda part: -abs(part.difference)))


def not_simulated(comparison: Comparison) -> tuple[str, ...]:
    """Phases that ran and that the simulation, which has others, does not have at all."""
    known = _simulated_phases(comparison)
    ran = dict.fromkeys(phase.name for phase in comparison.phases)
    ran |= dict.fromkeys(part.phase for rank in comparison.ranks for part in rank.parts)
    return tuple(name for name in ran if name and name not in known) if known else ()


def _simulated_phases(comparison: Comparison) -> set[str]:
    known = {phase.name for phase in comparison.phases if phase.simulated is not None}
    parts = (part for rank in comparison.ranks for part in rank.parts)
    return known | {part.phase for part in parts if part.phase and part.simulated}


def _of_row(comparison: Comparison, longest: RankDifference) -> Iterator[str]:
    """How much longer the longest row was than simulated, and of what that consists."""
    if not comparison.actions:
        what = f"A pair ({longest.step} of rank {longest.rank})"
    elif comparison.together:
        what = "The step"
    else:
        what = f"The longest row, that of rank {longest.rank},"
    phases = {(phase.kind, phase.name): phase for phase in comparison.phases}
    parts = [part for part in parts_told(comparison, longest) if part.difference]
    missing = not_simulated(comparison)
    yield (
        f"{what} took {_ms(longest.measured)} where {_ms(longest.simulated)} were simulated: "
        f"{_more(longest.difference)}{_percent(longest.difference, longest.simulated)}."
        + (f" Of this, on rank {longest.rank}:" if parts else "")
    )
    least = _LEAST_SHARE * abs(parts[0].difference) if parts else 0
    told = [part for part in parts[:_MOST] if abs(part.difference) >= least]
    for part in told:
        kind = part.kind if comparison.actions else ""
        yield _of_part(part, phases.get((kind, part.phase)), part.phase in missing)
    rest = parts[len(told) :]
    if rest:
        difference = sum(part.difference for part in rest)
        yield f"{_more(difference)}: all other parts together, each of them smaller."


def _of_part(part: Part, phase: PhaseTime | None, unknown: bool) -> str:
    """One part of a row, and what one run of its phase says of it, if that explains it.

    A run can be faster than simulated and its part longer all the same, where less of it hides
    behind another: then the run's ratio is no reason.
    """
    said = f"{_more(part.difference)}: {_what(part)} ({_ms(part.measured)}, "
    said += "not simulated)" if unknown else f"simulated {_ms(part.simulated)})"
    ratio = None if phase is None or part.part not in (COMPUTING, TRANSFER) else phase.ratio
    if ratio is not None and (ratio - 1) * part.difference > 0:
        said += f"; one run took {ratio:.2f}x its simulated time"
    return said + "."


def _what(part: Part) -> str:
    where = _PLACES.get(part.kind) or ("in pairs" if part.kind == "pair" else f"in {part.kind}")
    if not part.part:
        return f"{_KINDS[part.kind]} in all" if part.kind in _KINDS else where
    return {
        COMPUTING: f"{part.phase or 'what has no phase'} computing {where}",
        TRANSFER: f"{part.phase or 'messages'} {where}, with no computation behind",
        WAITING: f"waiting {f'for {part.phase} ' if part.phase else ''}{where}",
        COPYING: f"copies {where}, with nothing beside",
        STANDING: f"nothing running {where}",
    }[part.part]


def _of_waiting(comparison: Comparison, longest: RankDifference) -> Iterator[str]:
    """Which other rank lost most time outside of its actions."""
    lost = {
        rank.rank: sum(
            part.difference
            for part in rank.parts
            if part.kind in OUTSIDE and part.part in (WAITING, STANDING)
        )
        for rank in comparison.ranks
        if rank is not longest
    }
    worst = max(lost, key=lambda rank: lost[rank], default=None)
    if worst is not None and lost[worst] > 0:
        most = ", the most of the other ranks" if len(lost) > 1 else ""
        yield (
            f"Rank {worst} waited outside of its actions {_ms(lost[worst])} longer than "
            f"simulated{most}."
        )


def _of_phases(comparison: Comparison) -> Iterator[str]:
    """Of traces that mark no actions: the pair, and the phases by what they add to it."""
    if comparison.pair is not None:
        measured, simulated = comparison.pair
        yield (
            f"A layer of a pair took {_ms(measured)} where {_ms(simulated)} were simulated: "
            f"{_more(measured - simulated)}{_percent(measured - simulated, simulated)}."
        )
    told = [(phase, phase.simulated) for phase in comparison.phases if phase.simulated is not None]
    told.sort(key=lambda one: -one[0].count * abs(one[0].measured - one[1]))
    for phase, simulated in told:
        if abs(phase.measured - simulated) < _LEAST_SHARE * simulated and not phase.waiting:
            continue
        ratio = "" if phase.ratio is None else f"{phase.ratio:.2f}x its simulated time: "
        waits = f", and {_ms(phase.waiting)} of waiting" if phase.waiting else ""
        yield (
            f"{phase.name} took {ratio}{_ms(phase.measured)} a layer where {_ms(simulated)} were "
            f"simulated{waits}."
        )


def _ms(ns: float) -> str:
    return f"{ns / 1e6:.4g} ms"


def _more(difference: int) -> str:
    return f"{_ms(abs(difference))} {'more' if difference >= 0 else 'less'}"


def _percent(difference: int, of: int) -> str:
    return f" ({abs(difference) / of:.1%})" if of else ""
