"""What each kind of step costs, and what goes beside the steps: messages, reductions, optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import TypeAlias, cast

from ..schedule import Times
from .phases import Phases, duration

ByStage: TypeAlias = float | Sequence[float] | Callable[[int], float]
"""A time (or size) of every stage: one number, one entry a stage, or a function of the stage.

A list may also have a multiple of the number of stages, such as an entry a layer: neighbours are
summed; or a divisor of it: each entry is shared evenly by the stages cut from it.
"""

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
        for name in _BY_STAGE:
            if name != "B" or self.B is not None:
                object.__setattr__(self, name, checked(name, getattr(self, name)))
        if self.pair is not None and not callable(self.pair):
            check_time("pair", self.pair)
        check_time("send", self.send)
        if self.bandwidth != math.inf:
            check_time("bandwidth", self.bandwidth)
        if self.bandwidth == 0:
            raise ValueError("cost bandwidth=0: nothing would arrive; leave it out for no limit")
        if (self.message == 0) != (self.bandwidth == math.inf):
            missing = "message, in bytes," if self.message == 0 else "bandwidth, in bytes a unit,"
            raise ValueError(f"cost {missing} is missing: message and bandwidth go together")
        if self.phases is not None:
            for name in _FROM_PHASES:
                if getattr(self, name) != _DEFAULTS[name]:
                    raise ValueError(f"cost {name} is given beside phases, which it follows from")
        elif not callable(self.F):
            _check_forward(self.F if isinstance(self.F, Sequence) else (self.F,))

    @classmethod
    def parse(cls, text: str) -> Costs:
        """Costs from text such as "F=1,I=1,W=1,pair=3,send=0"; what is left out has its default.

        A list by stage has its entries joined by "/": "F=1/1/1/1.5".

        Raises:
            ValueError: an entry is not NAME=NUMBER, is unknown (the message has the nearest name)
                or is there twice.
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
            if len(numbers) > 1 and name in ("send", "bandwidth", "pair"):
                raise ValueError(f"costs {text!r}: {name} is one number, not a list by stage")
            given[name] = numbers if "/" in value else next(iter(numbers))
        return cls(**given)  # pyright: ignore[reportArgumentType]

    def times(self, stages: int) -> Times:
        """The times of a pipeline of `stages` stages.

        Raises:
            ValueError: a list does not fit that many stages, or a function gave no time.
        """
        if self.phases is not None:
            return _phase_times(self, self.phases, stages)
        forward, inputs, weights = (
            by_stage(name, getattr(self, name), stages) for name in ("F", "I", "W")
        )
        backward = (
            tuple(i + w for i, w in zip(inputs, weights, strict=True))
            if self.B is None
            else by_stage("B", self.B, stages)
        )
        if any(time == 0 for time in forward):
            raise ValueError("cost F=0: a forward must take some time, or nothing can be compared")
        pairs = self._pairs(forward, backward)
        return self._with_messages(forward, inputs, weights, backward, pairs)

    def for_ranks(self, ranks: int, stages: int) -> Costs:
        """The same model, whose costs are given for `ranks` stages, cut into `stages`.

        Raises:
            ValueError: `stages` is not a multiple of `ranks`.
        """
        if stages == ranks:
            return self
        parts = stages // ranks

        message = by_stage("message", self.message, ranks)
        beside = replace(
            self,
            message=tuple(size for size in message for _ in range(parts)) if any(message) else 0,
            reduce=cut_by_stage("reduce", self.reduce, ranks, parts),
            mirror=cut_by_stage("mirror", self.mirror, ranks, parts),
            optimizer=cut_by_stage("optimizer", self.optimizer, ranks, parts),
        )
        if self.phases is not None:
            return replace(beside, phases=self.phases.split(ranks, parts))
        fine = self.times(ranks).split(stages)

        def pair(forward: int, backward: int) -> float:
            return fine.pair[forward][backward]

        return replace(beside, F=fine.F, I=fine.I, W=fine.W, B=fine.B, pair=pair)

    def _pairs(
        self, forward: Sequence[float], backward: Sequence[float]
    ) -> tuple[tuple[float, ...], ...]:
        stages = range(len(forward))
        if self.pair is None:
            return tuple(tuple(f + b for b in backward) for f in forward)
        if callable(self.pair):
            pair = self.pair
            return tuple(
                tuple(check_time(f"pair({f}, {b})", pair(f, b)) for b in stages) for f in stages
            )
        return ((self.pair,) * len(forward),) * len(forward)

    def _with_messages(
        self,
        forward: tuple[float, ...],
        inputs: tuple[float, ...],
        weights: tuple[float, ...],
        backward: tuple[float, ...],
        pair: tuple[tuple[float, ...], ...],
    ) -> Times:
        stages = len(forward)
        # What the last stage passes on goes nowhere.
        sizes = by_stage("message", self.message, stages, summed=False)[: stages - 1]
        occupy = tuple(size / self.bandwidth for size in sizes)
        return Times(forward, inputs, weights, backward, pair, float(self.send), occupy)


