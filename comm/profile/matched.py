"""Which measured actions are which simulated ones, rank by rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .rows import Row, row_of
from .simulated import Simulated, SimulatedAction
from .trace import Trace

_SHOWN = 6  # actions that a sentence names


class Found(NamedTuple):
    """A trace that marks actions: which of the traces, what to add to its times, its rows."""

    number: int
    trace: Trace
    offset: int
    rows: Sequence[Row]


@dataclass(frozen=True)
class MatchedRow:
    """A rank's measured rows and the simulated one, cut to the actions that both have.

    Attributes:
        number: which of the traces.
        rank: of the trace.
        pipeline_rank: of the simulation.
        offset: what to add to the rank's times to have them on the clock of all, ns.
        names: the actions that both have, in the simulated order.
        actions: the simulated row from the first of these to the last.
        rows: the same of each training step that has all of them.
    """

    number: int
    rank: int
    pipeline_rank: int
    offset: int
    names: tuple[str, ...]
    actions: tuple[SimulatedAction, ...]
    rows: tuple[Row, ...]


def match_rows(
    simulated: Simulated, found: Sequence[Found], num_traces: int
) -> tuple[list[MatchedRow], list[str]]:
    """Match the actions of each rank by their names.

    Args:
        simulated: what was predicted.
        found: the traces that mark actions.
        num_traces: traces in all.

    Returns:
        What matches, and what does not, in sentences.

    Raises:
        ValueError: the ranks do not fit, or no action is in both.
    """
    missing = _other_size(simulated, found, num_traces)
    if len(found) < num_traces:
        missing.append(
            f"{num_traces - len(found)} of {num_traces} traces mark no actions such as 0F3 and are "
            "left out"
        )
    matched: list[MatchedRow] = []
    for number, trace, offset, rows in found:
        rank, pipeline_rank = _place(simulated, trace, len(found), missing)
        names, kept = _match(rank, simulated.rows[pipeline_rank], rows, missing)
        if names:
            actions = _between(simulated.rows[pipeline_rank], names)
            matched.append(MatchedRow(number, rank, pipeline_rank, offset, names, actions, kept))
    if not matched:
        raise ValueError(
            f"{simulated.source}: no simulated action is in the trace, which has for example "
            f"{found[0].rows[0].actions[0].name}; simulate the schedule that ran, with its ranks "
            "and micro-batches"
        )
    unseen = sorted(set(range(simulated.num_ranks)) - {one.pipeline_rank for one in matched})
    if unseen:
        ranks = ", ".join(map(str, unseen))
        missing.append(f"pipeline rank {ranks}: simulated, but no trace of it is compared")
    return matched, missing


def _other_size(simulated: Simulated, found: Sequence[Found], num_traces: int) -> list[str]:
    """That another number of pipeline ranks ran than was simulated, if the traces tell.

    Ranks that run an action of the same name are copies of one pipeline rank, as each micro-batch
    passes a stage on one rank only.
    """
    ranks: list[set[str]] = []
    for _, _, _, rows in found:
        names = {action.name for row in rows for action in row.actions}
        alike = [of for of in ranks if of & names]
        ranks = [of for of in ranks if not of & names] + [names.union(*alike)]
    world_sizes = {trace.world_size for _, trace, _, _ in found}
    whole = len(found) == num_traces and world_sizes == {num_traces}
    if len(ranks) <= simulated.num_ranks and (not whole or len(ranks) == simulated.num_ranks):
        return []
    least = "" if whole else "at least "
    plural = "" if len(ranks) == 1 else "s"
    return [
        f"the run had {least}{len(ranks)} pipeline rank{plural}, simulated were "
        f"{simulated.num_ranks}, "
        "so that rows are compared that do not belong together; simulate the schedule that ran"
    ]


def _place(
    simulated: Simulated, trace: Trace, num_compared: int, missing: list[str]
) -> tuple[int, int]:
    """The trace's rank, and which simulated rank that is."""
    rank, world_size = trace.rank, trace.world_size
    if rank is None:
        if num_compared > 1 or simulated.num_ranks > 1:
            raise ValueError(
                f"{trace.source}: the trace does not say of which rank it is, and "
                f"{simulated.num_ranks} ranks were simulated; have the rank in the file's name, "
                "such as rank3.json"
            )
        rank = 0
    if world_size is None:
        world_size = simulated.num_ranks
        if rank >= world_size:
            raise ValueError(
                f"{trace.source}: the trace is of rank {rank} and does not say how many there "
                f"were, and {simulated.num_ranks} were simulated, which is too few"
            )
        if world_size > 1:
            missing.append(
                f"rank {rank}: the trace does not say how many ranks there were; taken to be the "
                f"{world_size} that were simulated"
            )
    return rank, simulated.pipeline_rank(rank, world_size)


def _match(
    rank: int, actions: Sequence[SimulatedAction], rows: Sequence[Row], missing: list[str]
) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    """The actions that both have, in the simulated order, and the rows that have all, cut to them.

    `missing` gets what is not in both.
    """
    simulated = [action.name for action in actions]
    known = set(simulated)
    shared = [known & {action.name for action in row.actions} for row in rows]
    most = max(shared, key=len)
    if not most:
        missing.append(f"rank {rank}: none of its actions was simulated")
        return (), ()
    kept = [row for row, names in zip(rows, shared, strict=True) if names == most]
    for row, names in zip(rows, shared, strict=True):
        if names != most:
            lacks = len(most - names)
            missing.append(f"rank {rank}: {_step(row)} lacks {lacks} actions and is left out")
    _tell(missing, rank, "simulated actions are not in the trace", known - most, simulated)
    measured = [action.name for action in kept[0].actions]
    _tell(missing, rank, "actions of the trace were not simulated", {*measured} - known, measured)
    order = tuple(name for name in simulated if name in most)
    ran = [name for name in measured if name in most]
    for one, other in zip(ran, order, strict=True):
        if one != other:
            missing.append(f"rank {rank}: it ran {one} where {other} was simulated: another order")
            break
    return order, tuple(_cut(row, most) for row in kept)


def _between(
    actions: Sequence[SimulatedAction], names: Sequence[str]
) -> tuple[SimulatedAction, ...]:
    """The actions from the first of these names to the last."""
    places = [place for place, action in enumerate(actions) if action.name in set(names)]
    return tuple(actions[places[0] : places[-1] + 1])


def _cut(row: Row, names: set[str]) -> Row:
    """The row from the first action of these names to the last."""
    places = [place for place, action in enumerate(row.actions) if action.name in names]
    return row_of(row.step, row.actions[places[0] : places[-1] + 1], row.runs)


def _step(row: Row) -> str:
    return f"training step {row.step}" if row.step.isdigit() else row.step


def _tell(missing: list[str], rank: int, what: str, names: set[str], order: Iterable[str]) -> None:
    if names:
        shown = [name for name in order if name in names][:_SHOWN]
        more = ", ..." if len(names) > len(shown) else ""
        missing.append(f"rank {rank}: {len(names)} {what}: {', '.join(shown)}{more}")
