"""Measured bandwidths kept in a file, and new ones held against them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..outputs import write_whole
from .measured import Line, Measured, key

_FORMAT = "counterflow bandwidth 1"


class BaselineError(ValueError):
    """A file that holds no baseline, or one of other machines."""


@dataclass(frozen=True)
class Baseline:
    """What is expected: as of `Measured`, with busbw in GB/s by `key`."""

    kind: str
    backend: str
    ranks_per_node: int
    num_nodes: int
    busbw: Mapping[str, float]

    @classmethod
    def of(cls, measured: Measured) -> Baseline:
        return cls(
            measured.kind,
            measured.backend,
            measured.ranks_per_node,
            measured.num_nodes,
            measured.typical(),
        )

    def require_fit(self, measured: Measured, source: str) -> None:
        """Raise unless `measured` can be held against this.

        A number of nodes may differ: then only what is measured among all of them is left out.

        Raises:
            BaselineError: other devices, another backend, or other numbers of ranks or bytes.
        """
        for what, mine, its in (
            ("devices", self.kind, measured.kind),
            ("backend", self.backend, measured.backend),
            ("ranks a node", self.ranks_per_node, measured.ranks_per_node),
        ):
            if mine != its:
                raise BaselineError(
                    f"the baseline {source} is of other {what} ({mine}) than these ({its}); "
                    "measure one here with counterflow doctor --bandwidth --save-baseline FILE"
                )
        wanted = {key(line) for line in measured.lines if line.where == "node"}
        if missing := sorted(wanted - self.busbw.keys()):
            raise BaselineError(
                f"the baseline {source} has other sizes: {missing[0]} is missing; measure it anew"
            )

    def expected(self, line: Line, num_nodes: int) -> float | None:
        """GB/s that a row should reach, None where the baseline does not say."""
        if line.where == "all" and num_nodes != self.num_nodes:
            return None
        return self.busbw.get(key(line))


def save_baseline(path: Path, measured: Measured) -> None:
    """Write what was measured as a baseline; the file appears whole or not at all."""
    value = {"format": _FORMAT, **asdict(Baseline.of(measured))}
    text = json.dumps(value, indent=1) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def load_baseline(path: Path) -> Baseline:
    """Read what `save_baseline` wrote.

    Raises:
        BaselineError: the file is missing, or holds something else.
    """
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BaselineError(f"the baseline {path}: {error.strerror}") from None
    except ValueError as error:
        raise BaselineError(f"the baseline {path} is no JSON: {error}") from None
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise BaselineError(
            f"{path} is no baseline; counterflow doctor --bandwidth --save-baseline writes one"
        )
    try:
        return Baseline(
            kind=str(value["kind"]),
            backend=str(value["backend"]),
            ranks_per_node=int(value["ranks_per_node"]),
            num_nodes=int(value["num_nodes"]),
            busbw={str(name): float(speed) for name, speed in value["busbw"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BaselineError(f"the baseline {path} is damaged: {error!r}") from None
