"""Conditions of `counterflow profile --fail-if`: a number of the report against a limit."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .profile_json import NUMBERS, PHASE_NUMBERS

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_SYNTAX = re.compile(r"(?P<key>[^<>=]+)(?P<how>>=|<=|>|<)(?P<limit>[^<>=]+)")
_EXAMPLES = "such as exposed_comm_percent>5 or 'phases.dispatch(F).overlapped_percent<80'"
_PHASES = "phases."
_OF_WAITING = ("waiting_ms", "exposed_waiting_ms")


@dataclass(frozen=True)
class Condition:
    """What makes the command fail.

    Attributes:
        text: as the user wrote it.
        phase: whose number; None: of the whole window.
        key: of the JSON.
        how: one of > >= < <=.
        limit: a finite number.
    """

    text: str
    phase: str | None
    key: str
    how: str
    limit: float

    def failure(self, report: Mapping[str, Any]) -> str | None:
        """What to say where the condition holds in the command's JSON; None where it does not.

        Raises:
            ValueError: there is no such phase or number, or it is of waiting that cannot be told.
        """
        place = report
        if self.phase is not None:
            found = {phase["name"]: phase for phase in report["phases"]}
            if self.phase not in found:
                known = "the trace has no phases"
                if found:
                    known = f"of the trace's phases: {_unknown(self.phase, list(found))}"
                raise ValueError(f"--fail-if {self.text}: {known}")
            place = found[self.phase]
        value = place[self.key]
        if value is None:
            raise ValueError(
                f"--fail-if {self.text}: cannot be told, as what it is a percentage of is 0"
            )
        if self.key in _OF_WAITING and place["comm_ms"] and not place["waiting_known"]:
            raise ValueError(
                f"--fail-if {self.text}: cannot be judged, as no kernel that only waits ran, and "
                "those that move data, such as NCCL's, wait within: how much is waiting is not "
                "told. Have a condition on exposed_comm_ms or comm_ms instead"
            )
        if not _COMPARE[self.how](value, self.limit):
            return None
        return f"failed: {self.text} ({self.key} is {value:.6g})"


def parse_condition(text: str) -> Condition:
    """The condition that a text such as `exposed_comm_percent>5` states.

    Raises:
        ValueError: it is none, or of something that the JSON does not have.
    """
    match = _SYNTAX.fullmatch(text)
    if match is None:
        raise ValueError(f"--fail-if {text!r}: must be KEY>NUMBER, with > >= < or <=, {_EXAMPLES}")
    path, how, limit = (match[part].strip() for part in ("key", "how", "limit"))
    phase, key, known = None, path, NUMBERS
    if path.startswith(_PHASES):
        phase, dot, key = path.removeprefix(_PHASES).rpartition(".")
        known = PHASE_NUMBERS
        if not dot or not phase:
            raise ValueError(f"--fail-if {text!r}: a phase and a key are needed, {_EXAMPLES}")
    if key not in known:
        raise ValueError(f"--fail-if {text!r}: {_unknown(key, known)}")
    try:
        number = float(limit)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"--fail-if {text!r}: {limit!r} is no number, {_EXAMPLES}")
    return Condition(text, phase, key, how, number)


def _unknown(name: str, known: Sequence[str]) -> str:
    from ..parallel.simulate.amounts import unknown_name  # takes a while, and is rarely needed

    return unknown_name(name, known)
