"""Costs and sizes from a file, TOML or JSON; docs/simulate.md has an example with every key."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, cast

from .amounts import check_amount, checked, unknown_name
from .costs import FROM_PHASES, NEEDED, ONE_NUMBER, Costs
from .memory import Memory
from .phases import NAMES, Phases

SUFFIXES = (".toml", ".json")

_COSTS = tuple(f.name for f in fields(Costs))
_MEMORY = tuple(f.name for f in fields(Memory))
_ABOUT_PHASES = tuple(f.name for f in fields(Phases) if f.name != "times")


@dataclass(frozen=True)
class CostFile:
    """What a file says: the costs, and the sizes in memory where it has a [memory] table."""

    costs: Costs
    memory: Memory | None


def load_costs(path: str | Path) -> CostFile:
    """The costs in a .toml or .json file.

    The keys are the fields of `Costs`; the table `phases` has the times of the phases by their
    names and the other fields of `Phases`; the table `memory` has the fields of `Memory`.

    Raises:
        ValueError: the file cannot be read, is no TOML or JSON, or a key or value is wrong or
            missing; the message has file, line, key, and what was expected.
    """
    source = _Source(Path(path), _read(Path(path)))
    top = _parse(source)
    source.know("", top, (*_COSTS, "memory"))
    unit = source.text("", top, "unit", Costs.unit)
    phases = _phases(source, source.table(top, "phases")) if "phases" in top else None
    memory = _memory(source, source.table(top, "memory")) if "memory" in top else None
    given = {
        name: source.amount("", name, top[name])
        for name in _COSTS
        if name in top and name not in ("phases", "unit")
    }
    for name in FROM_PHASES:
        if name in given and phases is not None:
            source.fail(f"{name} is given beside [phases], which it follows from", "", name)
    missing = [name for name in NEEDED if name not in given]
    if phases is None and missing:
        source.fail(f"no cost {', '.join(missing)}; give F, I and W, or [phases]")
    try:
        return CostFile(Costs(**cast("dict[str, Any]", given), phases=phases, unit=unit), memory)
    except ValueError as error:
        source.fail(str(error))


@dataclass(frozen=True)
class _Source:
    """The file, to say where something stands."""

    path: Path
    written: str

    def fail(self, message: str, table: str = "", key: str = "") -> NoReturn:
        line = self._line(table, key) if key else 0
        raise ValueError(f"{self.path}{f', line {line}' if line else ''}: {message}")

    def _line(self, table: str, key: str) -> int:
        """The line of a key, found by its looks, as the parsers tell none; 0 if it is not found."""
        begin = 0
        for name in filter(None, (table, key)):
            found = re.compile(
                rf"""(?m)^[ \t]*\[\s*{re.escape(name)}\s*\]"""
                rf"""|(?<![\w("'])["']?{re.escape(name)}["']?\s*[=:]"""
            ).search(self.written, begin)
            if found is None:
                return 0
            begin = found.end()
        return self.written.count("\n", 0, begin) + 1

    def know(self, table: str, given: Mapping[str, object], known: Sequence[str]) -> None:
        """Raise ValueError where a key is none of `known`."""
        for key in given:
            if key not in known:
                where = f"in [{table}]: " if table else ""
                self.fail(f"{where}{unknown_name(key, known)}", table, key)

    def table(self, top: Mapping[str, object], name: str) -> dict[str, object]:
        if not isinstance(top[name], dict):
            self.fail(f"{name} is a table of its own, not {_kind(top[name])}", "", name)
        return cast("dict[str, object]", top[name])

    def text(self, table: str, given: Mapping[str, object], key: str, default: str) -> str:
        value = given.get(key, default)
        if not isinstance(value, str) or not (value.isprintable() and len(value) <= 20):
            self.fail(f'{key} is a short text, such as "ms", not {_kind(value)}', table, key)
        return value

    def amount(self, table: str, key: str, value: object) -> object:
        """A number, or a list of numbers, as `Costs` and `Memory` take it."""
        kind = _kind(value)
        if kind == "a table":
            self.fail(f"{key} is a table, not a number", table, key)
        if kind == "a list" and key in ONE_NUMBER:
            self.fail(f"cost {key} is one number, not a list by stage", table, key)
        if key == "bandwidth" and value == math.inf:
            return math.inf
        try:
            return checked(f"{table or 'cost'} {key}", value)
        except (ValueError, OverflowError) as error:
            self.fail(str(error), table, key)


def _read(path: Path) -> str:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: a file of costs ends in {' or '.join(SUFFIXES)}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file of costs") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: no costs, because it is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def _parse(source: _Source) -> dict[str, object]:
    if source.path.suffix.lower() == ".toml":
        try:
            return tomllib.loads(source.written)
        except tomllib.TOMLDecodeError as error:
            source.fail(f"not TOML: {error}")

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                source.fail(f"{name} is there twice")
        return dict(pairs)

    try:
        top: object = json.loads(source.written, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        source.fail(f"not JSON: {error.msg} (at line {error.lineno}, column {error.colno})")
    except RecursionError:
        source.fail("not costs: nested too deeply")
    if not isinstance(top, dict):
        source.fail(
            f'not costs: an object such as {{"F": 1, "I": 1, "W": 1}} was expected, not '
            f"{_kind(top)}"
        )
    return cast("dict[str, object]", top)


def _phases(source: _Source, table: dict[str, object]) -> Phases:
    source.know("phases", table, NAMES + _ABOUT_PHASES)
    times: dict[str, float] = {}
    for name in NAMES:
        if name in table:
            try:
                times[name] = check_amount(f"phases: {name}", table[name])
            except (ValueError, OverflowError) as error:
                source.fail(str(error), "phases", name)
    about: dict[str, Any] = {name: table[name] for name in _ABOUT_PHASES if name in table}
    for name, value in about.items():
        if not _fits(name, value):
            expected = {
                "layers": "a whole number, or a list of them by stage",
                "order": "a list of the names of the phases",
                "comm_share": "a number from 0 to below 1",
            }[name]
            source.fail(f"{name} in [phases] is {expected}, not {_kind(value)}", "phases", name)
    try:
        return Phases(times, **about)
    except ValueError as error:
        source.fail(str(error))


def _fits(name: str, value: object) -> bool:
    entries = cast("list[object]", value) if isinstance(value, list) else [value]
    if name == "order":
        return isinstance(value, list) and all(isinstance(entry, str) for entry in entries)
    if name == "comm_share":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return all(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries)


def _memory(source: _Source, table: dict[str, object]) -> Memory:
    source.know("memory", table, _MEMORY)
    unit = source.text("memory", table, "unit", Memory.unit)
    sizes = {name: source.amount("memory", name, table[name]) for name in table if name != "unit"}
    try:
        return Memory(**cast("dict[str, Any]", sizes), unit=unit)
    except ValueError as error:
        source.fail(str(error))


def _kind(value: object) -> str:
    """What a value is, in words."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    return f"{value!r}" if isinstance(value, str | int | float) else "another kind of value"
