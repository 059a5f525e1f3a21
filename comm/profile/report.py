"""What is found in the trace of one rank. Times are whole nanoseconds.

Six numbers describe a window: the time is cut in what computes, what communicates, both, neither.

    span = compute + exposed + copies alone + idle          overlapped + exposed = communication

Each is the length of a union of intervals, so that what runs side by side counts once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .trace import Interval


class Totals(NamedTuple):
    """Lengths of unions of intervals within a window, ns.

    Attributes:
        span: the window's length.
        compute: something computes.
        comm: something communicates, waiting included.
        overlapped: both at once.
        exposed: communication without computation.
        idle: neither, nor a copy.
        copy: a copy or fill within the device or to the host runs, whatever else does.
        waiting: of `comm`, where only what waits runs: notifications and barriers.
    """

    span: int
    compute: int
    comm: int
    overlapped: int
    exposed: int
    idle: int
    copy: int = 0
    waiting: int = 0


@dataclass(frozen=True)
class Phase:
    """All of one phase's runs, such as "dispatch(F)", or those of one layer.

    Attributes:
        name: of the phase.
        layer: the layer, if this is of one only; None over all.
        count: how often it ran.
        window: from its first activity's start to the end of the last.
        compute: length of the union of its computing activities.
        comm: of its communicating ones, waiting included.
        exposed: of its communication, while nothing at all computed.
        waiting: of its communication, where only notifications and barriers ran.
        behind: how long the computation of each other phase ran during its communication, by that
            phase's name; "" stands for what belongs to none.
        inferred: it was told from the order of kernels, because the trace has no annotations.
        sent_bytes: by its activities, where all of them tell; None otherwise.
        waiting_known: kernels that only wait ran in it. Where none did, as in NCCL's collectives,
            `waiting` is 0 and says nothing: the kernels that move data wait themselves.
        algorithm_bytes, bus_bytes: as of `bandwidth.Moved`.
    """

    name: str
    layer: int | None
    count: int
    window: Interval
    compute: int
    comm: int
    exposed: int
    waiting: int
    behind: dict[str, int]
    inferred: bool = False
    sent_bytes: int | None = None
    waiting_known: bool = False
    algorithm_bytes: int | None = None
    bus_bytes: int | None = None

    @property
    def transfer(self) -> int:
        """Communication that is not waiting, ns."""
        return self.comm - self.waiting


@dataclass(frozen=True, slots=True)
class Kernels:
    """Activities of one name.

    Attributes:
        name: of the kernel.
        group: "compute", "communication", "copy" or "unknown".
        role: of communication: "dispatch", "combine", "all_to_all", "allreduce", "send", "wait"...
        library: such as "DeepEP", "NCCL"; "" where it says nothing.
        count: how many.
        busy: sum of their durations, ns.
        blocks: smallest and largest number of blocks of their grids; None if not told.
        sent_bytes: in all, where told.
        algorithm_bytes, bus_bytes: as of `bandwidth.Moved`.
    """

    name: str
    group: str
    role: str
    library: str
    count: int
    busy: int
    blocks: tuple[int, int] | None
    sent_bytes: int | None
    algorithm_bytes: int | None = None
    bus_bytes: int | None = None


class SmSplit(NamedTuple):
    """How multiprocessors (SMs) are split, read off the launch grids.

    Attributes:
        num_sms: of the GPU; None if the trace does not tell.
        comm: blocks of the communication kernels that took most time; None if there are none.
        compute: the largest grid, up to num_sms, that persistent computing kernels were given;
            None if none can be told.
        comm_ns: busy time of communication kernels with that many blocks.
    """

    num_sms: int | None
    comm: int | None
    compute: int | None
    comm_ns: int


@dataclass(frozen=True)
class Exposed:
    """A stretch of communication behind which nothing computed.

    Attributes:
        interval: ns.
        phase: of the communication; "" if it belongs to none.
        layer: likewise; None if not told.
        next_phase: of the computation that came first afterwards, which may have waited for it.
        waiting: how much of it only notifications and barriers ran.
        waited_before: for how long its stream had waited before, since it last stood idle for
            longer than the stretch: then it could have caught up. 0 for a stretch that is less
            than a hundredth of all that is exposed.
    """

    interval: Interval
    phase: str
    layer: int | None
    next_phase: str
    waiting: int
    waited_before: int = 0


@dataclass(frozen=True)
class Report:
    """What one rank's trace shows.

    Attributes:
        source: the trace's file.
        rank: of the trace; None if it is not told.
        on_gpu: False where operators of a CPU run were analysed.
        window: start and end of what was analysed, ns, on the trace's clock.
        totals: over the window.
        phases: one entry a phase, in the order of first appearance.
        layers: the same by phase and layer.
        streams: totals of each stream or thread by itself: (name, busy computing, communicating).
        kernels: by name, those with most time first.
        unknown: those that no rule names; they count as computation.
        sm_split: None for a CPU run.
        exposed: stretches of exposed communication, the longest first.
        missing: what could not be told, and why, in sentences.
        compute_intervals, comm_intervals, exposed_intervals: the unions, for pictures.
    """

    source: str
    rank: int | None
    on_gpu: bool
    window: Interval
    totals: Totals
    phases: tuple[Phase, ...]
    layers: tuple[Phase, ...]
    streams: tuple[tuple[str, int, int], ...]
    kernels: tuple[Kernels, ...]
    unknown: tuple[Kernels, ...]
    sm_split: SmSplit | None
    exposed: tuple[Exposed, ...]
    missing: tuple[str, ...]
    compute_intervals: tuple[Interval, ...]
    comm_intervals: tuple[Interval, ...]
    exposed_intervals: tuple[Interval, ...]
