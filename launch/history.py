"""What a run has behind it: how far it is, and what its result and report are made of."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .engine import StepResult
from .plain import finite

# What a result says of the end of training is a mean over this many steps.
LAST = 10


def _no_results() -> deque[StepResult]:
    return deque(maxlen=LAST)


@dataclass
class History:
    """The same on every rank, but for `seconds`; saved with a run, so that it goes on alike.

    Attributes:
        step: last one that ended; the first is 1.
        seconds: in training steps; evaluation and saving are not counted.
        tokens: trained on, of all ranks.
        recent: results of the last steps.
        validation_loss: of the last evaluation, nats per token; NaN before the first.
        ema_validation_loss: of the averaged parameters, where it was measured.
        resumed: steps after which the run went on from a checkpoint.
    """

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    recent: deque[StepResult] = field(default_factory=_no_results)
    validation_loss: float = math.nan
    ema_validation_loss: float | None = None
    resumed: list[int] = field(default_factory=list[int])

    def add(self, result: StepResult, *, seconds: float, tokens: int) -> None:
        """A step has ended."""
        self.step += 1
        self.seconds += seconds
        self.tokens += tokens
        self.recent.append(result)

    @property
    def train_loss(self) -> float | None:
        """Mean of the last steps' main loss, nats per token; of those that led to an update.

        None where none of them did.
        """
        losses = [result.losses["main"] for result in self.recent if result.updated]
        return float(np.mean(losses)) if losses else None

    def averaged(self, key: str) -> dict[str, float]:
        """The averaged parameters' loss under `key`; nothing where it was not measured."""
        return {} if self.ema_validation_loss is None else {key: self.ema_validation_loss}

    def loads(self) -> dict[str, list[int]]:
        """Tokens that each routed expert got in the last steps, by number of the layer."""
        sums: dict[str, NDArray[np.int64]] = {}
        for result in self.recent:
            for name, load in result.loads.items():
                layer = name.split(".")[2]
                sums[layer] = sums.get(layer, np.zeros(len(load), np.int64)) + np.array(load)
        return {layer: load.tolist() for layer, load in sums.items()}

    def state(self) -> dict[str, Any]:
        """As plain JSON: numbers that are not finite are None."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "recent": [asdict(result) for result in self.recent],
            "validation_loss": self.validation_loss,
            "ema_validation_loss": self.ema_validation_loss,
            "resumed": list(self.resumed),
        }
        return finite(state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what `state` told; its infinite losses are NaN."""
        self.step, self.seconds, self.tokens = state["step"], state["seconds"], state["tokens"]
        self.recent.clear()
        self.recent.extend(_result(told) for told in state["recent"])
        self.validation_loss = _number(state["validation_loss"])
        self.ema_validation_loss = state["ema_validation_loss"]
        self.resumed = list(state["resumed"])


def _result(told: Mapping[str, Any]) -> StepResult:
    losses = {name: _number(loss) for name, loss in told["losses"].items()}
    return StepResult(**{**told, "losses": losses, "grad_norm": _number(told["grad_norm"])})


def _number(value: float | None) -> float:
    return math.nan if value is None else value
