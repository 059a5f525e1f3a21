"""Traces of several ranks whose every number is known, because they are made from the answer.

All ranks run the same collectives, one after the other, each after some computation of its own. A
collective moves its data once the last rank has come, and ends on all ranks at once:

    rank 0  computes 50 ns |  collective: waits 30 ns, 10 ns of transfer  |
    rank 1  computes 80 ns                    |  collective: 10 ns        |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from counterflow.comm.profile.analyse import analyse
from counterflow.comm.profile.ranks import RanksReport, compare_ranks
from counterflow.comm.profile.trace import Activity, Annotation, Exchange, Thread, Trace

MAIN: Thread = (1, 1)
MOVES: Thread = (1, 2)
START = 1_000_000

DISPATCH = "void deep_ep::internode::dispatch<true>(int4*)"
ALL_TO_ALL = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"
GEMM = "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT"


@dataclass(frozen=True)
class Step:
    """A collective and what comes before it.

    Attributes:
        work: ns that each rank computes before; one entry a rank, all above 0.
        transfer: ns from the last rank's arrival to the end.
        phase: that the collective is marked as, such as "dispatch(F) layer 3".
        before: the phase that the computation is marked as.
        exchanges: what the collective says of itself, by rank; () if nothing.
    """

    work: Sequence[int]
    transfer: int
    phase: str = "dispatch(F) layer 0"
    before: str = "mlp(F) layer 0"
    exchanges: Sequence[Exchange] = ()


@dataclass
class _Recorder:
    """Writes down one rank's trace."""

    on_gpu: bool
    offset: int
    activities: list[Activity] = field(default_factory=list)
    annotations: list[Annotation] = field(default_factory=list)
    host: int = 0

    def computes(self, phase: str, start: int, end: int) -> None:
        thread = MAIN
        self._mark(phase, start, end, thread)
        self._ran(GEMM if self.on_gpu else "aten::mm", start, end, thread, "stream 7")

    def exchanges(self, phase: str, start: int, end: int, exchange: Exchange | None) -> None:
        thread = MAIN if self.on_gpu else MOVES
        self._mark(phase, start, end, thread)
        name = ALL_TO_ALL if exchange else DISPATCH
        if not self.on_gpu:
            name = "gloo:all_to_all"
        self._ran(name, start, end, thread, "stream 9", exchange)

    def _mark(self, phase: str, start: int, end: int, thread: Thread) -> None:
        """Around the launch, which a GPU's host does ahead; on a CPU around the work itself."""
        if self.on_gpu:
            self.host += 10
            start, end = self.host, self.host + 8
        if phase:
            self.annotations.append(
                Annotation(phase, start + self.offset, end + self.offset, thread)
            )

    def _ran(
        self,
        name: str,
        start: int,
        end: int,
        thread: Thread,
        lane: str,
        exchange: Exchange | None = None,
    ) -> None:
        self.activities.append(
            Activity(
                name,
                start + self.offset,
                end + self.offset,
                kind="kernel" if self.on_gpu else "operator",
                lane=lane if self.on_gpu else f"thread {thread[1]}",
                device=0 if self.on_gpu else -1,
                launched=self.host + 2 + self.offset if self.on_gpu else None,
                launcher=thread,
                exchange=exchange,
            )
        )


def traces_of(
    steps: Sequence[Step],
    *,
    offsets: Sequence[int] = (),
    on_gpu: bool = True,
    clocks_ns: Sequence[int] = (),
) -> list[Trace]:
    """The traces of all ranks, in order.

    Args:
        steps: in order; all with the same number of ranks.
        offsets: ns that each rank's clock is ahead; () if none is.
        on_gpu: kernels; otherwise operators of two threads.
        clocks_ns: what each trace says that its times count from; () if nothing.
    """
    num_ranks = len(steps[0].work)
    recorders = [_Recorder(on_gpu, offsets[rank] if offsets else 0) for rank in range(num_ranks)]
    now = START
    for step in steps:
        ends = now + max(step.work) + step.transfer
        for rank, (recorder, work) in enumerate(zip(recorders, step.work, strict=True)):
            recorder.computes(step.before, now, now + work)
            exchange = step.exchanges[rank] if step.exchanges else None
            recorder.exchanges(step.phase, now + work, ends, exchange)
        now = ends
    return [
        Trace(
            source=f"rank{rank}.json",
            activities=tuple(sorted(recorder.activities, key=lambda one: one.start)),
            annotations=tuple(sorted(recorder.annotations, key=lambda one: (one.start, -one.end))),
            on_gpu=on_gpu,
            rank=rank,
            world_size=num_ranks,
            clock_ns=clocks_ns[rank] if clocks_ns else 0,
        )
        for rank, recorder in enumerate(recorders)
    ]


def waits_of(step: Step) -> list[int]:
    """How long each rank waits for the last one, ns."""
    return [max(step.work) - work for work in step.work]


def compared(traces: Sequence[Trace]) -> RanksReport:
    """What the traces show together."""
    return compare_ranks(traces, [analyse(trace) for trace in traces])
