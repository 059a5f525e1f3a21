"""Finds good priorities for the list scheduler: values that all ranks share, then rank by rank."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from .greedy import Built, Priorities, construct
from .lanes import Lanes

_Score = TypeVar("_Score", bound=tuple[float, ...])

# What is tried for each priority that all ranks share.
_VALUES = {
    "w_delays_last": (0.0, 0.5, 1.0),
    "w_delays_i": (0.25, 0.5, 0.75, 1.0),
    "w_delays_f": (0.25, 0.5, 0.75, 1.0),
    "delay": (0.25, 0.5, 0.75, 1.0),
    "warmup": (0.0, 0.1, 0.3, 0.75),
}
_FINE = (0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)


def shared(ranks: int, in_flight: Sequence[float] | None = None) -> Priorities:
    """Priorities to begin with, the same on every rank.

    Args:
        ranks: pipeline ranks.
        in_flight: per rank, most memory in flight, in chunks; None for no other limit than memory.
    """
    quarters = (0.25,) * ranks
    half, most = (0.5,) * ranks, (0.75,) * ranks
    cap = tuple(in_flight) if in_flight is not None else (math.inf,) * ranks
    return Priorities(quarters, most, half, most, most, cap)


def as_1f1b(ranks: int, most: float) -> Priorities:
    """Priorities under which ranks alternate a forward and a backward, as in 1F1B and ZB-H1.

    Args:
        ranks: pipeline ranks.
        most: memory in flight on rank 0, in chunks; it falls evenly to `most / ranks`.
    """
    never, always = (0.0,) * ranks, (1.0,) * ranks
    tapered = tuple(most * (ranks - rank) / ranks for rank in range(ranks))
    return Priorities(always, always, never, never, never, tapered, forward_first=True)


class Tuner:
    """Tries priorities for one placement within a number of constructions, and keeps the best.

    Attributes:
        score: what to make small; of equal scores the first one tried stays.
        left: constructions that may still be made; none once a score begins with `enough`.
        made: constructions so far.
    """

    def __init__(
        self,
        lanes: Lanes,
        score: Callable[[Built], _Score],
        constructions: int,
        enough: float = -math.inf,
    ) -> None:
        self.lanes, self.score, self.left = lanes, score, constructions
        self.enough = enough + abs(enough) * 1e-12  # sums differ in their last digits
        self.made = 0
        self.best: Built | None = None
        self.best_score: tuple[float, ...] = (math.inf,)
        self.priorities: Priorities | None = None

    def attempt(self, priorities: Priorities, *, level: bool = False) -> None:
        """Construct with these priorities, and keep what comes out if it is the best.

        Args:
            priorities: to try.
            level: whether an equal score is enough, which lets a walk cross plains.
        """
        self.left -= 1
        self.made += 1
        built = construct(self.lanes, priorities)
        score = self.score(built)
        if score < self.best_score or (level and score == self.best_score):
            self.best, self.best_score, self.priorities = built, score, priorities
            if score[0] <= self.enough:
                self.left = 0

    def sweep(self, start: Priorities, until: int = 0) -> None:
        """Try `start`, then change one shared priority after the other while that gains.

        Args:
            start: where to begin.
            until: how many constructions to leave over.
        """
        if self.left <= until:
            return
        kept = self.best, self.best_score, self.priorities
        self.best_score = (math.inf,)
        self.attempt(start)
        before: tuple[float, ...] = (math.inf,)
        while self.best_score < before and self.left > until:
            before = self.best_score
            for name, values in _VALUES.items():
                for value in values:
                    assert self.priorities is not None, "the start was tried"
                    given: tuple[float, ...] = getattr(self.priorities, name)
                    if given[0] != value and self.left > until:
                        changed = replace(self.priorities, **{name: (value,) * len(given)})
                        self.attempt(changed)
        if kept[1] <= self.best_score:
            self.best, self.best_score, self.priorities = kept

    def wander(self) -> None:
        """Change priorities of one or a few neighbouring ranks at random, and keep what gains.

        Half of the changes are near the rank that takes longest.
        """
        dice = random.Random(0)
        ranks = len(self.lanes.of_rank)
        # Twice more the warm-up: which rank takes one forward more there moves all that follows.
        names = (*_VALUES, "in_flight", "warmup", "warmup")
        while self.left > 0 and self.best is not None and self.priorities is not None:
            name = dice.choice(names)
            values = list(getattr(self.priorities, name))
            first, length = dice.randrange(ranks), dice.choice((1, 1, 2, ranks))
            if dice.random() < 0.5:
                spans = self.best.spans
                first = min(ranks - 1, spans.index(max(spans)) + dice.choice((0, 0, 1, 2)))
            value, step = dice.choice(_FINE), dice.choice((-1.0, 1.0))
            for rank in range(first, min(ranks, first + length)):
                if name != "in_flight":
                    values[rank] = value
                elif values[rank] < math.inf:
                    values[rank] = max(1.0, values[rank] + step)
            changed = replace(self.priorities, **{name: tuple(values)})
            if changed == self.priorities:
                self.left -= 1  # or a walk with nothing to change would not end
            else:
                self.attempt(changed, level=True)
