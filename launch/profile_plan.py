"""A plan beside the run of it: the whole step and the memory, as the run's folder tells them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from .profile_folders import FOLDER

if TYPE_CHECKING:
    from ..comm.profile.comparison import Comparison
    from ..comm.profile.simulated import Planned

_METRICS = "metrics.jsonl"
_GIB = 2**30
_MS = 1e3  # in a second
_NS = 1e6  # in a millisecond
# Steps in which a run gets going: kernels are built, memory is taken.
_FIRST = 2


class Ran(NamedTuple):
    """What a run's metrics say.

    Attributes:
        folder: of the run.
        step_ms: median of its steps, but for the first ones where there are more.
        steps: of which that is.
        memory_bytes: the most that any rank held, before the first recorded step where a step came
            before it; None where it is not told.
        recorder_counts: whether `memory_bytes` may have the profiler's own memory in it.
    """

    folder: Path
    step_ms: float
    steps: int
    memory_bytes: float | None
    recorder_counts: bool = False


class Compared(NamedTuple):
    """One number of a plan beside the run's.

    Attributes:
        name: of it.
        unit: "ms" or "GiB".
        predicted, measured: in that unit.
    """

    name: str
    unit: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float | None:
        """Measured to predicted; None where nothing was predicted."""
        return self.measured / self.predicted if self.predicted else None


@dataclass(frozen=True)
class PlanCheck:
    """A plan's numbers beside a run's.

    Attributes:
        numbers: what both have.
        missing: what could not be compared, and why, in sentences.
    """

    numbers: tuple[Compared, ...]
    missing: tuple[str, ...]


def check_plan(
    planned: Planned, comparison: Comparison, traces: Iterable[Path], world_size: int | None
) -> PlanCheck:
    """Lay a plan's step and memory beside those of the run that its traces lie in.

    Args:
        planned: what the plan said.
        comparison: of the traces with the plan's simulation.
        traces: as the command line names them.
        world_size: of the run, by its traces; None: they do not tell.

    Raises:
        ValueError: the run's metrics cannot be read.
    """
    numbers: list[Compared] = []
    missing: list[str] = []
    if world_size is not None and world_size != planned.world_size:
        missing.append(
            f"{planned.world_size} ranks were planned and the run had {world_size}, so that "
            "reductions and memory differ"
        )
    longest = comparison.longest if comparison.actions else None
    row = None
    if longest is not None:
        row = Compared("rows of actions", "ms", longest.simulated / _NS, longest.measured / _NS)
        numbers.append(row)
    ran = find_run(traces)
    if ran is None:
        missing.append(
            "the whole step and the memory are compared where a run's folder is named, runs/NAME"
        )
        return PlanCheck(tuple(numbers), tuple(missing))
    if row is not None:
        rest = (planned.step_ms - row.predicted, ran.step_ms - row.measured)
        numbers.append(Compared("the rest: reductions, optimizer", "ms", *rest))
    numbers.append(Compared("step", "ms", planned.step_ms, ran.step_ms))
    if ran.memory_bytes is not None:
        held = max(planned.memory_bytes)
        numbers.append(Compared("fullest rank", "GiB", held / _GIB, ran.memory_bytes / _GIB))
        if ran.recorder_counts:
            missing.append(
                "the fullest rank's memory has the profiler's own in it: no step ran before the "
                "recorded ones; record later ones, such as --profile 5"
            )
    else:
        missing.append(f"{ran.folder / _METRICS} does not tell the memory of all ranks")
    return PlanCheck(tuple(numbers), tuple(missing))


def find_run(traces: Iterable[Path]) -> Ran | None:
    """What the run says in whose folder the first trace lies; None if that is no run's folder.

    Raises:
        ValueError: a line of its metrics is no JSON object.
    """
    first = next(iter(traces)).resolve()
    folder = next((at for at in (first, *first.parents) if (at / _METRICS).is_file()), None)
    if folder is None:
        return None
    lines = [line for line in _lines(folder / _METRICS) if line.get("kind") == "train"]
    times = _numbers(lines, "seconds")
    if not times:
        return None
    later = times[_FIRST:] or times
    # What the metrics tell are peaks since the run began: from the first recorded step on, with
    # what the profiler keeps.
    first = _first_recorded(folder)
    before = [line for line in lines if first is None or _is_before(line, first)]
    held = _held(before) or _held(lines)
    return Ran(
        folder,
        median(later) * _MS,
        len(later),
        max(held) * _GIB if held else None,
        recorder_counts=bool(held) and not _held(before),
    )


def _held(lines: list[dict[str, object]]) -> list[float]:
    """Peaks of memory, GiB."""
    return _numbers(lines, "memory_gib_max") or _numbers(lines, "memory_gib")


def _is_before(line: dict[str, object], first: int) -> bool:
    step = line.get("step")
    return isinstance(step, int) and step < first


def _first_recorded(folder: Path) -> int | None:
    """The first step that a run recorded, by the names of its traces' folders."""
    names = (each.name for each in (folder / FOLDER).glob("step*"))
    steps = [int(found[1]) for name in names if (found := re.match(r"steps?(\d+)", name))]
    return min(steps, default=None)


def _numbers(lines: Iterable[dict[str, object]], key: str) -> list[float]:
    """What stands under a key, where that is a number."""
    found = (line.get(key) for line in lines)
    return [float(value) for value in found if isinstance(value, int | float)]


def _lines(path: Path) -> Iterator[dict[str, object]]:
    """Its lines."""
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: is no JSON: {error.msg}") from None
        if not isinstance(line, dict):
            raise ValueError(f"{path}, line {number}: is no JSON object")
        yield line
