"""The flags of `counterflow launch`: those of a dataclass, and the training's arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ..settings import ConfigError, Given, apply, describe, merge, read_toml

C = TypeVar("C")

SEPARATOR = "--"


@dataclass(frozen=True)
class Request(Generic[C]):
    """A command line, understood.

    Attributes:
        config: what the flags and a --config file say.
        switches: flags without a value that were given, such as "dry_run".
        train: the arguments after `-- train`.
    """

    config: C
    switches: frozenset[str]
    train: tuple[str, ...]


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether help is asked for, of this command and not of `train`."""
    own = arguments[: arguments.index(SEPARATOR)] if SEPARATOR in arguments else arguments
    return bool({"-h", "--help"} & set(own))


def parse(
    arguments: Sequence[str], default: Any, switches: Mapping[str, str], usage: str
) -> Request[Any]:
    """What a command line says.

    Args:
        arguments: flags of the dataclass, then `-- train ...`.
        default: an instance of the dataclass; its class is called with no arguments given if it
            cannot be made without any.
        switches: further flags that take no value, with what they do.
        usage: the line that an error shows.

    Raises:
        ConfigError: a flag or value that cannot be used.
    """
    if SEPARATOR not in arguments:
        raise ConfigError(f"what is to be started is missing: end with `-- train ...` ({usage})")
    at = list(arguments).index(SEPARATOR)
    own, train = list(arguments[:at]), list(arguments[at + 1 :])
    if train[:1] != ["train"]:
        got = f"`{train[0]}`" if train else "nothing"
        raise ConfigError(f"after `--` comes the command to start, `train ...`; got {got}")
    given, told, file = _read(own, default, switches, usage)
    below = read_toml(file) if file else {}
    return Request(apply(default, merge(below, given)), told, tuple(train[1:]))


def flags(default: Any, switches: Mapping[str, str]) -> list[str]:
    """Lines of help: each flag with its default and what it does."""
    lines: list[str] = []
    for row in describe(default):
        lines += [f"  {_flag(row.key)} = {row.default}", f"      {row.doc}"]
        if row.type.startswith("a list"):
            lines[-1] += "; may be given several times"
    lines += ["  --config FILE.toml", "      file with any of these as keys, such as nodes = 16"]
    for name, doc in switches.items():
        lines += [f"  {_flag(name)}", f"      {doc}"]
    return lines


def _read(
    arguments: list[str], default: Any, switches: Mapping[str, str], usage: str
) -> tuple[dict[str, Given], frozenset[str], str]:
    """Values by key, switches told, and the --config file."""
    given: dict[str, Given] = {}
    told: set[str] = set()
    file = ""
    lists = {row.key for row in describe(default) if row.type.startswith("a list")}
    booleans = {row.key for row in describe(default) if row.default in ("true", "false")}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise ConfigError(f"unknown argument {argument!r} before `--` ({usage})")
        flag, equals, text = argument.partition("=")
        name = flag[2:].replace("-", "_")
        if not equals and name in switches:
            told.add(name)
            continue
        if not equals and name in booleans:
            given[name] = Given(True, flag)
            continue
        if not equals:
            value = next(rest, None)
            # `--sbatch "--comment=x"` has a value that begins with dashes too.
            if value is None or (value.startswith("--") and name != "sbatch"):
                raise ConfigError(f"{flag} needs a value: {flag} VALUE")
            text = value
        if name == "config":
            file = text
        elif name in lists:
            before = given[name].value if name in given else []
            assert isinstance(before, list)
            given[name] = Given([*before, text], flag)
        else:
            given[name] = Given(text, flag, is_text=True)
    return given, frozenset(told), file


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"
