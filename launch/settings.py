"""Typed settings: frozen dataclasses from TOML files and command-line overrides, and back to TOML.

A tree of dataclass instances is the whole truth about which keys exist, their types and defaults.
What a person gives, in a file or as `--dotted.key VALUE`, becomes one flat mapping from dotted key
to `Given`; overrides are laid over the file's, and `apply` turns the mapping into a changed tree.
Both ways of giving a value are thereby checked by the same code and have the same errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import tomllib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_NONE = "none"  # how None is written, TOML having no word for it


class ConfigError(ValueError):
    """A setting that cannot be used: says where it was given, which key, and what to do."""


class Given(NamedTuple):
    """A value as a person gave it.

    Attributes:
        value: a TOML value, or the text after a command-line flag.
        source: where it was given: a file's path or the flag.
        is_text: True for command-line text, which is read according to the key's type.
    """

    value: object
    source: str
    is_text: bool = False


class Row(NamedTuple):
    """One key of the configuration as `describe` lists it; all four are texts for people."""

    key: str
    type: str
    default: str
    doc: str


def option(default: Any, doc: str) -> Any:
    """A dataclass field with a default and the one line that `--help` shows for it."""
    return dataclasses.field(default=default, metadata={"doc": doc})


def read_toml(path: str | Path) -> dict[str, Given]:
    """The values of a TOML file by dotted key.

    Raises:
        ConfigError: the file is missing or unreadable, or is not TOML (with the line).
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a TOML file (not UTF-8 text)") from None
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from None
    return {key: Given(value, str(path)) for key, value in _flatten(table)}


def read_overrides(pairs: Iterable[tuple[str, str]]) -> dict[str, Given]:
    """The values of `--key text` pairs by dotted key; the last of several for one key counts."""
    return {key: Given(text, f"--{key}", is_text=True) for key, text in pairs}


def merge(below: Mapping[str, Given], above: Mapping[str, Given]) -> dict[str, Given]:
    """Both mappings, `above` winning: also a section over its keys, and a key over its section."""

    def hidden(key: str) -> bool:
        return any(key.startswith(f"{a}.") or a.startswith(f"{key}.") for a in above)

    return {key: item for key, item in below.items() if not hidden(key)} | dict(above)


def apply(default: T, given: Mapping[str, Given]) -> T:
    """`default` (a tree of dataclasses) with the given values in the place of its own.

    Raises:
        ConfigError: an unknown key (names the nearest one), a wrong type, or a value that a
            dataclass refuses.
    """
    known = [row.key for row in describe(default)]
    values: dict[str, Given] = {}
    for key, item in given.items():
        if item.value == {} and any(k.startswith(f"{key}.") for k in known):
            continue  # the header of a section without keys
        if key not in known:
            raise ConfigError(f"{item.source}: {_unknown(key, item.value, known)}")
        values[key] = item
    return _apply(type(default), default, values, "")


def describe(config: Any, prefix: str = "") -> list[Row]:
    """One row a key of a tree of dataclasses, in the order of the fields."""
    return list(_rows(type(config), config, prefix))


def to_toml(config: Any) -> str:
    """A tree of dataclasses as TOML; `read_toml` and `apply` give an equal tree back."""
    sections: dict[str, list[str]] = {}
    _collect(config, "", sections)
    parts = [
        "\n".join([*([f"[{name}]"] if name else []), *lines]) for name, lines in sections.items()
    ]
    return "\n\n".join(parts) + "\n"


def _fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.init]


def _section(hint: Any) -> type | None:
    """The dataclass that a field holds, if it holds one (or None)."""
    kinds = _alternatives(hint)
    return next((k for k in kinds if isinstance(k, type) and dataclasses.is_dataclass(k)), None)


def _rows(cls: type, config: Any, prefix: str) -> Iterable[Row]:
    """The rows of a section; where it is unset (config is None), with the defaults of its class."""
    hints, docs = get_type_hints(cls), _attribute_docs(cls)
    for field in _fields(cls):
        key, hint = prefix + field.name, hints[field.name]
        value = getattr(config, field.name, field.default)
        doc = field.metadata.get("doc") or docs.get(field.name, "").removesuffix(".")
        section = _section(hint)
        if section is None:
            default = "" if value is dataclasses.MISSING else _format(value)
            yield Row(key, _expected(hint), default, doc)
            continue
        if type(None) in _alternatives(hint):
            yield Row(key, _expected(type(None)), _format(None) if value is None else "", doc)
        yield from _rows(section, value, f"{key}.")


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, object]]:
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _unknown(key: str, value: object, known: list[str]) -> str:
    sections = {k[: i + 1] for k in known for i, c in enumerate(k) if c == "."}
    if f"{key}." in sections:
        return f"{key} is a section, not a value: give its keys, such as {_first(known, key)}"

    def likeness(candidate: str) -> float:
        def ratio(a: str, b: str) -> float:
            return difflib.SequenceMatcher(None, a, b).ratio()

        return ratio(key, candidate) + ratio(key.rpartition(".")[2], candidate.rpartition(".")[2])

    if value == {}:
        names = sorted({s.partition(".")[0] for s in sections})
        nearest = difflib.get_close_matches(key, names, 1, 0.0)[0]
        return f"unknown section [{key}]; did you mean [{nearest}]?"
    return f"unknown key {key}; did you mean {max(known, key=likeness)}?"


