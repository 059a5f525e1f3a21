"""What a trace says besides its events' times: collectives, devices, ranks.

Kineto writes the parameters of a collective into the arguments of its kernel, or into those of the
operator `record_param_comms` that launched it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from .trace import Exchange

# c10d's names of scalar types, in lower case, and torch's.
_ELEMENT_BYTES = {
    **dict.fromkeys(("byte", "char", "bool", "uint8", "int8", "unsigned char", "qint8"), 1),
    **dict.fromkeys(("short", "half", "bfloat16", "float16", "int16", "uint16"), 2),
    **dict.fromkeys(("int", "float", "int32", "uint32", "float32", "complexhalf"), 4),
    **dict.fromkeys(("long", "double", "int64", "uint64", "float64", "complexfloat"), 8),
    "complexdouble": 16,
}
# Not a part of a word such as "franked", nor the count of "ranks8".
_RANK_IN_NAME = re.compile(r"(?<![a-z])rank[-_.]?(\d+)(?!\d)", re.IGNORECASE)


class Place(NamedTuple):
    """Where a trace was recorded, as far as it says."""

    rank: int | None
    world_size: int | None
    num_sms: int | None
    device_name: str


def exchange(args: Mapping[str, Any]) -> Exchange | None:
    """What the arguments of a kernel or operator say of a collective; None if nothing."""
    if "Collective name" not in args and "In msg nelems" not in args:
        return None
    size = element_bytes(str(args.get("dtype", "")))
    return Exchange(
        collective=str(args.get("Collective name", "")),
        sent_bytes=_product(args.get("In msg nelems"), size),
        received_bytes=_product(args.get("Out msg nelems"), size),
        group=str(args.get("Process Group Name", "")),
        group_size=whole(args.get("Group size")),
        sequence=whole(args.get("Seq")),
        sent_splits=_numbers(args.get("In split size")),
        received_splits=_numbers(args.get("Out split size")),
        group_ranks=_numbers(args.get("Process Group Ranks")),
    )


def groups(top: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Ranks of each process group that a trace lists, by name; without those listed in part.

    Args:
        top: top-level keys and values of the trace. c10d's list is `distributedInfo.pg_config`;
            it leaves out the ranks of a group that all belong to.
    """
    found: dict[str, tuple[int, ...]] = {}
    world_size = whole(_mapping(top.get("distributedInfo")).get("world_size"))
    for entry in _listed_groups(top):
        size, ranks = whole(entry.get("pg_size")), _numbers(entry.get("ranks"))
        if not ranks and size is not None and size == world_size:
            ranks = tuple(range(size))
        if ranks and size in (None, len(ranks)) and entry.get("pg_name"):
            found[str(entry["pg_name"])] = ranks
    return found


def all_groups(top: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Ranks of every process group that a trace lists; () if any is not listed in full."""
    found = groups(top)
    return tuple(found.values()) if len(found) == len(_listed_groups(top)) else ()


def expert_ranks(top: Mapping[str, Any]) -> tuple[int, ...]:
    """Ranks of the expert group, which counterflow's recordings tell; () if they are not told."""
    return _numbers(_mapping(top.get("counterflow")).get("expert_ranks"))


def names_gpus(top: Mapping[str, Any]) -> bool:
    """Whether the profiler saw a GPU when it recorded the trace."""
    return bool(top.get("deviceProperties"))


def _listed_groups(top: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """c10d's entries, which may be written as text."""
    listed = _mapping(top.get("distributedInfo")).get("pg_config")
    if isinstance(listed, str):
        try:
            listed = json.loads(listed)
        except ValueError:
            return []
    return [_mapping(one) for one in cast(list[object], listed)] if isinstance(listed, list) else []


def element_bytes(dtype: str) -> int | None:
    """Bytes of an element of a type as c10d or torch names it; None for an unknown one."""
    name = dtype.lower().removeprefix("torch.").removeprefix("c10::")
    if name.startswith("float8"):
        return 1
    return _ELEMENT_BYTES.get(name)


def whole(value: object) -> int | None:
    """A whole number that may be written as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    try:
        return int(value)
    except ValueError:
        return None


def place(top: Mapping[str, Any], file: Path, devices: Iterable[int]) -> Place:
    """Read a trace's top-level keys, and its file's name where they do not tell the rank.

    Args:
        top: top-level keys and values of the trace.
        file: it was read from, such as "rank_3.json.gz" or "rank_3/trace.json".
        devices: indices of the GPUs that ran something, the busiest first.
    """
    told = _mapping(top.get("distributedInfo"))
    rank = whole(told.get("rank"))
    named = _RANK_IN_NAME.search(file.name) or _RANK_IN_NAME.fullmatch(file.parent.name)
    if rank is None and named:
        rank = int(named.group(1))
    properties: dict[int, Mapping[str, Any]] = {}
    listed = top.get("deviceProperties")
    if isinstance(listed, list):
        for idx, one in enumerate(cast(list[object], listed)):
            entry = _mapping(one)
            known = whole(entry.get("id"))
            properties[idx if known is None else known] = entry
    used = next((idx for idx in devices if idx in properties), min(properties, default=0))
    device = properties.get(used, _mapping(None))
    return Place(
        rank,
        whole(told.get("world_size")),
        whole(device.get("numSms")),
        str(device.get("name", "")),
    )


def _mapping(value: object) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}


def _product(count: object, size: int | None) -> int | None:
    number = whole(count)
    return None if number is None or size is None else number * size


def _numbers(value: object) -> tuple[int, ...]:
    """Numbers as a list or as its text; () if they are not all there, as in "[1, 2, ...]"."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return ()
    if not isinstance(value, list):
        return ()
    numbers = [whole(one) for one in cast(list[object], value)]
    return tuple(one for one in numbers if one is not None) if None not in numbers else ()
