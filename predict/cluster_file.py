"""Cluster descriptions in TOML: their keys, and everything that is wrong with one, told at once."""

from __future__ import annotations

import os.path
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import cast

Value = str | int | float | bool

_PRESETS = Path(__file__).with_name("clusters")
# As `comm.cost.Links` has them; so wide that only slips are refused.
_SMALL, _MOST = 1e-6, 1e9


@dataclass(frozen=True)
class Key:
    """A key that a description may have.

    Attributes:
        kind: str, bool, int or float.
        what: what stands there, with its unit.
        least, most: of a number.
        required: no cluster goes without.
    """

    kind: type
    what: str
    least: float = 0
    most: float = _MOST
    required: bool = False

    def expected(self) -> str:
        """What to write."""
        if self.kind is str:
            return f"a text of 1 to 60 characters, {self.what}"
        if self.kind is bool:
            return f"true or false, {self.what}"
        number = "a whole number" if self.kind is int else "a number"
        return f"{number} from {self.least:g} to {self.most:g}, {self.what}"

    def accepts(self, value: object) -> bool:
        """Whether `value` can stand there."""
        if self.kind is str:
            return isinstance(value, str) and value.isprintable() and 0 < len(value) <= 60
        if self.kind is bool or isinstance(value, bool):
            return self.kind is bool and isinstance(value, bool)
        number = isinstance(value, int if self.kind is int else int | float)
        return number and self.least <= value <= self.most


KEYS: dict[str, Key] = {
    "name": Key(str, "the cluster's"),
    "nodes": Key(int, "how many there are", least=1),
    "num_gpus": Key(int, "how many there are", least=1),
    "gpus_per_node": Key(int, "GPUs of a node", least=1, required=True),
    "gpu.name": Key(str, "such as H800", required=True),
    "gpu.num_sms": Key(int, "multiprocessors of a GPU", required=True),
    "gpu.memory_gb": Key(float, "GB (1e9 bytes) of a GPU", least=_SMALL, required=True),
    "gpu.bf16_tflops": Key(float, "dense peak in BF16, TFLOP/s", least=_SMALL, required=True),
    "gpu.fp8_tflops": Key(
        float, "dense peak in FP8, or BF16's without FP8, TFLOP/s", least=_SMALL, required=True
    ),
    "gpu.memory_gbps": Key(float, "bandwidth of memory, GB/s", least=_SMALL, required=True),
    "inside.gbps": Key(
        float, "what a GPU reaches inside its node, GB/s each way", least=_SMALL, required=True
    ),
    "inside.peak_gbps": Key(float, "the link's own, GB/s each way", least=_SMALL),
    "inside.latency_us": Key(float, "us", required=True),
    "across.gbps": Key(
        float, "what a GPU reaches across nodes, GB/s each way", least=_SMALL, required=True
    ),
    "across.peak_gbps": Key(float, "the card's own, GB/s of a GPU each way", least=_SMALL),
    "across.latency_us": Key(float, "us, under different leaf switches", required=True),
    "across.same_leaf_us": Key(float, "us, under one leaf switch"),
    "across.nics_per_node": Key(int, "network cards of a node", least=1),
    "across.nic_gbit": Key(float, "of a network card, Gbit/s", least=_SMALL),
    "network.tiers": Key(int, "layers of switches", least=1, most=8),
    "network.ports": Key(int, "of a switch", least=2),
    "network.planes": Key(int, "separate networks", least=1),
    "network.rails": Key(bool, "whether a node's cards go to different leaf switches"),
}
_TABLES = ("gpu", "inside", "across", "network", "all_to_all", "sources")
_ALL_TO_ALL = {
    name: Key(float, "measured, GB/s of logical bytes", least=_SMALL, required=True)
    for name in ("dispatch_gbps", "combine_gbps")
}


@dataclass
class Description:
    """What a file says, with all that is wrong with it.

    Attributes:
        where: the file, or the preset's name.
        values: by dotted key.
        sources: of each value, by the same key.
        mistakes: a line each.
    """

    where: str
    values: dict[str, Value] = field(default_factory=dict[str, Value])
    sources: dict[str, str] = field(default_factory=dict[str, str])
    mistakes: list[str] = field(default_factory=list[str])

    def wrong(self, key: str, what: str) -> None:
        """Add a mistake."""
        self.mistakes.append(f"{key if key.isprintable() else repr(key)}: {what}")

    def check(self) -> None:
        """Raise what is wrong, if anything is.

        Raises:
            ValueError: all mistakes, a line each if there are several.
        """
        if len(self.mistakes) == 1:
            raise ValueError(f"{self.where}: {self.mistakes[0]}")
        if self.mistakes:
            lines = "".join(f"\n  {mistake}" for mistake in self.mistakes)
            raise ValueError(f"{self.where}: {len(self.mistakes)} mistakes{lines}")

    def all_to_all(self) -> dict[int, tuple[float, float]]:
        """Dispatch and combine, GB/s by number of ranks, ascending, where both are there."""
        ranks = {int(key.split(".")[1]) for key in self.values if key.startswith("all_to_all.")}
        both: dict[int, tuple[float, float]] = {}
        for count in sorted(ranks):
            dispatch, combine = (
                self.values.get(f"all_to_all.{count}.{name}") for name in _ALL_TO_ALL
            )
            if dispatch is not None and combine is not None:
                both[count] = float(dispatch), float(combine)
        return both


