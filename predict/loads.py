"""Tokens that each expert got, as a run measured them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_RUN_FILE = "load.json"


@dataclass(frozen=True, eq=False)
class Loads:
    """Measured loads.

    Attributes:
        counts: [steps, layers, experts], of the layers that have experts, in the model's order,
            those of multi-token prediction last. Of a run that only has sums over its steps, steps
            is 1.
        source: where from.

    Raises:
        ValueError: another shape, a negative or infinite count, or a layer that has no tokens.
    """

    counts: Floats
    source: str

    def __post_init__(self) -> None:
        try:
            counts = np.array(self.counts, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{self.source}: loads are numbers, as many for each layer") from None
        if counts.ndim == 2:
            counts = counts[None]
        if counts.ndim != 3 or not counts.size:
            raise ValueError(
                f"{self.source}: loads are [layers, experts] or [steps, layers, experts], got "
                f"{list(counts.shape)}"
            )
        if not np.isfinite(counts).all() or counts.min() < 0:
            raise ValueError(f"{self.source}: each load is a number of tokens from 0 up")
        empty = np.argwhere(counts.sum(axis=2) == 0)
        if len(empty):
            step, layer = (int(place) for place in empty[0])
            raise ValueError(
                f"{self.source}: layer {layer} of step {step} has no tokens; leave that step out"
            )
        counts.setflags(write=False)
        object.__setattr__(self, "counts", counts)

    @property
    def num_layers(self) -> int:
        """Layers that have experts."""
        return self.counts.shape[1]

    @property
    def num_experts(self) -> int:
        """Routed experts of each layer."""
        return self.counts.shape[2]

    @cached_property
    def shares(self) -> Floats:
        """[steps, layers, experts], the counts relative to the mean of their layer."""
        return self.counts / self.counts.mean(axis=2, keepdims=True)

    @property
    def max_vio(self) -> float:
        """Of the busiest expert its load over the mean, less 1; the mean over steps and layers."""
        return float(self.shares.max(axis=2).mean() - 1)

    @classmethod
    def read(cls, path: str | Path) -> Loads:
        """Loads from a file.

        Args:
            path: the folder of a run, its load.json, or a .json or .npy file that holds an array of
                the shape of `counts`, that of the steps left out where there is one.

        Raises:
            ValueError: there is no such file, or it holds something else.
        """
        path = Path(path)
        if path.is_dir():
            path = path / _RUN_FILE
        try:
            if path.suffix == ".npy":
                return cls(np.load(path, allow_pickle=False), str(path))
            held: Any = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"{path}: {error.strerror}; loads are in {_RUN_FILE} in the folder of a run, or in "
                "a .json or .npy file of counts"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path} holds no loads: {error}") from None
        return cls(_array(held, path), str(path))


def _array(held: Any, path: Path) -> Any:
    """The counts of what a JSON file holds: a run's, by number of the layer, or an array."""
    if not isinstance(held, dict):
        return held
    layers: Any = cast("dict[str, Any]", held).get("layers")
    if not isinstance(layers, dict) or not layers:
        raise ValueError(
            f'{path} has no loads of any layer; a run writes {{"layers": {{"3": [tokens of each '
            "expert]}}"
        )
    by_layer = cast("dict[str, Any]", layers)
    strange = [name for name in by_layer if not name.isdigit()]
    if strange:
        raise ValueError(f"{path}: layer {strange[0]!r} is no number")
    return [by_layer[name] for name in sorted(by_layer, key=int)]
