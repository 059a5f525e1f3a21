"""Whole numbers as people list them: "5", "5-7", "3,8-9"."""

from __future__ import annotations

import re
from typing import NamedTuple

_ONE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)


class Range(NamedTuple):
    """The numbers from `first` to `last`, both included; `str` gives "5-7", or "5" for one."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"


def parse_ranges(text: str) -> tuple[Range, ...]:
    """The ranges that a text lists, ascending; those that touch or overlap become one.

    Raises:
        ValueError: it is no such list; the message says what is wrong with which part.
    """
    found: list[Range] = []
    for part in text.split(","):
        match = _ONE.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"{part.strip()!r} is no number or range of numbers, such as 5 or 5-7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{part.strip()} runs backwards; write {last}-{first}")
        found.append(Range(first, last))
    joined: list[Range] = []
    for each in sorted(found):
        if joined and each.first <= joined[-1].last + 1:
            joined[-1] = Range(joined[-1].first, max(joined[-1].last, each.last))
        else:
            joined.append(each)
    return tuple(joined)
