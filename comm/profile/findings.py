"""What explains the difference between a run and its simulation, in sentences."""

from __future__ import annotations

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


def _of_row(comparison: Comparison, longest: RankDifference) -> Iterator[str]:
    """How much longer the longest row was than simulated, and of what that consists."""
    if not comparison.actions:
        what = f"A pair ({longest.step} of rank {longest.rank})"
    elif comparison.together:
        what = "The step"
    else:
        what = f"The longest row, that of rank {longest.rank},"
    phases = {(phase.kind, phase.name): phase for phase in comparison.phases}
    parts = [part for part in longest.parts if part.difference]
    yield (
        f"{what} took {_ms(longest.measured)} where {_ms(longest.simulated)} were simulated: "
        f"{_more(longest.difference)}{_percent(longest.difference, longest.simulated)}."
        + (f" Of this, on rank {longest.rank}:" if parts else "")
    )
    least = _LEAST_SHARE * abs(parts[0].difference) if parts else 0
    told = [part for part in parts[:_MOST] if abs(part.difference) >= least]
    for part in told:
        kind = part.kind if comparison.actions else ""
        yield _of_part(part, phases.get((kind, part.phase)))
    rest = parts[len(told) :]
    if rest:
        difference = sum(part.difference for part in rest)
        yield f"{_more(difference)}: all other parts together, each of them smaller."


def _of_part(part: Part, phase: PhaseTime | None) -> str:
    """One part of a row, and if it is a phase's, what one run of the phase says of it."""
    said = f"{_more(part.difference)}: {_what(part)}"
    said += f" ({_ms(part.measured)}, simulated {_ms(part.simulated)})"
    if phase is not None and phase.ratio is not None and part.part in (COMPUTING, TRANSFER):
        said += f"; one run took {phase.ratio:.2f}x its simulated time"
    return said + "."


def _what(part: Part) -> str:
    where = _PLACES.get(part.kind) or ("in pairs" if part.kind == "pair" else f"in {part.kind}")
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
