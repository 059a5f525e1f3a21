"""What a kernel or operator does, by its name: it computes, communicates or copies.

The table of known names stands in `kernel_table`; a user's own rules come before it. What no rule
names, or what looks like communication and is none that is known, is "unknown": it counts as
computation, and a report lists it with its time.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

from .kernel_table import GROUPS, ROWS, UNKNOWN


class Class(NamedTuple):
    """What activities of one name do.

    Attributes:
        group: "compute", "communication", "copy" or "unknown".
        role: of communication: "dispatch", "combine", "allreduce", "wait" ...; of computation
            "gemm" or "attention", where that shows; "" otherwise.
        library: such as "DeepEP"; "" where the name does not say.
    """

    group: str
    role: str = ""
    library: str = ""


@dataclass(frozen=True)
class Rule:
    """Names that a regular expression is found in, and what they do.

    Attributes:
        match: the expression; it is searched, not anchored.
        group: "communication", "compute", "copy", or "unknown" for what is to be listed as that.
        role, library: as of `Class`. Communication of role "wait" only waits for other ranks.
        bare: search the name without return type, template arguments and parameters, in which
            other kernels' names often occur; otherwise in all of it.

    Raises:
        ValueError: a group that does not exist, or no regular expression.
    """

    match: str
    group: str
    role: str = ""
    library: str = ""
    bare: bool = False
    pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"group={self.group!r} does not exist; take one of {_known(GROUPS)}")
        try:
            object.__setattr__(self, "pattern", re.compile(self.match))
        except re.error as error:
            raise ValueError(
                f"match={self.match!r} is no regular expression: {error}; write a backslash "
                "before characters such as ( [ * + that the name itself has"
            ) from None


RULES: tuple[Rule, ...] = tuple(
    Rule(match, group, role, library, bare) for library, role, group, match, bare in ROWS
)


def classify(name: str, rules: Sequence[Rule] = RULES) -> Class:
    """What an activity does; the first rule that fits its name says."""
    bare = bare_name(name)
    for rule in rules:
        if rule.pattern.search(bare if rule.bare else name):
            return Class(rule.group, rule.role, rule.library)
    return Class(UNKNOWN)


def classify_all(names: Iterable[str], rules: Sequence[Rule] = RULES) -> dict[str, Class]:
    """What each of the names does. A trace has few names and repeats them often."""
    return {name: classify(name, rules) for name in set(names)}


def bare_name(name: str) -> str:
    """A C++ function's qualified name without return type, template arguments and parameters.

    Names that are no C++ function lose what stands in parentheses at their end, as in
    "Memcpy HtoD (Host -> Device)".
    """
    if name.startswith("_Z"):
        return _qualified(name)
    name = name.removeprefix("void ")
    name = name.replace("(anonymous namespace)::", "").replace("<unnamed>::", "")
    end = _END
    if "<" in name:
        # Inner brackets go first. Shifts, or a cut in the name, leave a bracket or a space.
        shorter = _BRACKETS.sub("", name)
        while shorter != name:
            name, shorter = shorter, _BRACKETS.sub("", shorter)
        end = _END_OF_TEMPLATE
    return end.split(name, maxsplit=1)[0].strip()


def _qualified(mangled: str) -> str:
    """The qualified name in a mangled one, without unnamed namespaces and template arguments.

    Profilers leave names of the Itanium C++ ABI as they are where they cannot demangle them.
    """
    parts: list[str] = []
    position = _MANGLED.match(mangled)
    place = position.end() if position else len(mangled)
    while digits := _DIGITS.match(mangled, place):
        place = digits.end() + int(digits.group())
        parts.append(mangled[digits.end() : place])
    return "::".join(part for part in parts if not part.startswith("_GLOBAL__N_")) or mangled


def load_rules(path: str | Path) -> tuple[Rule, ...]:
    """A user's rules, followed by the table's.

    The file is TOML with one entry a rule, the most particular first:

        [[kernel]]
        match = "my_lib::exchange"
        group = "communication"
        role = "dispatch"
        library = "my_lib"

    Raises:
        ValueError: the file cannot be read or an entry is wrong; the message says which and how.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot read the rules: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    entries = table.get("kernel")
    if not isinstance(entries, list) or not entries or set(table) != {"kernel"}:
        raise ValueError(
            f"{path}: rules are entries that begin with [[kernel]] and have match and group; "
            f"found {_known(table) or 'nothing'}"
        )
    own = [
        _rule(f"{path}: [[kernel]] entry {number}", entry)
        for number, entry in enumerate(cast("list[object]", entries), 1)
    ]
    return (*own, *RULES)


def _rule(where: str, entry: object) -> Rule:
    """A rule of one entry of a user's file."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be a table with match and group")
    values = cast("dict[str, Any]", entry)
    for key, value in values.items():
        if key not in _KEYS:
            raise ValueError(f"{where}: unknown key {key!r}; there are {_known(_KEYS)}")
        if not isinstance(value, _KEYS[key]):
            raise ValueError(f"{where}: {key}={value!r} must be a {_KEYS[key].__name__}")
    for key in ("match", "group"):
        if not values.get(key):
            raise ValueError(f"{where}: {key} is missing")
    try:
        return Rule(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _known(names: Iterable[str]) -> str:
    return ", ".join(names)


_KEYS: dict[str, type] = {"match": str, "group": str, "role": str, "library": str, "bare": bool}
_MANGLED = re.compile(r"_ZN?K?")
_DIGITS = re.compile(r"[0-9]+")
_END = re.compile(r"[<(]")
_END_OF_TEMPLATE = re.compile(r"[<>( ]")
_BRACKETS = re.compile(r"<[^<>]*>")
