"""What `counterflow simulate --json` wrote, as far as a measured run is laid beside it.

Knows the JSON and nothing of the simulator, so that a trace can be compared where only the file is.
What `counterflow plan --json` wrote holds such an object, and says more of the whole step.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn, cast

COMPUTE = "compute"
COMMUNICATION = "communication"

_LANES = (COMPUTE, COMMUNICATION)
_NS = {"s": 1e9, "ms": 1e6, "us": 1e3, "µs": 1e3, "ns": 1.0}
_ACTION = re.compile(r"(\d+)([FBIW])\d+")
_PAIR = re.compile(r"\((\d+)F\d+;(\d+)B\d+\)")
_REMEDY = "write one with `counterflow simulate ... --json > simulated.json`"


class SimulatedPhase(NamedTuple):
    """One phase of one layer; times from the start of the training step, in the file's unit.

    Attributes:
        name: such as "dispatch(F)".
        layer: the layer of the action that it is of, from 0 in the order of that direction's data.
        lane: COMPUTE or COMMUNICATION.
        start, end: in the unit of the file.
    """

    name: str
    layer: int
    lane: str
    start: float
    end: float


class SimulatedAction(NamedTuple):
    """One step of a rank's row, in the file's unit of time; `phases` is empty without any."""

    name: str
    start: float
    end: float
    phases: tuple[SimulatedPhase, ...] = ()

    @property
    def is_pair(self) -> bool:
        """Whether it is a forward and a backward that overlap."""
        return _PAIR.fullmatch(self.name) is not None

    @property
    def num_layers(self) -> int:
        """Layers that its phases pass, of the longer of a pair's two chunks; 0 without phases."""
        return 1 + max((phase.layer for phase in self.phases), default=-1)


class Planned(NamedTuple):
    """What a plan says beyond its simulation.

    Attributes:
        step_ms: the whole step, with what varies from rank to rank.
        memory_bytes: per pipeline rank, at most.
        world_size: ranks of the run.
    """

    step_ms: float
    memory_bytes: tuple[float, ...]
    world_size: int


@dataclass(frozen=True)
class Simulated:
    """A simulated training step.

    Attributes:
        source: the file.
        schedule: its name.
        unit: of the times, as the file says.
        makespan: of the whole step, in that unit.
        rows: per pipeline rank its actions, in order.
        planned: what the plan says that the simulation is part of; None: it is by itself.
    """

    source: str
    schedule: str
    unit: str
    makespan: float
    rows: tuple[tuple[SimulatedAction, ...], ...]
    planned: Planned | None = None

    @property
    def num_ranks(self) -> int:
        """Ranks of the pipeline."""
        return len(self.rows)

    @property
    def has_phases(self) -> bool:
        """Whether it says of which phases the actions consist."""
        return any(action.phases for row in self.rows for action in row)

    @property
    def ns_per_unit(self) -> float | None:
        """One unit of the times; None if the unit is none of time."""
        return _NS.get(self.unit)

    def pipeline_rank(self, rank: int, world_size: int) -> int:
        """Which of the simulated ranks a rank of the run is.

        Global ranks count the data-parallel ranks of pipeline rank 0 first, as `parallel.mesh` has
        it.

        Raises:
            ValueError: the run's ranks are no multiple of the simulated ones.
        """
        copies, rest = divmod(world_size, self.num_ranks)
        if rest or not copies:
            raise ValueError(
                f"{self.source}: {self.num_ranks} pipeline ranks were simulated, and the run had "
                f"{world_size} ranks, which is no multiple of that; simulate the schedule that ran"
            )
        return rank // copies


def kind_of(name: str) -> tuple[str, str] | None:
    """Kind ("F", "B", "I", "W", "pair") and stage of an action by its text; None if it is none.

    The stage is text: of a pair the forward's and the backward's, "0;7".
    """
    action = _ACTION.fullmatch(name)
    if action is not None:
        return action[2], action[1]
    pair = _PAIR.fullmatch(name)
    return None if pair is None else ("pair", f"{pair[1]};{pair[2]}")


