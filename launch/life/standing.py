"""Where each rank of a run stands, as a table for people: who is where, who waits for whom.

A thousand ranks fit: equal positions share a line, and few lines are left in any case.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

_LINES = 30  # of positions
_NAMES = 8  # of hosts, of ranks in a circle, of suspects
_WAIT = re.compile(r"waiting for (.+?) from ranks? (\d+(?:, \d+)*)")
_RANKS = re.compile(r"\branks (\d+(?:, \d+)+)")
_OWN = re.compile(r"^rank \d+, ")


class Standing(NamedTuple):
    """One rank.

    Attributes:
        rank, host: which, and on which machine.
        line: its position, "" if it gave no answer.
        peers: whom it waits for, where `line` does not say so.
        gone: how it ended, where that is known.
    """

    rank: int
    host: str
    line: str = ""
    peers: tuple[int, ...] = ()
    gone: str = ""


def table(why: str, ranks: Sequence[Standing]) -> str:
    """The whole message, of several lines.

    Args:
        why: what made the ranks tell where they stand.
        ranks: all of them.
    """
    lines = [f"counterflow: error: {why}; where each rank stands:"]
    lines += [f"  {line}" for line in (*_positions(ranks), *_silent(ranks), *_conclusion(ranks))]
    return "\n".join(lines) + "\n"


def waits(ranks: Iterable[Standing]) -> dict[int, set[int]]:
    """Whom each rank that answered waits for; ranks that wait for nobody are left out."""
    found: dict[int, set[int]] = {}
    for standing in ranks:
        peers = {*standing.peers, *_awaited(_OWN.sub("", standing.line))} - {standing.rank}
        if peers:
            found[standing.rank] = peers
    return found


@cache  # a thousand ranks that wait for each other have one text, of a thousand numbers
def _awaited(text: str) -> frozenset[int]:
    found = _WAIT.finditer(text)
    return frozenset(int(rank) for match in found for rank in match[2].split(", "))


def ranges(ranks: Iterable[int]) -> str:
    """ "rank 3", "ranks 0-3, 7"."""
    ordered = sorted(set(ranks))
    runs: list[list[int]] = []
    for rank in ordered:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    listed = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank {listed}" if len(ordered) == 1 else f"ranks {listed}"


def _positions(ranks: Sequence[Standing]) -> list[str]:
    answered = [s for s in ranks if s.line]
    kinds: tuple[Callable[[str], str], ...] = (_exact, _any_peers, _any_step)
    groups: dict[str, list[Standing]] = {}
    for kind in kinds:
        groups = _grouped(answered, kind)
        if len(groups) <= _LINES:
            break
    shown = sorted(groups.items(), key=lambda item: item[1][0].rank)
    rest = shown[_LINES:]
    lines = [f"{_who(members)}: {text}" for text, members in shown[:_LINES]]
    if rest:
        count = sum(len(members) for _, members in rest)
        lines.append(f"{count} more ranks, at {len(rest)} more positions")
    return lines


def _grouped(ranks: Iterable[Standing], kind: Callable[[str], str]) -> dict[str, list[Standing]]:
    groups: dict[str, list[Standing]] = defaultdict(list)
    for standing in ranks:
        groups[kind(standing.line)].append(standing)
    return groups


def _exact(line: str) -> str:
    return _with_ranges(_OWN.sub("", line))


@cache
def _with_ranges(own: str) -> str:
    return _RANKS.sub(lambda match: ranges(map(int, match[1].split(", "))), own)


def _any_peers(line: str) -> str:
    return _WAIT.sub(lambda match: f"waiting for {match[1]} from others", _exact(line))


def _any_step(line: str) -> str:
    return re.sub(r"\d+", "..", _any_peers(line))


def _silent(ranks: Sequence[Standing]) -> list[str]:
    lines: list[str] = []
    groups: dict[str, list[Standing]] = defaultdict(list)
    for standing in ranks:
        if not standing.line:
            how = standing.gone or "no answer: its process is stopped, gone, or held in C code"
            groups[how].append(standing)
    for how, members in list(groups.items())[:_NAMES]:
        lines.append(f"{_who(members)}: {how}")
    return lines


def _who(members: Sequence[Standing]) -> str:
    hosts = list(dict.fromkeys(s.host for s in members if s.host))
    named = ", ".join(hosts[:_NAMES]) + (", ..." if len(hosts) > _NAMES else "")
    return ranges(s.rank for s in members) + (f" ({named})" if named else "")


def _conclusion(ranks: Sequence[Standing]) -> list[str]:
    """Who waits for whom in the end."""
    edges = waits(ranks)
    if not edges:
        return []
    by: dict[int, list[int]] = defaultdict(list)
    for rank, peers in edges.items():
        for peer in peers:
            by[peer].append(rank)
    # Whoever is waited for and does not wait itself holds up the others.
    suspects = [rank for rank in by if rank not in edges]
    if suspects:
        suspects.sort(key=lambda r: (-len(by[r]), r))
        listed = ranges(suspects[:_NAMES]) + (", ..." if len(suspects) > _NAMES else "")
        behind = {rank for suspect in suspects for rank in by[suspect]}
        verb = "waits for nobody itself" if len(suspects) == 1 else "wait for nobody themselves"
        waiting = f"{ranges(behind)} wait{'s' if len(behind) == 1 else ''}"
        return [f"{waiting} for {listed}, which {verb}: look there first"]
    circle = _circle(edges)
    shown = " -> ".join(map(str, (*circle[:_NAMES], circle[0])))
    return [f"every one of them waits for another, in a circle: rank {shown}"]


def _circle(edges: Mapping[int, set[int]]) -> list[int]:
    """Some circle of ranks, each waiting for the next; every rank waited for waits itself."""
    path = [min(edges)]
    while True:
        following = min(edges[path[-1]])
        if following in path:
            return path[path.index(following) :]
        path.append(following)
