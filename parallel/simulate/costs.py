"""What each kind of step costs, and what goes beside the steps: messages, reductions, optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TypeAlias

from ..schedule import Times
from .amounts import ByStage, by_stage, check_amount, checked, finer, unknown_name
from .phases import Phases, duration

ByPair: TypeAlias = float | Callable[[int, int], float]
"""The time of a pair: one number, or a function of its forward's and its backward's stage."""


@dataclass(frozen=True)
class Costs:
    """Times of a pipeline, in any one unit of time.

    B is the full backward, input and weight gradients, as everywhere in this project; in some
    papers it is what is I here.

    Attributes:
        F: forward; more than 0.
        I: input-gradient half of a backward.
        W: weight-gradient half of a backward.
        B: full backward; None means I + W.
        pair: a forward and a full backward that overlap; None means F + B, nothing gained.
        send: latency of a message between ranks: a delay that keeps nothing busy.
        message: bytes of what a stage passes on, and of its gradient on the way back.
        bandwidth: bytes in a unit of time that a rank's sending lane carries, one message after
            the other.
        reduce: at the end of a step, sum of a stage's gradients over data-parallel ranks.
        mirror: the same over the pipeline ranks that hold a copy of a stage; none without copies.
        optimizer: optimizer step of a stage's parameters, after all gradients of all ranks, as
            clipping by their global norm needs.
        phases: times of a layer's phases. What they give takes the place of F, I, W, B and pair.
        unit: name of the unit of time, such as "ms", for pictures and tables.

    Raises:
        ValueError: a cost is not a finite number from 0 up, or F is 0.
    """

    F: ByStage = 1
    I: ByStage = 1  # noqa: E741  the field's name for the input-gradient half
    W: ByStage = 1
    B: ByStage | None = None
    pair: ByPair | None = None
    send: float = 0
    message: ByStage = 0
    bandwidth: float = math.inf
    reduce: ByStage = 0
    mirror: ByStage = 0
    optimizer: ByStage = 0
    phases: Phases | None = field(default=None)
    unit: str = ""

    def __post_init__(self) -> None:
        for name in BY_STAGE:
            if name != "B" or self.B is not None:
                object.__setattr__(self, name, checked(f"cost {name}", getattr(self, name)))
        if self.pair is not None and not callable(self.pair):
            check_amount("cost pair", self.pair)
        check_amount("cost send", self.send)
        if self.bandwidth != math.inf:
            check_amount("cost bandwidth", self.bandwidth)
        if self.bandwidth == 0:
            raise ValueError("cost bandwidth=0: nothing would arrive; leave it out for no limit")
        limited = self.bandwidth != math.inf
        if not limited and _is_given(self.message):
            raise ValueError(
                "cost bandwidth, in bytes a unit, is missing: message and bandwidth go together"
            )
        if limited and self.message == 0:
            raise ValueError(
                "cost message, in bytes, is missing: message and bandwidth go together"
            )
        if self.phases is not None:
            for name in FROM_PHASES:
                if getattr(self, name) != _DEFAULTS[name]:
                    raise ValueError(f"cost {name} is given beside phases, which it follows from")
        elif not callable(self.F):
            check_forward(self.F if isinstance(self.F, Sequence) else (self.F,))

    @classmethod
    def parse(cls, text: str) -> Costs:
        """Costs from text such as "F=1,I=1,W=1,pair=3,send=0".

        F, I and W are given together or not at all; what else is left out has its default. A list
        by stage has its entries joined by "/": "F=1/1/1/1.5".

        Raises:
            ValueError: an entry is not NAME=NUMBER, is unknown (the message has the nearest name),
                is there twice, or is missing.
        """
        known = [f.name for f in fields(cls) if f.name not in ("phases", "unit")]
        given: dict[str, float | tuple[float, ...]] = {}
        for entry in text.split(","):
            name, equals, value = (part.strip() for part in entry.partition("="))
            if not equals:
                raise ValueError(f"costs {text!r}: {entry.strip()!r} is not NAME=NUMBER, as in F=1")
            if name not in known:
                raise ValueError(f"costs {text!r}: {unknown_name(name, known)}")
            if name in given:
                raise ValueError(f"costs {text!r}: {name} is there twice")
            try:
                numbers = tuple(float(number) for number in value.split("/"))
            except ValueError:
                raise ValueError(f"costs {text!r}: {name}={value!r} is not a number") from None
            if len(numbers) > 1 and name in ONE_NUMBER:
                raise ValueError(f"costs {text!r}: {name} is one number, not a list by stage")
            given[name] = numbers if "/" in value else next(iter(numbers))
        missing = [name for name in NEEDED if name not in given]
        if missing and given.keys() & {*NEEDED, "B"}:
            raise ValueError(
                f"costs {text!r}: {' and '.join(missing)} missing; F, I and W go together, as in "
                "F=1,I=1,W=1"
            )
        return cls(**given)  # pyright: ignore[reportArgumentType]

    def times(self, stages: int) -> Times:
        """The times of a pipeline of `stages` stages.

        Raises:
            ValueError: a list does not fit that many stages, or a function gave no time.
        """
        if self.phases is not None:
            forward, inputs, weights, backward, pairs = _from_phases(self.phases, stages)
        else:
            forward, inputs, weights = (
                by_stage(f"cost {name}", getattr(self, name), stages) for name in NEEDED
            )
            if self.B is None:
                backward = tuple(i + w for i, w in zip(inputs, weights, strict=True))
            else:
                backward = by_stage("cost B", self.B, stages)
            pairs = self._pairs(forward, backward)
        check_forward(forward)
        # What the last stage passes on goes nowhere.
        sizes = by_stage("cost message", self.message, stages, summed=False)[: stages - 1]
        occupy = tuple(size / self.bandwidth for size in sizes)
        return Times(forward, inputs, weights, backward, pairs, float(self.send), occupy)

    def for_ranks(self, ranks: int, stages: int) -> Costs:
        """The same model, whose costs are given for `ranks` stages, cut into `stages`.

        Each of the `ranks` stages is cut evenly, and so is the time of a pair; but a list that has
        a multiple of `stages` entries (one a layer, say) says itself what each of them costs. What
        a stage passes on is as large as it was.

        Raises:
            ValueError: `stages` is not a multiple of `ranks`, or a list does not fit.
        """
        if stages == ranks:
            return self
        fine = {
            name: finer(
                f"cost {name}", getattr(self, name), ranks, stages, summed=name != "message"
            )
            for name in BY_STAGE
            if getattr(self, name) is not None
        }
        if self.phases is not None:
            beside = {name: times for name, times in fine.items() if name not in FROM_PHASES}
            return replace(self, **beside, phases=self.phases.for_ranks(ranks, stages))
        return replace(self, **fine, pair=self._finer_pair(stages // ranks))

    def _finer_pair(self, parts: int) -> ByPair | None:
        pair = self.pair
        if callable(pair):
            return lambda forward, backward: pair(forward // parts, backward // parts) / parts
        return None if pair is None else pair / parts

    def _pairs(
        self, forward: Sequence[float], backward: Sequence[float]
    ) -> tuple[tuple[float, ...], ...]:
        stages = range(len(forward))
        if self.pair is None:
            return tuple(tuple(f + b for b in backward) for f in forward)
        if callable(self.pair):
            pair = self.pair
            return tuple(
                tuple(check_amount(f"cost pair({f}, {b})", pair(f, b)) for b in stages)
                for f in stages
            )
        return ((self.pair,) * len(forward),) * len(forward)


# A schedule may need any of the three, so none of them is guessed where others are given.
NEEDED = ("F", "I", "W")
FROM_PHASES = (*NEEDED, "B", "pair")
BY_STAGE = (*NEEDED, "B", "message", "reduce", "mirror", "optimizer")
ONE_NUMBER = ("pair", "send", "bandwidth")
_DEFAULTS = {f.name: f.default for f in fields(Costs)}


def _is_given(value: ByStage) -> bool:
    """Whether any stage has some; a function is taken to give some."""
    if callable(value) or isinstance(value, int | float):
        return value != 0
    return any(value)


def check_forward(times: Sequence[float]) -> None:
    """Raise ValueError where a forward takes no time."""
    if any(time == 0 for time in times):
        raise ValueError("cost F=0: a forward must take some time, or nothing can be compared")


def _from_phases(
    phases: Phases, stages: int
) -> tuple[
    tuple[float, ...],
    tuple[float, ...],
    tuple[float, ...],
    tuple[float, ...],
    tuple[tuple[float, ...], ...],
]:
    """Times of F, I, W and B by stage, and of pairs."""
    layers = phases.layers_of(stages)
    made: dict[tuple[int, int], float] = {}

    def pair(forward: int, backward: int) -> float:
        key = (layers[forward], layers[backward])
        if key not in made:
            made[key] = duration(phases.pair(*key))
        return made[key]

    return (
        tuple(duration(phases.forward(count)) for count in layers),
        tuple(duration(phases.input_half(count)) for count in layers),
        tuple(duration(phases.weight_half(count)) for count in layers),
        tuple(duration(phases.backward(count)) for count in layers),
        tuple(tuple(pair(f, b) for b in range(stages)) for f in range(stages)),
    )
