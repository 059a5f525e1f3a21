"""What `counterflow profile` prints of several ranks together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from ..comm.profile.notes import merged
from ..comm.profile.ranks import Share
from ..comm.profile.report import Totals
from .profile_text import fill, fitting, ms, share
from .tables import print_table

if TYPE_CHECKING:
    from ..comm.profile.imbalance import Imbalance
    from ..comm.profile.ranks import PhaseAcross, RanksReport
    from .profile_command import Answer

# Columns of the ranks that go, one after the other, where there is too little room.
_FIRST_TO_GO = ("span", "idle", "comm", "last", "transfer", "held up", "compute")


class _Row(NamedTuple):
    """What a line of the table of ranks is of."""

    share: Share
    totals: Totals


_CELLS: dict[str, Callable[[_Row], str]] = {
    "rank": lambda row: str(row.share.rank),
    "span": lambda row: ms(row.totals.span),
    "compute": lambda row: ms(row.totals.compute),
    "comm": lambda row: ms(row.totals.comm),
    "exposed": lambda row: ms(row.totals.exposed),
    "of span": lambda row: share(row.totals.exposed, row.totals.span),
    "idle": lambda row: ms(row.totals.idle),
    "transfer": lambda row: ms(row.share.transfer),
    "skew": lambda row: ms(row.share.skew),
    "last": lambda row: f"{row.share.last}/{row.share.count}",
    "held up": lambda row: ms(row.share.held_up),
}

_PHASE_CELLS: dict[str, Callable[[PhaseAcross], str]] = {
    "phase": lambda phase: phase.name,
    "collectives": lambda phase: str(phase.count),
    "transfer": lambda phase: ms(_transfer(phase)),
    "skew": lambda phase: ms(phase.skew),
    "skew share": lambda phase: share(phase.skew, _transfer(phase) + phase.skew),
}


def print_ranks(answer: Answer, found: RanksReport) -> None:
    """Print a line a rank, what its communication was by the others, and who is waited for."""
    by_source = {report.source: report for report in answer.reports}
    rows = [_Row(rank.share, by_source[rank.source].totals) for rank in found.ranks]
    head, body = fitting(_CELLS, rows, _FIRST_TO_GO)
    print()
    print_table(f"ranks, ms; {answer.window}", head, body)
    if found.matched:
        fill(
            f"of {found.matched} collectives that ranks ran together: transfer is the shortest "
            "duration of any rank, skew what this one took longer (waiting for ranks that came "
            "later), last how often it came last, held up the skew of others at those"
        )
    if found.phases:
        head, body = fitting(_PHASE_CELLS, found.phases, ("collectives", "skew share"))
        print()
        print_table(
            f"phases across ranks, ms of all ranks together; {answer.window}", head, body, names=1
        )
    for late in found.stragglers:
        fill(late.sentence)
    if found.imbalance is not None:
        fill(_about_imbalance(found.imbalance))
    for note in merged(found.notes):
        fill(f"note: {note}")


def _transfer(phase: PhaseAcross) -> int:
    """Of all ranks together."""
    return sum(part.transfer for part in phase.shares)


def _about_imbalance(found: Imbalance) -> str:
    worst = found.worst
    where = f" in {found.phase}" if found.phase else ""
    layer = "" if worst.layer is None else f", at layer {worst.layer}"
    return (
        f"routing: the busiest rank has {found.overall:.3f} x the mean by {found.measure}{where}, "
        f"at worst {worst.ratio:.3f} x{layer}"
    )
