"""A step's phases laid out for arrays: what each waits for, and how long it takes on its own.

The rule is that of `simulate.phases.compose`: each lane runs its phases in the order given, each
after what it needs. Which one follows which does not depend on times, so it is found out once a
kind of step, and the ranks' times are then filled in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..parallel.schedule import Op, Pair, Step
from ..parallel.simulate.phases import BACKWARD, BEFORE, COMPUTE, FORWARD, WEIGHTS, lane_of
from .times import LayerTimes

START = -1  # in place of a phase's number: the start of the step
NEEDS_NO_OTHER = -2


class Phase(NamedTuple):
    """One phase of a step.

    Attributes:
        after: the phase that it waits for, or START.
        also: another one, or NEEDS_NO_OTHER.
        ms: on a rank that gets the mean rows.
        computes: else it communicates.
        routed: share of `ms` that is proportional to the rank's rows.
        backward: of the step's backward, else of its forward.
        experts: number of its layer among those of its stage that have experts, in the forward's
            order; -1 for a layer without.
    """

    after: int
    also: int
    ms: float
    computes: bool
    routed: float
    backward: bool
    experts: int


class Program(NamedTuple):
    """The phases of a step that take time, each after those that it waits for.

    Attributes:
        phases: numbered from 0.
        last: those that end last on the lanes, or START; the step ends with the later one.
    """

    phases: tuple[Phase, ...]
    last: tuple[int, int]


class _Layer(NamedTuple):
    times: LayerTimes
    experts: int


def lay_out(
    stages: Sequence[Sequence[LayerTimes]], step: Step, order: Sequence[str], *, overlap: bool
) -> Program:
    """Lay a step out.

    F, I and W run one phase after the other; B and pairs on two lanes, if `overlap`.

    Args:
        stages: per stage its layers.
        step: any of a schedule.
        order: of a pair's phases.
        overlap: without, each phase waits for the one before it, and a pair's backward for its
            forward.
    """
    if isinstance(step, Pair):
        forward = _numbered(stages[step.forward.stage])
        backward = _numbered(stages[step.backward.stage])
        if overlap:
            return _Builder(lanes=True).add(order, forward, backward[::-1]).program
        builder = _Builder(lanes=False).add(FORWARD, forward, [])
        return builder.add(_without_forward(order), [], backward[::-1]).program
    layers = _numbered(stages[step.stage])
    if step.op is Op.F:
        return _Builder(lanes=False).add(FORWARD, layers, []).program
    names = {Op.I: BACKWARD, Op.W: tuple(WEIGHTS), Op.B: _without_forward(order)}[step.op]
    return _Builder(lanes=overlap and step.op is Op.B).add(names, [], layers[::-1]).program


def has_experts(layer: LayerTimes) -> bool:
    """Whether a layer's ranks exchange tokens."""
    return layer.kind in ("moe", "mtp")


def _numbered(layers: Sequence[LayerTimes]) -> list[_Layer]:
    found: list[_Layer] = []
    number = 0
    for layer in layers:
        found.append(_Layer(layer, number if has_experts(layer) else -1))
        number += has_experts(layer)
    return found


def _without_forward(order: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in order if name not in FORWARD)


class _Builder:
    """Walks phases as `compose` does, with numbers of phases in place of times.

    Args:
        lanes: phases run on two lanes and take what they take there; else on one.
    """

    def __init__(self, *, lanes: bool) -> None:
        self._lanes = lanes
        self._phases: list[Phase] = []
        self._free = {True: START, False: START}  # the last phase, by whether it computes
        # Per phase the ones that end no later than it, as bits.
        self._past: list[int] = []

    def add(
        self, order: Sequence[str], forward: Sequence[_Layer], backward: Sequence[_Layer]
    ) -> _Builder:
        """Issue the phases of a chunk, or of two, layer by layer."""
        data = {"F": START, "B": START}
        for place in range(max(len(forward), len(backward))):
            ended: dict[str, int] = {}
            for name in order:
                direction = "F" if name in FORWARD else "B"
                layers = forward if direction == "F" else backward
                if place >= len(layers):
                    continue
                ready = ended.get(BEFORE.get(name, ""), data[direction])
                beside = self._lanes and (direction == "B" or place < len(backward))
                ended[name] = self._issue(name, layers[place], ready, beside=beside)
            for direction, last in (("F", FORWARD[-1]), ("B", BACKWARD[-1])):
                data[direction] = ended.get(last, data[direction])
        return self

    @property
    def program(self) -> Program:
        """What was added."""
        return Program(tuple(self._phases), (self._free[True], self._free[False]))

    def _issue(self, name: str, layer: _Layer, ready: int, *, beside: bool) -> int:
        computes = lane_of(name) == COMPUTE
        lane = computes if self._lanes else True
        times = layer.times.paired if beside else layer.times.alone
        after, also = self._later(self._free[lane], ready)
        if times[name] or also != NEEDS_NO_OTHER:
            self._phases.append(
                Phase(
                    after,
                    also,
                    times[name],
                    computes,
                    layer.times.routed if name.startswith("mlp") and layer.experts >= 0 else 0.0,
                    name not in FORWARD,
                    layer.experts,
                )
            )
            number = len(self._phases) - 1
            self._past.append(self._of(after) | self._of(also) | 1 << number)
            after = number
        self._free[lane] = after
        return after

    def _of(self, number: int) -> int:
        return self._past[number] if number >= 0 else 0

    def _later(self, one: int, other: int) -> tuple[int, int]:
        """The two, or the one that ends no earlier than the other in any case."""
        for first, second in ((one, other), (other, one)):
            if second == START or self._of(first) >> second & 1:
                return first, NEEDS_NO_OTHER
        return one, other
