"""What ran on a rank, with its phase, for the timeline of the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from .by_collective import with_collectives
from .classify import RULES, Rule, classify_all
from .infer import phases_of
from .kernel_table import COMMUNICATION, COPY, WAIT
from .phases import PHASE_PATTERN, Phases
from .pieces import pieces_of
from .report import Report
from .trace import Trace
from .window import activities_within

Label: TypeAlias = tuple[str, int | None]  # phase, "" for none, and layer


class Ran(NamedTuple):
    """Something that ran: an activity on a GPU, a piece of a thread's time in a CPU run.

    Attributes:
        start, end: ns, on the trace's clock.
        group: "compute", "communication", "copy" or "unknown".
        label: its phase and layer.
        name: of the kernel; of a piece, what it does.
        role, library: as of `Kernels`.
        blocks: of its grid; None if not told.
        lane: stream or thread.
    """

    start: int
    end: int
    group: str
    label: Label
    name: str
    role: str = ""
    library: str = ""
    blocks: int | None = None
    lane: str = ""


def ran_on(
    trace: Trace,
    report: Report,
    rules: Sequence[Rule] = RULES,
    phase_pattern: str = PHASE_PATTERN,
) -> Iterator[Ran]:
    """What ran within the report's window, as the report took it.

    Args:
        trace: of one rank.
        report: `analyse` of it.
        rules, phase_pattern: that the report was made with.
    """
    classes = classify_all((activity.name for activity in trace.activities), rules)
    phases = with_collectives(trace, classes, phases_of(trace, classes, phase_pattern))
    activities, runs = activities_within(trace.activities, phases.of, report.window)
    if not trace.on_gpu:
        # Operators nest, so that their own times would count twice: pieces do not.
        for piece in pieces_of(trace, activities, runs, classes, phases, report.window):
            name = _DOES.get(piece.group, "computes") if not piece.waits else "waits for others"
            role = WAIT if piece.waits else ""
            label = _label(phases, piece.run)
            yield Ran(piece.start, piece.end, piece.group, label, name, role, lane=piece.lane)
        return
    kernels = {kernel.name: kernel for kernel in report.kernels}
    for activity, run in zip(activities, runs, strict=True):
        known, grid = kernels[activity.name], activity.grid
        yield Ran(
            activity.start,
            activity.end,
            known.group,
            _label(phases, run),
            activity.name,
            known.role,
            known.library,
            grid and grid[0] * grid[1] * grid[2],
            activity.lane,
        )


_DOES = {COMMUNICATION: "communicates", COPY: "copies"}


def _label(phases: Phases, run: int) -> Label:
    return (phases.runs[run].name, phases.runs[run].layer) if run >= 0 else ("", None)
