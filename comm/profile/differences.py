"""What explains that a rank's row took longer than simulated: both are cut into the same parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from .comparison import Part, RankDifference
from .matched import MatchedRow
from .phases_against import pairs_of
from .rows import Action, PhaseRun, Row, parts_of, simulated_row
from .simulated import Simulated

A = TypeVar("A")


def each_by_itself(
    matched: Sequence[MatchedRow], predicted: Sequence[Row]
) -> tuple[RankDifference, ...]:
    """Of each rank, its own row in its training step of median length (of two, the shorter)."""
    chosen = [_middle(sorted(m.rows, key=lambda row: row.length)) for m in matched]
    return tuple(
        _difference(m.rank, m.pipeline_rank, measured, row)
        for m, measured, row in zip(matched, chosen, predicted, strict=True)
    )


def all_together(
    matched: Sequence[MatchedRow], predicted: Sequence[Row]
) -> tuple[RankDifference, ...]:
    """Of each rank, the time from the first start to the last end of any, on one clock.

    Of the training steps that all ranks have, the one where that is median (of two, the shorter);
    nothing where there is none.
    """
    by_step = [{row.step: row for row in m.rows} for m in matched]
    common = [row.step for row in matched[0].rows if all(row.step in rows for rows in by_step)]
    if not common:
        return ()
    spans: list[tuple[int, int, str]] = []
    for step in common:
        rows = [(m.offset, of[step]) for m, of in zip(matched, by_step, strict=True)]
        first = min(offset + row.start for offset, row in rows)
        spans.append((first, max(offset + row.end for offset, row in rows), step))
    first, last, step = _middle(sorted(spans, key=lambda span: span[1] - span[0]))
    start, end = min(row.start for row in predicted), max(row.end for row in predicted)
    return tuple(
        _difference(
            m.rank,
            m.pipeline_rank,
            replace(of[step], start=first - m.offset, end=last - m.offset),
            replace(row, start=start, end=end),
        )
        for m, of, row in zip(matched, by_step, predicted, strict=True)
    )


def _middle(ordered: Sequence[A]) -> A:
    return ordered[(len(ordered) - 1) // 2]


def of_pairs(
    ranks: Sequence[int],
    rows: Sequence[Row],
    phases: Sequence[Sequence[PhaseRun]],
    simulated: Simulated,
    ns_per_unit: float,
) -> tuple[RankDifference, ...]:
    """Of each rank whose trace marks phases and no actions, its pair of median length by itself.

    Args:
        ranks: of the traces.
        rows: all of each trace, without actions.
        phases: of each trace the runs of its phases.
        simulated: of whose pairs the first with as many layers is taken; without one there is
            nothing to compare.
        ns_per_unit: of its times.
    """
    found: list[RankDifference] = []
    for rank, row, runs in zip(ranks, rows, phases, strict=True):
        pairs = sorted(pairs_of(runs), key=lambda pair: pair.end - pair.start)
        pair = _middle(pairs) if pairs else None
        for at, actions in enumerate(simulated.rows):
            like = [a for a in actions if a.is_pair and pair and a.num_layers == pair.num_layers]
            if pair and like:
                marked = (Action(like[0].name, pair.start, pair.end),)
                measured = Row(f"pair {pair.number}", pair.start, pair.end, marked, row.runs)
                predicted = simulated_row(like[:1], ns_per_unit)
                found.append(_difference(rank, at, measured, predicted))
                break
    return tuple(found)


def _difference(rank: int, pipeline_rank: int, measured: Row, predicted: Row) -> RankDifference:
    took, expected = parts_of(measured), parts_of(predicted)
    parts = [Part(*label, took[label], expected[label]) for label in took | expected]
    parts.sort(key=lambda part: (-abs(part.difference), part[:3]))
    return RankDifference(
        rank=rank,
        pipeline_rank=pipeline_rank,
        step=measured.step,
        measured=measured.length,
        simulated=predicted.length,
        parts=tuple(parts),
    )
