"""What a training run left in its folder, read into plain values for the report.

The files: `metrics.jsonl` (one object a line, of kind "train", "validation", or of what was out of
the ordinary, such as "resume" and "skip"), `result.json`, `timeline.json` (one step as measured)
and `load.json` (tokens of each expert, by layer). Each may be missing: a run that was ended early
has a report too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..parallel.schedule import Pair, Step, parse_step
from ..parallel.schedule.text_form import from_text
from ..parallel.simulate import simulate
from ..parallel.simulate.measured import measured_costs

# Every run has one of these, however early it ended.
_OF_A_RUN = ("config.toml", "metrics.jsonl", "result.json")
KINDS = ("F", "B", "I", "W", "pair")


class Bar(NamedTuple):
    """One step of one rank. `waited_ms` of its time passed waiting for messages."""

    step: Step
    start_ms: float
    end_ms: float
    waited_ms: float = 0.0

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return "pair" if isinstance(self.step, Pair) else self.step.op.value

    @property
    def busy_ms(self) -> float:
        return max(0.0, self.end_ms - self.start_ms - self.waited_ms)


Bars = tuple[tuple[Bar, ...], ...]


@dataclass(frozen=True)
class Timeline:
    """One training step, measured and planned, a row of bars a pipeline rank.

    Attributes:
        name: of the schedule.
        measured: as it ran.
        planned: as the simulation runs the same schedule, where each step costs the median of what
            its kind was measured to cost on its stage and transfers cost nothing; or None.
        why_no_plan: why it is None, or "".
    """

    name: str
    measured: Bars
    planned: Bars | None
    why_no_plan: str

    def durations_ms(self, kind: str) -> list[float]:
        """Measured times of the steps of one kind, without their waits."""
        return [bar.busy_ms for row in self.measured for bar in row if bar.kind == kind]


@dataclass(frozen=True)
class Load:
    """Tokens that each expert of one layer got.

    Attributes:
        layer: its name, such as "3".
        tokens: by expert.
    """

    layer: str
    tokens: tuple[float, ...]

    @property
    def relative(self) -> tuple[float, ...]:
        """Load over the mean load: 1 is balanced. NaN where nothing was routed."""
        mean = sum(self.tokens) / len(self.tokens)
        return tuple(n / mean if mean else math.nan for n in self.tokens)

    @property
    def max_vio(self) -> float:
        """(highest load - mean) / mean, arXiv 2408.15664, section 4.1."""
        return max(self.relative) - 1


@dataclass(frozen=True)
class RunData:
    """Everything that the report shows.

    Attributes:
        name: the folder's.
        result: result.json.
        train, validation: the metrics of each kind, in the order of the file.
        timeline: one step, or None.
        loads: by layer.
        events: the metrics of other kinds, which say in `text` what happened.
    """

    name: str
    result: dict[str, Any]
    train: tuple[dict[str, Any], ...]
    validation: tuple[dict[str, Any], ...]
    timeline: Timeline | None
    loads: tuple[Load, ...]
    events: tuple[dict[str, Any], ...] = ()

    @property
    def unigram_entropy(self) -> float | None:
        """Nats per token, or None."""
        return number(self.result.get("unigram_entropy"))

    @property
    def fp8(self) -> dict[str, Any]:
        """What ran in FP8, as result.json has it; empty for a run that does not tell."""
        found = self.result.get("fp8")
        return found if isinstance(found, dict) else {}


def read_run(folder: Path) -> RunData:
    """Read a run's folder.

    Raises:
        ValueError: there is no such folder of a run, or a file in it is not what it should be.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not the folder of a run; runs are kept in runs/NAME")
    if not any((folder / name).exists() for name in _OF_A_RUN):
        raise ValueError(
            f"{folder} is not the folder of a run: it has none of {', '.join(_OF_A_RUN)}; runs are "
            "kept in runs/NAME"
        )
    result = _read_object(folder / "result.json") or {}
    timeline = _read_object(folder / "timeline.json")
    load = _read_object(folder / "load.json")
    metrics = _read_metrics(folder / "metrics.jsonl")
    try:
        return RunData(
            folder.resolve().name,
            result,
            tuple(line for line in metrics if line.get("kind") == "train"),
            tuple(line for line in metrics if line.get("kind") == "validation"),
            None if timeline is None else read_timeline(timeline),
            () if load is None else read_loads(load),
            tuple(line for line in metrics if line.get("kind") not in ("train", "validation")),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{folder}: timeline.json or load.json is not in the form that training writes "
            f"({type(error).__name__}: {error}); delete it, or train again"
        ) from error


def number(value: object) -> float | None:
    """`value` as a float, or None where it is no number (a NaN is one)."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def series(lines: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the lines that have a number under `key`."""
    points = [(number(line.get("step")), number(line.get(key))) for line in lines]
    kept = [(step, value) for step, value in points if step is not None and value is not None]
    return [step for step, _ in kept], [value for _, value in kept]


def makespan_ms(bars: Bars) -> float:
    """From the first start to the last end."""
    all_bars = [bar for row in bars for bar in row]
    return max(bar.end_ms for bar in all_bars) - min(bar.start_ms for bar in all_bars)


def idle_share(bars: Bars) -> float:
    """Share of the ranks' time in which they neither compute nor communicate in a step."""
    busy = sum(bar.busy_ms for row in bars for bar in row)
    return max(0.0, 1 - busy / (len(bars) * makespan_ms(bars)))  # 0, not -1e-16


def read_timeline(data: dict[str, Any]) -> Timeline | None:
    """The timeline in `timeline.json`, with its plan. None where no step was measured."""
    measured = tuple(
        tuple(
            Bar(
                parse_step(bar["action"]),
                float(bar["start_ms"]),
                float(bar["end_ms"]),
                float(bar.get("waited_ms", 0.0)),
            )
            for bar in row
        )
        for row in data["ranks"]
    )
    if not any(measured) or makespan_ms(measured) <= 0:
        return None
    name = "a schedule that cannot be read"
    try:
        schedule = from_text(data["schedule"], "timeline.json")
        name = schedule.name
        busy = ((bar.step, bar.busy_ms) for row in measured for bar in row)
        spans = simulate(schedule, measured_costs(schedule, busy)).spans
    except ValueError as error:
        return Timeline(name, measured, None, str(error).split("\n")[0])
    planned = tuple(tuple(Bar(s.step, s.start, s.end) for s in row) for row in spans)
    return Timeline(name, measured, planned, "")


def read_loads(data: dict[str, Any]) -> tuple[Load, ...]:
    """The layers in `load.json`, in the order of their numbers."""
    layers = sorted(
        data["layers"].items(), key=lambda item: (not item[0].isdigit(), len(item[0]), item[0])
    )
    return tuple(Load(name, tuple(float(n) for n in tokens)) for name, tokens in layers if tokens)


def _read_object(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(data).__name__}")
    return data


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    found: list[dict[str, Any]] = []
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except ValueError as error:
            if index == len(lines) - 1:
                continue  # a run that was killed leaves half a line behind
            raise ValueError(f"{path}, line {index + 1} is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{path}, line {index + 1} is not a JSON object")
        found.append(data)
    return found
