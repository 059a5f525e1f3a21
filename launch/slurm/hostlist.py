"""Hostlists as Slurm writes them: "rack[1-2]n[01-02,07],x9" names seven nodes.

Read here and not by `scontrol show hostnames`, which is missing inside most containers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import product

# A name is used in file names and in scontrol's arguments, so nothing else is let through.
_TEXT = re.compile(r"[A-Za-z0-9._-]+")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MOST = 1 << 16  # hosts that one list may name; Slurm's own limit of a cluster's nodes


def parse_hostlist(text: str, source: str = "the hostlist") -> tuple[str, ...]:
    """The hosts of a list, in its order.

    Brackets hold numbers and ranges with their leading zeros, and may come several times in a name;
    the last one varies fastest, as in Slurm.

    Args:
        text: the list.
        source: what it is, for the error.

    Raises:
        ValueError: it is written otherwise, names no host, or more than 65,536.
    """
    hosts: list[str] = []
    for start, item in _items(text, source):
        for host in _hosts(item, start, text, source):
            hosts.append(host)
            if len(hosts) > _MOST:
                raise ValueError(f"{source} {text!r} names more than {_MOST} hosts")
    if not hosts:
        raise ValueError(f"{source} {text!r} names no host")
    return tuple(hosts)


def is_host_name(text: str) -> bool:
    """Whether `text` is one plain node name."""
    return _NAME.fullmatch(text) is not None


def nodes_of_job(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The nodes of the Slurm job that this process is in, in Slurm's order.

    Those of a heterogeneous job are the nodes of its components, one after the other.

    Raises:
        ValueError: the environment names none, or one twice.
    """
    size = environ.get("SLURM_HET_SIZE", "")
    if size:
        if not (size.isascii() and size.isdigit() and 1 <= int(size) <= 128):
            raise ValueError(
                f"the environment's SLURM_HET_SIZE={size!r} is not a number of components"
            )
        names = [f"SLURM_JOB_NODELIST_HET_GROUP_{index}" for index in range(int(size))]
    else:
        names = ["SLURM_JOB_NODELIST"]
    found: dict[str, str] = {}
    for name in names:
        if not environ.get(name):
            raise ValueError(
                f"the environment has no {name}, which names the nodes of a Slurm job; start with "
                "`counterflow launch slurm`, or with srun inside a job"
            )
        for host in parse_hostlist(environ[name], name):
            if host in found:
                raise ValueError(f"{name} names the node {host} that {found[host]} names already")
            found[host] = name
    return tuple(found)


def natural(name: str) -> tuple[tuple[str, int], ...]:
    """A key that sorts node2 before node10, and is different for different names."""
    parts = re.findall(r"([^0-9]*)([0-9]*)", name)
    # The number's length tells node01 from node1, which stand for the same number.
    numbered = tuple((letters, int(digits or -1)) for letters, digits in parts)
    return (*numbered, (name, 0))


def _items(text: str, source: str) -> Iterator[tuple[int, str]]:
    """The items between commas outside brackets, and where each begins."""
    start, opened = 0, -1
    for index, character in enumerate(text + ","):
        if character == "[" and opened < 0:
            opened = index
        elif character == "[":
            raise _wrong(source, text, index, "a '[' inside brackets")
        elif character == "]" and opened < 0:
            raise _wrong(source, text, index, "a ']' without its '['")
        elif character == "]":
            opened = -1
        elif character == "," and opened < 0:
            if index == start:
                raise _wrong(source, text, start, "no name between commas" if text else "no name")
            yield start, text[start:index]
            start = index + 1
    if opened >= 0:
        raise _wrong(source, text, opened, "a '[' without its ']'")


def _hosts(item: str, start: int, text: str, source: str) -> Iterator[str]:
    """The hosts of one item, such as "rack[1-2]n[01-02,07]"."""
    parts: list[list[str]] = []
    count = 1
    for found in re.finditer(r"\[([^\]]*)\]|[^\[]+", item):
        place = start + found.start()
        if found[1] is not None:
            parts.append(_numbers(found[1], place + 1, text, source))
            count *= len(parts[-1])
        elif _TEXT.fullmatch(found[0]):
            parts.append([found[0]])
        else:
            wrong = next(i for i, c in enumerate(found[0]) if not _TEXT.fullmatch(c))
            raise _wrong(source, text, place + wrong, f"{found[0][wrong]!r} in a name")
    if count > _MOST:
        raise ValueError(f"{source} {text!r} names more than {_MOST} hosts")
    if not parts or not is_host_name(parts[0][0]):
        raise _wrong(source, text, start, "a name that begins with neither letter nor digit")
    for chosen in product(*parts):
        yield "".join(chosen)


def _numbers(ranges: str, start: int, text: str, source: str) -> list[str]:
    """The numbers between brackets, with their zeros."""
    numbers: list[str] = []
    for part in ranges.split(","):
        found = _RANGE.fullmatch(part)
        if found is None:
            raise _wrong(source, text, start, f"{part!r} is no number and no range of them")
        first, last = found[1], found[2] or found[1]
        if int(last) < int(first):
            raise _wrong(source, text, start, f"{part!r} is a range that goes down")
        if int(last) - int(first) >= _MOST:
            raise ValueError(f"{source} {text!r} names more than {_MOST} hosts")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        start += len(part) + 1
    return numbers


def _wrong(source: str, text: str, place: int, what: str) -> ValueError:
    return ValueError(
        f"{source} {text!r} is no hostlist as Slurm writes it: {what} at character {place + 1}; "
        "write such as rack[1-2]n[01-02,07],x9"
    )
