"""A simulated step as compact arrays: what the page of `page` is drawn from."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, pairwise

from ...schedule import Action, Op, Pair
from ..analysis import FinishLink, StepLink, critical_path
from ..events import Result
from ..memory import RankMemory
from ..phases import COMMUNICATION, NAMES, Phases
from .bars import phase_spans, shape_of
from .look import FINISH_MEANINGS, MEANINGS, ON_BAR, Shades, hatch_colour

_DIGITS = 9  # of the makespan, at most, to which times are given
_OPS = tuple(Op)  # the number of an operation


def page_data(
    result: Result, memories: Sequence[RankMemory], memory_unit: str
) -> dict[str, object]:
    """What the page needs, in plain lists.

    Steps are numbered rank after rank. Times are whole ticks: of each step the time its rank is
    idle before it and its duration, from which starts and ends follow exactly.
    An action is op + 4 * (stage + stages * micro-batch), with ops numbered in the order F B I W;
    a pair is two numbers, -1 - its forward, and its backward.

    Raises:
        ValueError: times or sizes are so small that 10 to the power of their decimals is infinite.
    """
    makespan = result.makespan
    decimals = _decimals(chain(result.starts, result.ends), makespan)
    per_unit = 10.0**decimals

    def ticks(time: float) -> int:
        return round(time * per_unit)

    shades = Shades(result.plan.placement)
    kinds = list(FINISH_MEANINGS)
    phases = result.costs.phases
    return {
        "ranks": result.ranks,
        "stages": result.stages,
        "microbatches": result.microbatches,
        "unit": result.costs.unit,
        "memory_unit": memory_unit,
        "tick": 10.0**-decimals,
        "makespan": ticks(makespan),
        "first": list(result.plan.graph.first),
        "steps": list(_codes(result)),
        **_times(result, ticks),
        "messages": _messages(result, ticks),
        "finish": [
            [rank, kinds.index(part.kind), part.stage, ticks(part.start), ticks(part.end)]
            for rank, row in enumerate(result.finish)
            for part in row
        ],
        "critical": _critical(result, ticks),
        **_memory(memories, ticks),
        "phases": None if phases is None else _phases(result, phases, per_unit),
        "route_of": list(result.plan.placement.route_of),
        "shades": shades.by_route,
        "whites": [round(shades.white(number), 3) for number in range(len(shades))],
        "shade_names": shades.names,
        "meanings": [MEANINGS[op][3:] for op in _OPS],
        "finish_meanings": list(FINISH_MEANINGS.values()),
        "on_bar": ON_BAR,
        "hatch": [hatch_colour(shades.white(number)) for number in range(len(shades))],
    }


def _decimals(values: Iterable[float], most: float) -> int:
    """How many decimals give all values, to the last of _DIGITS digits of the largest at worst."""
    limit = max(0, _DIGITS - 1 - math.floor(math.log10(most))) if most > 0 else 0
    if limit > sys.float_info.max_10_exp:
        raise ValueError(
            f"a page counts in whole parts of a unit, and {most:.6g} is too small to be so many of "
            "them; multiply all times and sizes by one number"
        )
    distinct = set(values)
    decimals = 0
    while decimals < limit:
        scale = 10.0**decimals
        # Sums of decimal fractions miss what they stand for by some rounding.
        if all(abs(v * scale - round(v * scale)) <= 1e-12 * most * scale for v in distinct):
            break
        decimals += 1
    return decimals


def _code(action: Action, stages: int) -> int:
    return _OPS.index(action.op) + 4 * (action.stage + stages * action.microbatch)


def _codes(result: Result) -> Iterable[int]:
    stages = result.stages
    for row in result.plan.rows:
        for step in row:
            if isinstance(step, Pair):
                yield -1 - _code(step.forward, stages)
                yield _code(step.backward, stages)
            else:
                yield _code(step, stages)


def _times(result: Result, ticks: Callable[[float], int]) -> dict[str, list[int]]:
    starts, ends = list(map(ticks, result.starts)), list(map(ticks, result.ends))
    free = [0, *ends]
    for number in result.plan.graph.first[:-1]:
        free[number] = 0
    return {
        "gaps": [start - end for start, end in zip(starts, free, strict=False)],
        "durations": [end - start for start, end in zip(starts, ends, strict=True)],
    }


def _messages(result: Result, ticks: Callable[[float], int]) -> dict[str, list[int]]:
    """Per message: the step that makes it, counted from the last one's, and the one that takes it.

    Also which of the actions of a pair made it, how long it stood in line, and how long it took.
    """
    deliveries = result.deliveries
    sources = [delivery.source for delivery in deliveries]
    ends = [ticks(result.ends[source]) for source in sources]
    starts = [ticks(delivery.transfer.start) for delivery in deliveries]
    return {
        "source": [after - before for before, after in pairwise([0, *sources])],
        "target": [delivery.target for delivery in deliveries],
        "member": [int(delivery.transfer.action.op is not Op.F) for delivery in deliveries],
        "queued": [start - end for start, end in zip(starts, ends, strict=True)],
        "time": [
            ticks(delivery.transfer.end) - start
            for delivery, start in zip(deliveries, starts, strict=True)
        ],
    }


def _critical(result: Result, ticks: Callable[[float], int]) -> dict[str, list[list[int]]]:
    """The critical path: [rank, start, end], and of messages [source, destination, start, end]."""
    rows: list[list[int]] = []
    messages: list[list[int]] = []
    for link in critical_path(result):
        times = [ticks(link.start), ticks(link.end)]
        if isinstance(link, StepLink | FinishLink):
            rows.append([link.rank, *times])
        else:
            messages.append([link.transfer.source, link.transfer.destination, *times])
    return {"rows": rows, "messages": messages}


def _memory(memories: Sequence[RankMemory], ticks: Callable[[float], int]) -> dict[str, object]:
    """Per rank the curve of its activations, each point counted from the one before."""
    levels = {level for memory in memories for _, level in memory.curve}
    parts = 10 ** _decimals(levels, max(levels))
    found: list[dict[str, object]] = []
    for memory in memories:
        times = [ticks(time) for time, _ in memory.curve]
        held = [round(level * parts) for _, level in memory.curve]
        found.append(
            {
                "fixed": [memory.weights, memory.gradients, memory.optimizer],
                "times": [after - before for before, after in pairwise([0, *times])],
                "levels": [after - before for before, after in pairwise([0, *held])],
            }
        )
    return {"memory": found, "level_parts": parts}


def _phases(result: Result, phases: Phases, per_unit: float) -> dict[str, object]:
    """The phases of each kind of step with so many layers, counted from the start of the step."""
    layers = phases.layers_of(result.stages)
    kinds = {shape_of(step, layers) for row in result.plan.rows for step in row}
    return {
        "names": NAMES,
        "layers": layers,
        "shapes": {
            " ".join(map(str, kind)): [
                [
                    NAMES.index(span.name),
                    span.layer,
                    int(span.lane == COMMUNICATION),
                    round(span.start * per_unit, 3),
                    round(span.end * per_unit, 3),
                ]
                for span in phase_spans(phases, *kind)
                if span.end > span.start
            ]
            for kind in sorted(kinds)
        },
    }