def preset_names() -> tuple[str, ...]:
    """The clusters that come with this package."""
    return tuple(sorted(path.stem for path in _PRESETS.glob("*.toml")))


def describe(name_or_path: str | Path) -> Description:
    """The description of a preset, or of a file; contradictions are not looked for.

    Raises:
        ValueError: neither; or no TOML.
    """
    text = str(name_or_path)
    presets = preset_names()
    if text in presets:
        return _own(_parse(_PRESETS / f"{text}.toml"), text)
    path = Path(text)
    if path.suffix != ".toml" and not os.path.isfile(path):
        near = get_close_matches(text.casefold(), presets, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"no cluster {text!r}{hint}; use {', '.join(presets)}, or the path of a .toml file"
        )
    top = _parse(path)
    base = top.pop("base", None)
    found = _own(top, text)
    found.values.setdefault("name", path.stem)
    if base is None:
        return found
    if base not in presets:
        found.wrong("base", f"{base!r} is none of {', '.join(presets)}")
        found.check()
    return _over(describe(str(base)), found)


def missing(found: Description) -> None:
    """Add the required keys that are not there to the mistakes."""
    for dotted, key in KEYS.items():
        if key.required and dotted not in found.values and not _told(found, dotted):
            found.wrong(dotted, f"missing; give {key.expected()}")
    measured = {key.split(".")[1] for key in found.values if key.startswith("all_to_all.")}
    for count in sorted(measured, key=int):
        for name, key in _ALL_TO_ALL.items():
            dotted = f"all_to_all.{count}.{name}"
            if dotted not in found.values and not _told(found, dotted):
                found.wrong(dotted, f"missing; give {key.expected()}")


def _told(found: Description, dotted: str) -> bool:
    """Whether the key is there, but wrong."""
    return any(mistake.startswith(f"{dotted}: ") for mistake in found.mistakes)


def _parse(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from None


def _own(top: Mapping[str, object], where: str) -> Description:
    """What the tables say by themselves: known keys, values of their kind, sources."""
    found = Description(where)
    stated: dict[str, object] = {}
    for dotted, value in _flat(top):
        if dotted.startswith("sources."):
            stated[dotted.removeprefix("sources.")] = value
            continue
        key = _key(dotted)
        if key is None:
            found.wrong(dotted, _unknown(dotted))
        elif not key.accepts(value):
            found.wrong(dotted, f"{_shown(value)} is not {key.expected()}")
        elif dotted in found.values:
            found.wrong(dotted, "is there twice, once with its table and once by a quoted name")
        else:
            found.values[dotted] = cast("Value", value)
    _attribute(found, stated)
    return found


def _attribute(found: Description, stated: Mapping[str, object]) -> None:
    """Give each value its source: the longest key in `stated` that it is or begins with."""
    for dotted, source in stated.items():
        known = [*found.values, *KEYS, *_TABLES[:-1]]
        if not isinstance(source, str):
            found.wrong(f"sources.{dotted}", f"{_shown(source)} is not a text")
        elif not any(_begins(key, dotted) for key in found.values) and not _told(found, dotted):
            found.wrong(
                f"sources.{dotted}", f"a source of what is not there; {_near(dotted, known)}"
            )
    for dotted in found.values:
        fitting = [key for key in stated if _begins(dotted, key)]
        source = stated[max(fitting, key=len)] if fitting else found.where
        found.sources[dotted] = str(source)


def _over(base: Description, own: Description) -> Description:
    """`own` laid over `base`; what was measured with other links than `own` has is left out."""
    other_links = any(key.startswith(("all_to_all.", "inside.", "across.")) for key in own.values)
    kept = [k for k in base.values if not (other_links and k.startswith("all_to_all."))]
    return Description(
        f"{own.where} on top of {base.where}",
        {key: base.values[key] for key in kept} | own.values,
        {key: base.sources[key] for key in kept} | own.sources,
        own.mistakes,
    )


def _flat(table: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Leaves of nested tables by their dotted keys."""
    for name, value in table.items():
        if isinstance(value, dict) and (prefix or name in _TABLES):
            yield from _flat(cast("dict[str, object]", value), f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _key(dotted: str) -> Key | None:
    """What may stand at a dotted key; None: it is unknown."""
    table, *rest = dotted.split(".")
    if table == "all_to_all" and len(rest) == 2:
        count, name = rest
        # Only as it is written in full, so that 016 and 16 cannot stand side by side.
        if re.fullmatch("[1-9][0-9]{0,8}", count):
            return _ALL_TO_ALL.get(name)
    return KEYS.get(dotted)


def _unknown(dotted: str) -> str:
    """What to say of a key that there is not."""
    if dotted in _TABLES:
        return "is a table, with keys of its own"
    if dotted.startswith("all_to_all."):
        return "unknown; all_to_all.RANKS has dispatch_gbps and combine_gbps"
    tables = () if "." in dotted else (*_TABLES, "base")
    return f"unknown; {_near(dotted, [*KEYS, *tables])}"


def _near(dotted: str, known: list[str]) -> str:
    near = get_close_matches(dotted.casefold(), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"


def _begins(dotted: str, key: str) -> bool:
    return dotted == key or dotted.startswith(f"{key}.")


def _shown(value: object) -> str:
    """A value as a message shows it, cut where it is long."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
