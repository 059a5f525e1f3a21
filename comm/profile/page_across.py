"""Sections of the page that need more than one rank's report: other ranks, and a simulation."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from .comparison import Comparison
from .findings import not_simulated, parts_told
from .notes import merged
from .page_tables import Cell, number, share, table, text, time
from .ranks import RanksReport

MOST_ACTIONS = 300  # rows of the table of single actions, those furthest from the simulation first


def sentences(lines: Iterable[str], kind: str = "") -> str:
    """A list of sentences, or nothing."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="{kind or "plain"}">{items}</ul>' if items else ""


def ranks_section(ranks: RanksReport) -> str:
    """Who waits for whom, how transfer and waiting part, and how routing loads the ranks."""
    whole = ranks.transfer + ranks.skew
    part = f", {ranks.skew / whole:.1%} of both" if whole else ""
    lines = [
        f"{ranks.matched:,} collectives matched across {len(ranks.ranks)} ranks: "
        f"{ranks.transfer / 1e6:,.3f} ms of transfer (of each the shortest of any rank) and "
        f"{ranks.skew / 1e6:,.3f} ms of waiting for ranks that came later{part}; "
        "both are sums over ranks."
    ]
    if ranks.missing_ranks:
        missing = " ".join(map(str, ranks.missing_ranks))
        lines.append(f"Ranks without a trace: {missing}.")
    rows = [
        (
            "",
            [
                number(rank.rank),
                time(rank.compute),
                time(rank.compute_excess),
                number(rank.share.count),
                time(rank.share.transfer),
                time(rank.share.skew),
                number(rank.share.last),
                time(rank.share.held_up),
            ],
        )
        for rank in ranks.ranks
    ]
    head = ("rank", "compute", "more than the median", "collectives", "transfer", "waited")
    more = ("arrived last", "made others wait")
    return "\n".join(
        [
            '<section id="across"><h2>Across ranks</h2>',
            sentences([straggler.sentence for straggler in ranks.stragglers], "loud"),
            sentences(lines),
            table("Times in ms", (*head, *more), rows, ()),
            _phases_across(ranks),
            _imbalance(ranks),
            sentences(merged(ranks.notes), "note"),
            "</section>",
        ]
    )


def _phases_across(ranks: RanksReport) -> str:
    rows: list[tuple[str, list[Cell]]] = []
    for phase in ranks.phases:
        last = max(phase.shares, key=lambda share: share.held_up, default=None)
        cells = [text(phase.name), number(phase.count), time(phase.transfer), time(phase.skew)]
        cells += (
            [number(last.rank), time(last.held_up)] if last and last.held_up else [Cell("", -1)] * 2
        )
        rows.append(("", cells))
    head = ("phase", "collectives", "transfer", "waiting of all ranks", "waited for most")
    return table("By phase, in ms", (*head, "made others wait"), rows) if rows else ""


def _imbalance(ranks: RanksReport) -> str:
    found = ranks.imbalance
    if found is None:
        return ""
    rows = [
        (
            "",
            [
                number(load.layer),
                number(round(load.ratio, 4), f"{load.ratio:.3f}"),
                text(load.ranks[load.loads.index(max(load.loads))]),
                number(max(load.loads)),
                number(round(sum(load.loads) / len(load.loads))),
            ],
        )
        for load in found.layers
    ]
    where = f" in {found.phase}" if found.phase else ""
    caption = (
        f"Imbalance: largest load over mean, by {found.measure}{where}; {found.overall:.3f} overall"
    )
    return table(caption, ("layer", "ratio", "most loaded rank", "its load", "mean"), rows, ())