def read_simulated(path: str | Path) -> Simulated:
    """Read a file that `counterflow simulate --json` wrote, or `counterflow plan --json`.

    Raises:
        ValueError: it cannot be read, is no JSON or not of that command, or lacks the steps; the
            message says which file, what is wrong and what to do.
    """
    reader = _Reader(str(path))
    top = reader.load(Path(path))
    if "traceEvents" in top:
        reader.fail("is a trace and no simulation")
    plan = top if "simulation" in top else None
    if plan is not None:
        top = reader.object("simulation", plan["simulation"])
    for key in ("schedule", "ranks", "makespan"):
        if key not in top:
            reader.fail(f"has no {key!r}, so that command did not write it")
    if "steps" not in top:
        reader.fail("has no 'steps': it is from an older version or another command")
    steps = reader.items("steps", top["steps"])
    if not steps or len(steps) != top["ranks"]:
        reader.fail(f"'steps' has {len(steps)} rows, but 'ranks' is {top['ranks']!r}")
    # A file of a version before phases were written has none.
    phases = reader.items("phases", top.get("phases", [list[object]()] * len(steps)))
    if len(phases) != len(steps):
        reader.fail(f"'phases' has {len(phases)} rows and 'steps' {len(steps)}")
    rows = tuple(
        reader.row(rank, reader.items(f"steps[{rank}]", row), reader.items(f"phases[{rank}]", of))
        for rank, (row, of) in enumerate(zip(steps, phases, strict=True))
    )
    if not any(rows):
        reader.fail("'steps' holds no action")
    unit = top.get("unit", "")
    makespan = reader.number("makespan", top["makespan"])
    if makespan <= 0:
        reader.fail("'makespan' is not above 0")
    planned = None if plan is None else reader.planned(plan, len(rows))
    return Simulated(str(path), str(top["schedule"]), str(unit), makespan, rows, planned)


class _Reader:
    """Takes the JSON apart, and says in which file something is wrong."""

    def __init__(self, source: str) -> None:
        self.source = source

    def fail(self, what: str) -> NoReturn:
        raise ValueError(f"{self.source}: {what}; {_REMEDY}")

    def load(self, path: Path) -> dict[str, object]:
        try:
            top: object = json.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            self.fail("no such file")
        except OSError as error:
            self.fail(f"cannot be read: {error.strerror}")
        except UnicodeDecodeError:
            self.fail("is no text")
        except json.JSONDecodeError as error:
            self.fail(f"is no JSON: {error.msg} (line {error.lineno}, column {error.colno})")
        except RecursionError:
            self.fail("is nested too deeply for a simulation")
        if not isinstance(top, dict):
            self.fail("is no JSON object")
        return cast("dict[str, object]", top)

    def planned(self, plan: dict[str, object], num_ranks: int) -> Planned:
        for key in ("step_ms", "memory", "world_size"):
            if key not in plan:
                self.fail(
                    f"has a 'simulation' but no {key!r}, so `counterflow plan` did not write it"
                )
        held: list[float] = []
        for rank, value in enumerate(self.items("memory", plan["memory"])):
            where = f"memory[{rank}]"
            held.append(self.number(where, self.object(where, value).get("total_bytes")))
        if len(held) != num_ranks:
            self.fail(f"'memory' has {len(held)} entries, but {num_ranks} ranks were simulated")
        step, world_size = (self.number(key, plan[key]) for key in ("step_ms", "world_size"))
        return Planned(step, tuple(held), int(world_size))

    def object(self, where: str, value: object) -> dict[str, object]:
        if not isinstance(value, dict):
            self.fail(f"{where!r} is no JSON object")
        return cast("dict[str, object]", value)

    def items(self, where: str, value: object) -> list[object]:
        if not isinstance(value, list):
            self.fail(f"{where!r} is no list")
        return cast("list[object]", value)

    def number(self, where: str, value: object) -> float:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            self.fail(f"{where!r} holds {value!r} where a time belongs")
        return float(value)

    def times(self, where: str, start: object, end: object) -> tuple[float, float]:
        found = self.number(where, start), self.number(where, end)
        if found[1] < found[0]:
            self.fail(f"{where!r} ends before it starts")
        return found

    def row(
        self, rank: int, steps: list[object], phases: list[object]
    ) -> tuple[SimulatedAction, ...]:
        if phases and len(phases) != len(steps):
            self.fail(f"'phases[{rank}]' has {len(phases)} entries, but {len(steps)} steps")
        actions: list[SimulatedAction] = []
        for number, step in enumerate(steps):
            where = f"steps[{rank}][{number}]"
            match self.items(where, step):
                case [str(name), start, end] if kind_of(name) is not None:
                    parts = self.items(f"phases[{rank}]", phases[number]) if phases else []
                    actions.append(
                        SimulatedAction(
                            name,
                            *self.times(where, start, end),
                            tuple(self.phase(f"phases[{rank}][{number}]", part) for part in parts),
                        )
                    )
                case _:
                    self.fail(f"{where!r} is not [action, start, end]")
        return tuple(actions)

    def phase(self, where: str, value: object) -> SimulatedPhase:
        match self.items(where, value):
            case [str(name), int(layer), str(lane), start, end] if lane in _LANES:
                pass
            case _:
                self.fail(f"{where!r} holds what is not [phase, layer, lane, start, end]")
        return SimulatedPhase(name, layer, lane, *self.times(where, start, end))