def _first(known: list[str], section: str) -> str:
    return next(k for k in known if k.startswith(f"{section}."))


def _apply(cls: type, base: Any, given: Mapping[str, Given], prefix: str) -> Any:
    """`base`, or where it is None a new `cls`, with the given values of its section."""
    hints = get_type_hints(cls)
    changes: dict[str, Any] = {}
    for field in _fields(cls):
        key, value = prefix + field.name, getattr(base, field.name, None)
        section = _section(hints[field.name])
        if section is not None and any(k.startswith(f"{key}.") for k in given):
            changes[field.name] = _apply(section, value, given, f"{key}.")
        elif key in given:
            changes[field.name] = _read(key, given[key], hints[field.name])
        elif base is None and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_sources(given, prefix)}{prefix[:-1]} needs {key} too")
    try:
        return dataclasses.replace(base, **changes) if base is not None else cls(**changes)
    except ConfigError:
        raise
    except ValueError as error:
        message, name = str(error), prefix[:-1]
        where = message if name.rpartition(".")[2] in message else f"{name}: {message}"
        text = _sources(given, prefix, message) + where
        for key in given:
            text = text.replace(f"--{key}: {key}: ", f"--{key}: ")
        raise ConfigError(text) from None


def _sources(given: Mapping[str, Given], prefix: str, message: str = "") -> str:
    """Where the values that a dataclass refused were given: those its message names, or all."""
    of_section = {k: g.source for k, g in given.items() if k.startswith(prefix)}
    named = {s for k, s in of_section.items() if k in message or k[len(prefix) :] in message}
    sources = sorted(named or set(of_section.values()))
    return f"{', '.join(sources)}: " if sources else ""


def _read(key: str, item: Given, hint: Any) -> Any:
    value = _from_text(str(item.value), hint) if item.is_text else item.value
    try:
        return _coerce(value, hint)
    except TypeError:
        shown = json.dumps(value, default=str) if not item.is_text else repr(item.value)
        raise ConfigError(f"{item.source}: {key} must be {_expected(hint)}, got {shown}") from None


def _from_text(text: str, hint: Any) -> object:
    """Command-line text as the TOML value that a file would have; text where it is none."""
    kinds = _alternatives(hint)
    if any(kind is str or get_origin(kind) is Literal for kind in kinds):
        return text
    if any(get_origin(kind) is tuple for kind in kinds) and not text.startswith("["):
        if any(get_args(kind) == (str, ...) for kind in kinds):
            return [part.strip() for part in text.split(",")] if text else []
        bracketed = f"[{text}]"
    else:
        bracketed = text
    try:
        table = tomllib.loads(f"value = {bracketed}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if len(table) == 1 else text


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _coerce(value: object, hint: Any) -> Any:
    """`value` as the type `hint`; TypeError where it is something else."""
    kinds = _alternatives(hint)
    if len(kinds) > 1:
        if type(None) in kinds and value == _NONE:
            return None
        for kind in kinds:
            try:
                return _coerce(value, kind)
            except TypeError:
                continue
        raise TypeError
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
    elif get_origin(hint) is tuple:
        return _coerce_tuple(value, get_args(hint))
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint in (bool, str) and isinstance(value, hint):
        return value
    raise TypeError


def _coerce_tuple(value: object, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise TypeError
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_coerce(v, kinds[0]) for v in value)
    if len(value) != len(kinds):
        raise TypeError
    return tuple(_coerce(v, kind) for v, kind in zip(value, kinds, strict=True))


def _expected(hint: Any) -> str:
    kinds = _alternatives(hint)
    if len(kinds) > 1:
        return " or ".join(_expected(kind) for kind in kinds)
    if get_origin(hint) is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(hint))
    if get_origin(hint) is tuple:
        args = get_args(hint)
        if args[-1] is Ellipsis:
            return f"a list, each item {_expected(args[0])}"
        return f"[{', '.join(_expected(arg) for arg in args)}]"
    if dataclasses.is_dataclass(hint):
        return "a section"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return '"none"' if hint is type(None) else names[hint]


def _collect(config: Any, name: str, sections: dict[str, list[str]]) -> None:
    lines: list[str] = []
    nested: list[tuple[str, Any]] = []
    for field in _fields(type(config)):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            nested.append((f"{name}.{field.name}" if name else field.name, value))
        else:
            lines.append(f"{field.name} = {_format(value)}")
    if lines:
        sections[name] = lines
    for child, value in nested:
        _collect(value, child, sections)


def _format(value: object) -> str:
    if value is None:
        return f'"{_NONE}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON's escapes are TOML's too, but for DEL, which JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(_format(v) for v in value)}]"
    assert isinstance(value, (int, float)), value
    return repr(value)


def _attribute_docs(cls: type) -> dict[str, str]:
    """Docs from the `Attributes:` part of a docstring, for fields that have none of their own."""
    _, _, part = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    docs: dict[str, str] = {}
    names: list[str] = []
    for line in part.splitlines():
        entry = re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if entry:
            names = entry[1].split(", ")
            docs |= dict.fromkeys(names, entry[2].strip())
        elif line.strip():
            docs |= {name: f"{docs[name]} {line.strip()}" for name in names}
        else:
            break
    return docs