def comparison_section(comparison: Comparison) -> str:
    """What was measured beside what was simulated, and what explains the difference."""
    unit = f"{comparison.ns_per_unit / 1e6:,.6g} ms"
    how = "chosen so that the median agrees" if comparison.fitted else "as the simulation says"
    lines = [
        f"Simulated: {comparison.schedule}, {comparison.source}. One unit of it is {unit}, {how}."
    ]
    longest = comparison.longest
    if longest is not None:
        whose = f"rank {longest.rank}" + (
            ", whose row took longest" if len(comparison.ranks) > 1 else ""
        )
        row = "The makespan, of" if comparison.together else "The row of"
        lines.append(
            f"{row} {whose}: {longest.measured / 1e6:,.3f} ms measured, "
            f"{longest.simulated / 1e6:,.3f} ms simulated."
        )
    if comparison.pair is not None:
        measured, simulated = comparison.pair
        lines.append(
            f"One layer of a pair: {measured / 1e6:,.3f} ms measured, {simulated / 1e6:,.3f} ms "
            "simulated."
        )
    return "\n".join(
        [
            '<section id="against"><h2>Beside the simulation</h2>',
            sentences(merged(comparison.missing), "note"),
            sentences(comparison.findings, "loud"),
            sentences(lines),
            _parts(comparison),
            _phase_times(comparison),
            _kind_times(comparison),
            _action_times(comparison),
            "</section>",
        ]
    )


def _ratio(value: float | None) -> Cell:
    return number(value, "" if value is None else f"{value:.3f}")


def _parts(comparison: Comparison) -> str:
    missing = not_simulated(comparison)
    rows = [
        (
            "",
            [
                text(part.kind or "between actions"),
                text(part.part),
                text(part.phase),
                number(rank.rank),
                time(part.measured),
                time(None if part.phase in missing else part.simulated),
                time(part.difference),
                share(part.difference, abs(rank.difference)),
            ],
        )
        for rank in comparison.ranks
        for part in parts_told(comparison, rank)
    ]
    head = ("action", "part", "phase", "rank", "measured", "simulated", "difference")
    caption = "What the difference of a rank's row consists of, in ms"
    return table(caption, (*head, "of the whole"), rows, (0, 1, 2)) if rows else ""


def _phase_times(comparison: Comparison) -> str:
    rows = [
        (
            "",
            [
                text(phase.name),
                text(phase.kind),
                text(phase.lane),
                number(phase.count),
                time(phase.measured),
                time(phase.simulated),
                _ratio(phase.ratio),
                time(phase.waiting),
                time(phase.exposed),
                time(phase.simulated_exposed),
            ],
        )
        for phase in comparison.phases
    ]
    head = ("phase", "action", "lane", "runs", "measured", "simulated", "ratio", "waiting")
    more = ("exposed", "exposed in the simulation")
    return table("A run of a phase: medians in ms", (*head, *more), rows, (0, 1, 2)) if rows else ""


def _kind_times(comparison: Comparison) -> str:
    rows = [
        (
            "",
            [
                text(kind.kind),
                text(kind.stage),
                number(kind.count),
                time(kind.measured),
                time(kind.simulated),
                _ratio(kind.ratio),
            ],
        )
        for kind in comparison.kinds
    ]
    head = ("action", "stage", "a step", "measured", "simulated", "ratio")
    return table("Actions: medians in ms", head, rows, (0, 1)) if rows else ""


def _action_times(comparison: Comparison) -> str:
    actions = sorted(comparison.actions, key=lambda a: -abs(a.measured - a.simulated))
    rows = [
        (
            "",
            [
                text(action.name),
                number(action.rank),
                time(action.measured),
                time(action.simulated),
                time(action.measured - action.simulated),
                *map(time, action.starts),
            ],
        )
        for action in actions[:MOST_ACTIONS]
    ]
    head = ("action", "rank", "measured", "simulated", "difference", "began", "in the simulation")
    caption = f"{len(rows):,} of {len(actions):,} actions, the largest differences first; in ms"
    found = table(caption, head, rows) if rows else ""
    return f"<details><summary>Single actions</summary>{found}</details>" if found else ""
