"""Sets of time as lists of intervals: what they cover together, share and leave.

A set is a list of `(start, end)` in whole ns, end excluded, sorted, disjoint and without empty
intervals; neighbours do not touch. `union` makes one of any intervals, the others take and return
such sets, so that a length is exact and equal sets are equal lists.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from .trace import Interval

# With one set this many times longer than the other, looking places up beats walking both.
_MUCH_LONGER = 8


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """What any intervals cover together. They may overlap, be empty and come in any order."""
    merged: list[Interval] = []
    ordered = sorted(intervals)
    if not ordered:
        return merged
    first, last = ordered[0]
    for start, end in ordered:
        if start > last:
            if first < last:
                merged.append((first, last))
            first, last = start, end
        elif end > last:
            last = end
    if first < last:
        merged.append((first, last))
    return merged


def intersection(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """What two sets share."""
    if len(a) > len(b):
        a, b = b, a
    shared: list[Interval] = []
    here = there = 0
    if len(a) * _MUCH_LONGER < len(b):
        for first, last in a:
            there = max(bisect_right(b, (first, first), there) - 1, 0)
            while there < len(b) and b[there][0] < last:
                start, end = b[there]
                there += 1
                if end > first:
                    shared.append((max(start, first), min(end, last)))
        return shared
    while here < len(a) and there < len(b):
        start = max(a[here][0], b[there][0])
        end = min(a[here][1], b[there][1])
        if start < end:
            shared.append((start, end))
        if a[here][1] < b[there][1]:
            here += 1
        else:
            there += 1
    return shared


def subtract(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """What set `a` covers and set `b` does not."""
    left: list[Interval] = []
    position = 0
    for start, end in a:
        # Intervals of b that end before this one starts end before all later ones, too.
        while position < len(b) and b[position][1] <= start:
            position += 1
        ahead = position
        while ahead < len(b) and b[ahead][0] < end:
            if b[ahead][0] > start:
                left.append((start, b[ahead][0]))
            start = b[ahead][1]
            ahead += 1
        if start < end:
            left.append((start, end))
    return left


def clip(a: Sequence[Interval], window: Interval) -> list[Interval]:
    """What set `a` covers within a window."""
    first, last = window
    if first >= last:
        return []
    # The interval before the first one that starts after the window's start may reach into it.
    position = max(bisect_right(a, (first, first)) - 1, 0)
    inside: list[Interval] = []
    while position < len(a) and a[position][0] < last:
        start, end = max(a[position][0], first), min(a[position][1], last)
        if start < end:
            inside.append((start, end))
        position += 1
    return inside


def lengths_within(a: Sequence[Interval], windows: Sequence[Interval]) -> list[int]:
    """How long set `a` is within each of some windows, ns; they are sorted and disjoint."""
    lengths: list[int] = []
    position = 0
    for first, last in windows:
        while position < len(a) and a[position][1] <= first:
            position += 1
        covered, ahead = 0, position
        while ahead < len(a) and a[ahead][0] < last:
            start, end = a[ahead]
            covered += (end if end < last else last) - (start if start > first else first)
            ahead += 1
        lengths.append(covered)
    return lengths


def length(a: Iterable[Interval]) -> int:
    """How long a set is, ns."""
    return sum(end - start for start, end in a)
