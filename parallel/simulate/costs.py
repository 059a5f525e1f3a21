"""What each kind of step costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from difflib import get_close_matches

from ..schedule import Op, Pair, Step


@dataclass(frozen=True)
class Costs:
    """Time of each kind of step of one stage, in any one unit.

    B is the full backward, input and weight gradients, as everywhere in this project; in some
    papers it is what is I here.

    Attributes:
        F: forward; more than 0.
        I: input-gradient half of a backward.
        W: weight-gradient half of a backward.
        B: full backward; None means I + W.
        pair: a forward and a full backward that overlap; None means F + B, nothing gained.
        send: from the end of a step until what it made is there on another rank. A delay only: it
            keeps neither rank busy.

    Raises:
        ValueError: a cost is not a finite number from 0 up, or F is 0.
    """

    F: float = 1
    I: float = 1  # noqa: E741  the field's name for the input-gradient half
    W: float = 1
    B: float | None = None
    pair: float | None = None
    send: float = 0

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value: object = getattr(self, name)
            if value is None and name in ("B", "pair"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"cost {name}={value!r} is not a number")
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"cost {name}={value!r} must be finite and from 0 up")
        if self.F == 0:
            raise ValueError("cost F=0: a forward must take some time, or nothing can be compared")

    @classmethod
    def parse(cls, text: str) -> Costs:
        """Costs from text such as "F=1,I=1,W=1,pair=3,send=0"; what is left out has its default.

        Raises:
            ValueError: an entry is not NAME=NUMBER, is unknown (the message has the nearest name)
                or is there twice.
        """
        known = [field.name for field in fields(cls)]
        given: dict[str, float] = {}
        for entry in text.split(","):
            name, equals, number = (part.strip() for part in entry.partition("="))
            if not equals:
                raise ValueError(f"costs {text!r}: {entry.strip()!r} is not NAME=NUMBER, as in F=1")
            if name not in known:
                near = get_close_matches(name.casefold(), [k.casefold() for k in known], n=1)
                meant = [k for k in known if [k.casefold()] == near]
                hint = f"; did you mean {meant[0]}?" if meant else ";"
                raise ValueError(
                    f"costs {text!r}: unknown {name!r}{hint} Known: {', '.join(known)}"
                )
            if name in given:
                raise ValueError(f"costs {text!r}: {name} is there twice")
            try:
                given[name] = float(number)
            except ValueError:
                raise ValueError(f"costs {text!r}: {name}={number!r} is not a number") from None
        return cls(**given)

    @property
    def full_backward(self) -> float:
        """Time of B."""
        return self.I + self.W if self.B is None else self.B

    @property
    def overlapped_pair(self) -> float:
        """Time of a pair."""
        return self.F + self.full_backward if self.pair is None else self.pair

    def of(self, step: Step) -> float:
        """Time that a rank is busy with `step`."""
        if isinstance(step, Pair):
            return self.overlapped_pair
        match step.op:
            case Op.F:
                return self.F
            case Op.B:
                return self.full_backward
            case Op.I:
                return self.I
            case Op.W:
                return self.W
