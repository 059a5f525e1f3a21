"""When each step of a schedule ran, measured on the host's clock (CPU) or with events (CUDA)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from .schedule import Step


@dataclass(frozen=True)
class Span:
    """One step of the schedule on one rank, in ms since the run of the schedule began there.

    `waited_ms` is the part of `start_ms .. end_ms` spent waiting for messages.
    """

    step: Step
    start_ms: float
    end_ms: float
    waited_ms: float


@dataclass
class _Marks:
    step: Step
    start: Any
    waits: list[tuple[Any, Any]] = field(default_factory=list)
    end: Any = None


class Stopwatch:
    """Takes marks as the schedule runs; costs no synchronisation until `spans` is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._origin = self._mark()
        self._steps: list[_Marks] = []
        self._wait_began: Any = None

    def begin_step(self, step: Step) -> None:
        self._steps.append(_Marks(step, self._mark()))

    def begin_wait(self) -> None:
        self._wait_began = self._mark()

    def end_wait(self) -> None:
        self._steps[-1].waits.append((self._wait_began, self._mark()))

    def end_step(self) -> None:
        self._steps[-1].end = self._mark()

    def spans(self) -> list[Span]:
        """Every completed step, in order. Waits for the GPU where there is one."""
        if self._cuda:
            torch.cuda.synchronize()
        return [
            Span(
                marks.step,
                self._between(self._origin, marks.start),
                self._between(self._origin, marks.end),
                sum(self._between(a, b) for a, b in marks.waits),
            )
            for marks in self._steps
            if marks.end is not None
        ]

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) if self._cuda else (b - a) * 1e3
