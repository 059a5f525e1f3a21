"""What a trace of one rank holds, as values. Times are whole nanoseconds, so that sums are exact.

A trace comes from PyTorch's profiler (Kineto) or another writer of Chrome's format; `read` makes
these values of it. On a GPU, what ran is kernels, copies and fills on the device's streams. A trace
without any is of a CPU run: then what ran is the operators of each thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

Interval: TypeAlias = tuple[int, int]  # start and end in ns, end excluded
Thread: TypeAlias = tuple[int, int]  # process and thread that the trace names


class Exchange(NamedTuple):
    """What a collective's kernel says of itself (Kineto's metadata of NCCL), as far as it does.

    Attributes:
        collective: such as "all_to_allv", "allreduce", "send"; "" if it is not told.
        sent_bytes, received_bytes: of this rank; None if it is not told.
        group: name of the process group; "" if it is not told.
        group_size: ranks in it; None if it is not told.
        sequence: number of the collective within its group; None if it is not told.
        sent_splits, received_splits: elements to and from each rank, of an uneven all-to-all.
        group_ranks: ranks of the group; () if they are not told, or not all of them.
    """

    collective: str = ""
    sent_bytes: int | None = None
    received_bytes: int | None = None
    group: str = ""
    group_size: int | None = None
    sequence: int | None = None
    sent_splits: tuple[int, ...] = ()
    received_splits: tuple[int, ...] = ()
    group_ranks: tuple[int, ...] = ()


class Activity(NamedTuple):
    """Something that ran: a kernel, copy or fill of a GPU, or an operator of a CPU's thread.

    Attributes:
        name: of the kernel or operator.
        start, end: ns, on the trace's clock; end >= start.
        kind: "kernel", "memcpy", "memset", or "operator" in a trace of a CPU run.
        lane: the stream on the device, or the thread of an operator, as text: "stream 7".
        device: index of the GPU; -1 for an operator.
        launched: when its launch began on the host, ns, and by which thread; None if not told.
        launcher: that thread.
        grid: blocks in x, y, z; None if not told.
        block: threads of a block in x, y, z; None if not told.
        num_bytes: of a copy or fill; None if not told.
        exchange: of a collective; None for anything else.
    """

    name: str
    start: int
    end: int
    kind: str = "kernel"
    lane: str = ""
    device: int = 0
    launched: int | None = None
    launcher: Thread | None = None
    grid: tuple[int, int, int] | None = None
    block: tuple[int, int, int] | None = None
    num_bytes: int | None = None
    exchange: Exchange | None = None


class Annotation(NamedTuple):
    """A range that the program marked with a name (record_function, NVTX).

    Attributes:
        name: as marked.
        start, end: ns.
        thread: that marked it on the host; None for a range that the profiler drew on the device.
        lane: as of `Activity`, for a range on the device; "" otherwise.
    """

    name: str
    start: int
    end: int
    thread: Thread | None
    lane: str = ""


@dataclass(frozen=True)
class Trace:
    """One rank's trace.

    Attributes:
        source: file that it was read from.
        activities: what ran, by start; kernels, copies and fills, or operators if there are none.
        annotations: by start, outer before inner.
        on_gpu: False for a trace without any kernel; then `activities` are operators.
        rank, world_size: as the trace, or its file's name, says; None if neither does.
        num_sms: multiprocessors of the GPU; None if not told.
        device_name: such as "NVIDIA H800"; "" if not told.
        clock_ns: what times count from, in ns since 1970; 0 if they are that already or not told.
        num_events: events read, of any kind.
        missing: what the trace lacks or where it breaks off, in sentences for the reader.
        broken: why the trace breaks off before its end, as the end of a sentence; "" if it is
            whole. Events are not in the order of time: what is lost may be of any time.
        groups: ranks of each process group that the rank belongs to; () if not all are told.
        expert_ranks: ranks of its expert group, which its moves of tokens are among; () if not
            told, as only counterflow's own recordings do.
    """

    source: str
    activities: tuple[Activity, ...]
    annotations: tuple[Annotation, ...] = ()
    on_gpu: bool = True
    rank: int | None = None
    world_size: int | None = None
    num_sms: int | None = None
    device_name: str = ""
    clock_ns: int = 0
    num_events: int = 0
    missing: tuple[str, ...] = field(default=())
    broken: str = ""
    groups: tuple[tuple[int, ...], ...] = ()
    expert_ranks: tuple[int, ...] = ()

    @property
    def begin(self) -> int:
        """When its first activity starts, ns; on a CPU a marked range may be first."""
        ranges = (self.activities, () if self.on_gpu else self.annotations)
        return min((each[0].start for each in ranges if each), default=0)


class TraceError(ValueError):
    """A trace that cannot be used; the message says which file, what is wrong and what to do."""
