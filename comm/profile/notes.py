"""Notes of several ranks as few sentences: what differs in numbers alone is said once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_RANK = re.compile(r"rank (\d+)")
_OF_RANKS = re.compile(r"(rank \d+(?:, rank \d+)*): (.*)", re.DOTALL)
# A number by itself, no part of a name such as 0F3, rank3.json or v1.2.3.
_NUMBER = re.compile(r"(?<![\w./-])\d+(?:\.\d+)?(?![\w/-]|\.\w)")


def merged(notes: Iterable[str]) -> list[str]:
    """The notes, those of single ranks that differ in numbers alone as one.

    "rank 0: 3.1 % of it" and "rank 1: 4.4 % of it" become "ranks 0, 1: 3.1 to 4.4 % of it", where
    the first of them stood.
    """
    groups: dict[tuple[str, ...], list[tuple[list[str], str]]] = {}
    for note in notes:
        found = _OF_RANKS.fullmatch(note)
        ranks, text = (found[1].split(", "), found[2]) if found else ([], note)
        key = ("of ranks", _NUMBER.sub("#", text)) if found else ("as it is", note)
        groups.setdefault(key, []).append((ranks, text))
    return [_as_one(group) for group in groups.values()]


def _as_one(group: Sequence[tuple[list[str], str]]) -> str:
    ranks = [rank for of, _ in group for rank in of]
    first = group[0][1]
    if not ranks:
        return first
    columns = zip(*(_NUMBER.findall(text) for _, text in group), strict=True)
    said = iter([_range(column) for column in columns])
    return f"{listed(dict.fromkeys(ranks))}: {_NUMBER.sub(lambda _: next(said), first)}"


def _range(numbers: Sequence[str]) -> str:
    least, most = min(numbers, key=float), max(numbers, key=float)
    return least if float(least) == float(most) else f"{least} to {most}"


def listed(names: Iterable[str]) -> str:
    """Names for a sentence, ranks together: "rank 1", "rank 3", "rank 4" as "ranks 1, 3, 4"."""
    names = list(names)
    ranks = sorted(int(found[1]) for name in names if (found := _RANK.fullmatch(name)))
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [", ".join(map(str, run)) if len(run) < 3 else f"{run[0]} to {run[-1]}" for run in runs]
    found = [f"rank{'s' if len(ranks) > 1 else ''} {', '.join(texts)}"] if texts else []
    return ", ".join([*found, *(name for name in names if not _RANK.fullmatch(name))])
