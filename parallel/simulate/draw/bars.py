"""A result as bars on lanes, by name: what a trace shows.

A page of 64 ranks and 512 micro-batches cannot hold so many names: it has the numbers that they
are made from (`page_data`), and of here only what phases a step has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ...schedule import Op, Pair, Step
from ..events import Result
from ..phases import COMMUNICATION, COMPUTE, Phases, PhaseSpan

STEPS = "steps"
SENDING = "sending"
FINISH = "after the row"


class Bar(NamedTuple):
    """Something that a lane of a rank does for a while.

    Attributes:
        rank: of the pipeline.
        lane: STEPS; SENDING; FINISH; and where the costs have phases, COMPUTE and COMMUNICATION.
        name: what is shown, such as "2F0", "dispatch(F)" or "0F3 to rank 1".
        kind: "F", "B", "I", "W", "pair", "send", "reduce", "mirror", "optimizer", or the phase.
        start, end: in the unit of the costs.
    """

    rank: int
    lane: str
    name: str
    kind: str
    start: float
    end: float


def bars(result: Result) -> Iterator[Bar]:
    """All bars, rank by rank; on one lane in the order of time."""
    sent: list[list[Bar]] = [[] for _ in range(result.ranks)]
    for transfer in result.transfers:
        name = f"{transfer.action} to rank {transfer.destination}"
        sent[transfer.source].append(
            Bar(transfer.source, SENDING, name, "send", transfer.start, transfer.end)
        )
    for rank, row in enumerate(result.spans):
        for step, start, end in row:
            kind = "pair" if isinstance(step, Pair) else step.op.value
            yield Bar(rank, STEPS, str(step), kind, start, end)
        if result.costs.phases is not None:
            yield from _phase_bars(result, rank, result.costs.phases)
        yield from sent[rank]
        for part in result.finish[rank]:
            name = f"{part.kind} of stage {part.stage}"
            yield Bar(rank, FINISH, name, part.kind, part.start, part.end)


def _phase_bars(result: Result, rank: int, phases: Phases) -> Iterator[Bar]:
    rows = tuple(zip(result.spans[rank], row_phases(result, rank, phases), strict=True))
    for lane in (COMPUTE, COMMUNICATION):
        for (step, _, _), spans in rows:
            for phase in spans:
                if phase.lane == lane and phase.end > phase.start:
                    name = f"{phase.name} layer {phase.layer} of {step}"
                    yield Bar(rank, lane, name, phase.name, phase.start, phase.end)


def row_phases(result: Result, rank: int, phases: Phases) -> Iterator[tuple[PhaseSpan, ...]]:
    """For each step of a rank's row its phases, with times that count as the step's do."""
    layers = phases.layers_of(result.stages)
    made: dict[tuple[str, int, int], tuple[PhaseSpan, ...]] = {}
    for step, start, _ in result.spans[rank]:
        key = shape_of(step, layers)
        if key not in made:
            made[key] = phase_spans(phases, *key)
        yield tuple(
            phase._replace(start=start + phase.start, end=start + phase.end) for phase in made[key]
        )


def phase_spans(phases: Phases, kind: str, forward: int, backward: int) -> tuple[PhaseSpan, ...]:
    """The phases of a step of `kind` ("F", "B", "I", "W" or "pair") with so many layers."""
    if kind == "pair":
        return phases.pair(forward, backward)
    of = {
        "F": phases.forward,
        "B": phases.backward,
        "I": phases.input_half,
        "W": phases.weight_half,
    }[kind]
    return of(forward if kind == "F" else backward)


def shape_of(step: Step, layers: Sequence[int]) -> tuple[str, int, int]:
    """What decides the phases of a step: its kind, and the layers of its forward and backward.

    Args:
        step: of a rank.
        layers: of each stage.
    """
    if isinstance(step, Pair):
        return "pair", layers[step.forward.stage], layers[step.backward.stage]
    count = layers[step.stage]
    return (step.op.value, count, 0) if step.op is Op.F else (step.op.value, 0, count)