_DEFAULTS = {f.name: f.default for f in fields(Costs)}
_BY_STAGE = ("F", "I", "W", "B", "message", "reduce", "mirror", "optimizer")
_FROM_PHASES = ("F", "I", "W", "B", "pair")


def by_stage(name: str, value: ByStage, stages: int, *, summed: bool = True) -> tuple[float, ...]:
    """One number a stage.

    Args:
        name: what to call the value in errors.
        value: as the user gave it.
        stages: how many there are.
        summed: whether a longer or shorter list is summed or shared out; else entries stay as they
            are, and the last one of a group counts, as with the size of what a stage passes on.

    Raises:
        ValueError: a list has neither a multiple nor a divisor of `stages` entries, or a function
            gave something else than a finite number from 0 up.
    """
    if callable(value):
        return tuple(check_time(f"{name}({stage})", value(stage)) for stage in range(stages))
    if not isinstance(value, Sequence):
        return (float(value),) * stages
    length = len(value)
    if length == stages:
        return tuple(float(entry) for entry in value)
    if length % stages == 0:
        width = length // stages
        groups = [value[i : i + width] for i in range(0, length, width)]
        return tuple(float(sum(group) if summed else group[-1]) for group in groups)
    if stages % length == 0:
        parts = stages // length
        return tuple(entry / (parts if summed else 1) for entry in value for _ in range(parts))
    raise ValueError(
        f"cost {name} is a list of {length}, but there are {stages} stages; give {stages} entries, "
        "or a multiple (an entry a layer, say) or a divisor of that"
    )


def cut_by_stage(name: str, value: ByStage, stages: int, parts: int) -> tuple[float, ...]:
    """One number for each of `parts` equal parts of each of `stages` stages."""
    return tuple(n / parts for n in by_stage(name, value, stages) for _ in range(parts))


def check_time(name: str, value: object) -> float:
    """`value` as a float.

    Raises:
        ValueError: it is not a finite number from 0 up.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"cost {name}={value!r} is not a number")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"cost {name}={value!r} must be finite and from 0 up")
    return float(value)


def checked(name: str, value: object) -> object:
    """A cost or size by stage as it is kept: a number, a tuple or a function.

    Raises:
        ValueError: a number is not finite or below 0, or a list is empty.
    """
    if callable(value):
        return value
    if isinstance(value, list | tuple):
        entries = cast("Sequence[object]", value)
        if not entries:
            raise ValueError(f"cost {name} is an empty list; one entry a stage is needed")
        return tuple(check_time(f"{name}[{i}]", entry) for i, entry in enumerate(entries))
    check_time(name, value)
    return value


def _check_forward(times: Sequence[float]) -> None:
    if any(time == 0 for time in times):
        raise ValueError("cost F=0: a forward must take some time, or nothing can be compared")


def unknown_name(name: str, known: Sequence[str]) -> str:
    """What to say of a name that is none of `known`: the nearest one, in any case, and all."""
    near = get_close_matches(name.casefold(), [k.casefold() for k in known], n=1)
    meant = [k for k in known if [k.casefold()] == near]
    hint = f"; did you mean {meant[0]}?" if meant else ";"
    return f"unknown {name!r}{hint} Known: {', '.join(known)}"


def _phase_times(costs: Costs, phases: Phases, stages: int) -> Times:
    layers = phases.layers_of(stages)
    made: dict[tuple[int, int], float] = {}

    def pair(forward: int, backward: int) -> float:
        key = (layers[forward], layers[backward])
        if key not in made:
            made[key] = duration(phases.pair(*key))
        return made[key]

    return costs._with_messages(  # pyright: ignore[reportPrivateUsage]
        *(
            tuple(duration(of(n)) for n in layers)
            for of in (phases.forward, phases.input_half, phases.weight_half, phases.backward)
        ),
        pair=tuple(tuple(pair(f, b) for b in range(stages)) for f in range(stages)),
    )
