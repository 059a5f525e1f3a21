"""Layers of inferred phases, by the order in which the phases run.

A stage's forwards and backwards pass through the same layers, so that the n-th dispatch(F) is of
the n-th layer. Where forward and backward take turns, each turn begins with its first layer anew,
and goes through all of them once or several times; where one is interleaved with the other nothing
shows that, and the count goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from math import gcd

_PAIRS = (("dispatch(F)", "combine(F)"), ("combine(B)", "dispatch(B)"))


def numbered(moves: Sequence[str]) -> list[int] | None:
    """The number of the layer that each move is of; None where it cannot be told.

    It can where each dispatch has its combine, and, if both are there, as many go forward as
    backward.

    Args:
        moves: names of phases, such as "dispatch(F)", in the order of their launch.
    """
    counts = Counter(moves)
    halves = [(counts.pop(first, 0), counts.pop(second, 0)) for first, second in _PAIRS]
    lengths = {length for half in halves for length in half if length}
    if counts or len(lengths) != 1 or any(first != second for first, second in halves):
        return None
    layers = _layers_of_a_turn(moves)
    if layers == 0:
        return None
    seen: Counter[str] = Counter()
    found: list[int] = []
    for name in moves:
        found.append(seen[name] % layers if layers is not None else seen[name])
        seen[name] += 1
    return found


def _layers_of_a_turn(moves: Sequence[str]) -> int | None:
    """Layers that forwards and backwards pass through by turns; None where they are interleaved,
    0 where the lengths of the turns contradict each other."""
    pairs = list(zip(moves[::2], moves[1::2], strict=False))
    if any(pair not in _PAIRS for pair in pairs):
        return None
    turns = [len(list(same)) for _, same in groupby(pairs)]
    layers = gcd(*turns)
    return 0 if layers == 1 and max(turns) > 1 else layers
