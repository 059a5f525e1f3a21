"""Times and sizes as users give them, and one number a stage made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import TypeAlias, cast

ByStage: TypeAlias = float | Sequence[float] | Callable[[int], float]
"""A time or size of every stage: one number, one entry a stage, or a function of the stage.

A list may also have a multiple of the number of stages, such as an entry a layer: neighbours are
summed.
"""


def by_stage(label: str, value: ByStage, stages: int, *, summed: bool = True) -> tuple[float, ...]:
    """One number a stage.

    Args:
        label: what to call the value in errors, such as "cost F".
        value: as the user gave it.
        stages: how many there are.
        summed: whether a longer list is summed; else the last entry of each group counts, as with
            the size of what a stage passes on.

    Raises:
        ValueError: a list has no multiple of `stages` entries, or a function gave something else
            than a finite number from 0 up.
    """
    if callable(value):
        return tuple(check_amount(f"{label}({stage})", value(stage)) for stage in range(stages))
    if not isinstance(value, Sequence):
        return (float(value),) * stages
    width, rest = divmod(len(value), stages)
    if rest or not width:
        raise ValueError(
            f"{label} is a list of {len(value)}, but there are {stages} stages; give {stages} "
            "entries, or a multiple of that (an entry a layer, say)"
        )
    groups = [value[i : i + width] for i in range(0, len(value), width)]
    return tuple(float(sum(group) if summed else group[-1]) for group in groups)


def finer(
    label: str, value: ByStage, ranks: int, stages: int, *, summed: bool = True
) -> tuple[float, ...]:
    """One number for each of `stages` stages of a model whose values are given for `ranks` stages.

    Each of the `ranks` stages is cut evenly, but for a list that is long enough to say what each of
    the `stages` has.

    Args:
        label, value, summed: as in `by_stage`.
        ranks: number of stages that the values are of.
        stages: a multiple of it.

    Raises:
        ValueError: the value does not fit, or `stages` is no multiple of `ranks`.
    """
    parts, rest = divmod(stages, ranks)
    if rest or not parts:
        raise ValueError(f"{label} of {ranks} stages cannot be cut into {stages} stages evenly")
    if not callable(value) and isinstance(value, Sequence) and len(value) % stages == 0:
        return by_stage(label, value, stages, summed=summed)
    share = parts if summed else 1
    coarse = by_stage(label, value, ranks, summed=summed)
    return tuple(amount / share for amount in coarse for _ in range(parts))


def checked(label: str, value: object) -> object:
    """A value by stage as it is kept: a number, a tuple or a function.

    Raises:
        ValueError: a number is not finite or below 0, or a list is empty.
    """
    if callable(value):
        return value
    if isinstance(value, list | tuple):
        entries = cast("Sequence[object]", value)
        if not entries:
            raise ValueError(f"{label} is an empty list; one entry a stage is needed")
        return tuple(check_amount(f"{label}[{i}]", entry) for i, entry in enumerate(entries))
    check_amount(label, value)
    return value


def check_amount(label: str, value: object) -> float:
    """`value` as a float.

    Raises:
        ValueError: it is not a finite number from 0 up.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{label}={value!r} is not a number")
    try:
        number = float(value)
    except OverflowError:  # an int of more than 300 digits
        raise ValueError(f"{label} is too large a number") from None
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{label}={value!r} must be finite and from 0 up")
    return number


def unknown_name(name: str, known: Sequence[str]) -> str:
    """What to say of a name that is none of `known`: the nearest one, in any case, and all."""
    near = get_close_matches(name.casefold(), [k.casefold() for k in known], n=1)
    meant = [k for k in known if [k.casefold()] == near]
    hint = f"; did you mean {meant[0]}?" if meant else ""
    return f"unknown {name!r}{hint}; known: {', '.join(known)}"
