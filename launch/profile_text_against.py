"""What `counterflow profile --against` prints: what was measured beside what was simulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..comm.profile.by_phase import by_phase
from ..comm.profile.findings import not_simulated, parts_told
from ..comm.profile.notes import merged
from .profile_text import fill, fitting, ms
from .tables import print_table

if TYPE_CHECKING:
    from ..comm.profile.comparison import Comparison, KindTime, Part, PhaseTime, RankDifference
    from .profile_command import Answer
    from .profile_plan import PlanCheck

_NS = 1_000_000  # in a millisecond
# Columns of the phases that go, one after the other, where there is too little room.
# Phase and action together say what a row is of, so these two stay.
_FIRST_TO_GO = ("runs", "exposed, simulated", "exposed", "waiting", "ratio")


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


_CELLS: dict[str, Callable[[PhaseTime], str]] = {
    "phase": lambda phase: phase.name,
    "in": lambda phase: phase.kind or "-",
    "runs": lambda phase: str(phase.count),
    "measured": lambda phase: ms(phase.measured),
    "simulated": lambda phase: ms(phase.simulated),
    "ratio": lambda phase: _ratio(phase.ratio),
    "waiting": lambda phase: ms(phase.waiting),
    "exposed": lambda phase: ms(phase.exposed),
    "exposed, simulated": lambda phase: ms(phase.simulated_exposed),
}


_KIND_CELLS: dict[str, Callable[[KindTime], str]] = {
    "action": lambda kind: kind.kind,
    "stage": lambda kind: kind.stage,
    "in a step": lambda kind: str(kind.count),
    "measured": lambda kind: ms(kind.measured),
    "simulated": lambda kind: ms(kind.simulated),
    "ratio": lambda kind: _ratio(kind.ratio),
}
_PART_CELLS: dict[str, Callable[[Part], str]] = {
    "in": lambda part: part.kind,
    "part": lambda part: part.part,
    "phase": lambda part: part.phase or "-",
    "measured": lambda part: ms(part.measured),
    "simulated": lambda part: ms(part.simulated),
    "difference": lambda part: f"{part.difference / _NS:+.3f}",
}


def print_comparison(answer: Answer, found: Comparison) -> None:
    """Print what does not compare, actions by kind, phases, and what the difference consists of."""
    beside = f"measured beside {found.schedule} of {found.source}"
    if found.missing:
        print()
    for line in merged(found.missing):
        fill(f"note: {line}")
    if found.kinds:
        head, body = fitting(_KIND_CELLS, found.kinds, ("in a step", "ratio"))
        print()
        print_table(f"actions, {beside}, ms, medians; {answer.window}", head, body, names=1)
    if found.phases:
        cells = dict(_CELLS)
        if alone := all(phase.simulated is None for phase in found.phases):
            for name in ("simulated", "ratio", "exposed, simulated"):
                del cells[name]
        if not any(phase.waiting for phase in found.phases):
            del cells["waiting"]
        if not found.actions:
            del cells["in"]
        head, body = fitting(cells, found.phases, _FIRST_TO_GO)
        print()
        names = 2 if "in" in head else 1
        how = "measured alone" if alone else beside
        title = f"phases, {how}, ms, medians of a run; {answer.window}"
        print_table(title, head, body, names=names)
        if missing := not_simulated(found):
            fill(f"not simulated: {', '.join(missing)}")
    if found.longest is not None:
        _print_parts(answer, found, found.longest)
    if answer.plan is not None:
        _print_plan(answer, answer.plan, found)
    unit = f"a {found.unit}" if found.unit else "one unit"
    if found.fitted:
        fill(
            f"{unit} of the simulation is taken as {found.ns_per_unit / _NS:.6g} ms, with which "
            "the medians agree, as it has no unit of time: shares compare, lengths do not"
        )
    for finding in found.findings:
        fill(f"- {finding}")


def _print_plan(answer: Answer, plan: PlanCheck, found: Comparison) -> None:
    """Where the prediction was wrong: by phase of the longest row, and the run as a whole."""
    longest = found.longest
    if longest is not None:
        shares = by_phase(longest)[: answer.options.top]
        body = [
            [
                of.name,
                *(ms(of.simulated), ms(of.measured), _ratio(of.ratio)),
                f"{of.difference / _NS:+.3f}",
                f"{of.difference / longest.simulated:+.1%}" if longest.simulated else "-",
            ]
            for of in shares
        ]
        print()
        print_table(
            f"where the plan was wrong, rank {longest.rank}, step {longest.step}: predicted "
            f"{ms(longest.simulated)} ms, measured {ms(longest.measured)}",
            ["phase", "predicted", "measured", "ratio", "adds, ms", "of the row"],
            body,
            names=1,
        )
    if plan.numbers:
        print()
        body = [
            [of.name, f"{of.predicted:,.3f}", f"{of.measured:,.3f}", _ratio(of.ratio), of.unit]
            for of in plan.numbers
        ]
        print_table("the plan", ["", "predicted", "measured", "ratio", "unit"], body, names=1)
    for line in plan.missing:
        fill(f"note: {line}")


def _print_parts(answer: Answer, found: Comparison, rank: RankDifference) -> None:
    parts, missing = parts_told(found, rank), not_simulated(found)
    cells = dict(_PART_CELLS)
    cells["simulated"] = lambda part: "-" if part.phase in missing else ms(part.simulated)
    if not any(part.part for part in parts):
        del cells["part"], cells["phase"]
    top = parts[: answer.options.top]
    head, body = fitting(cells, top, ("measured", "simulated"))
    print()
    print_table(
        f"what the difference consists of, rank {rank.rank}, step {rank.step}: measured "
        f"{ms(rank.measured)} ms, simulated {ms(rank.simulated)}",
        head,
        body,
        names=3 if "part" in head else 1,
    )
    if len(parts) > len(top):
        rest = sum(part.difference for part in parts[len(top) :])
        fill(f"{len(parts) - len(top)} further parts: {rest / _NS:+.3f} ms together")
