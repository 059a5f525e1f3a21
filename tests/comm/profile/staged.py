"""Traces of ranks that run actions, made from a plan of when which phase of each action runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from counterflow.comm.profile.against import against
from counterflow.comm.profile.analyse import analyse
from counterflow.comm.profile.comparison import Comparison
from counterflow.comm.profile.simulated import Simulated, SimulatedAction, SimulatedPhase
from counterflow.comm.profile.trace import Activity, Annotation, Thread, Trace
from counterflow.parallel.schedule import build
from counterflow.parallel.simulate import Costs, Phases, simulate
from counterflow.parallel.simulate.draw.bars import row_phases

MAIN: Thread = (1, 1)
MOVES: Thread = (1, 2)

_KERNELS = {
    "compute": "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT",
    "communication": "void deep_ep::internode::dispatch<true>(int4*)",
    "waiting": "void deep_ep::internode::notify_dispatch<8>(int)",
    "copy": "Memcpy DtoD (Device -> Device)",
}


class Ran(NamedTuple):
    """Something that ran within an action, ns.

    `phase` is marked, such as "dispatch(F) layer 0"; "" marks none. `lane` is "compute",
    "communication", "waiting" or "copy".
    """

    phase: str
    lane: str
    start: int
    end: int


class Did(NamedTuple):
    """An action and what ran within it."""

    name: str
    ran: Sequence[Ran]


def gpu_trace(
    steps: Sequence[Sequence[Did]],
    *,
    rank: int | None = 0,
    world_size: int | None = 1,
    marks_steps: bool = False,
    offset: int = 0,
) -> Trace:
    """A GPU's trace: the host launches everything ahead, a nanosecond after the other.

    Args:
        steps: of each training step its actions.
        rank, world_size: as the trace says.
        marks_steps: mark each training step as torch's profiler does.
        offset: that the rank's clock is ahead.
    """
    host = offset
    annotations: list[Annotation] = []
    activities: list[Activity] = []

    def mark(name: str, start: int) -> None:
        if name:
            annotations.append(Annotation(name, start, host, MAIN))

    for number, step in enumerate(steps):
        step_began = host
        for did in step:
            began = host
            for phase, lane, start, end in did.ran:
                phase_began = host
                activities.append(
                    Activity(
                        _KERNELS[lane],
                        start + offset,
                        end + offset,
                        kind="memcpy" if lane == "copy" else "kernel",
                        lane="stream 7" if lane == "compute" else "stream 9",
                        launched=host,
                        launcher=MAIN,
                    )
                )
                host += 2
                mark(phase, phase_began)
            host += 1
            mark(did.name, began)
        host += 1
        if marks_steps:
            mark(f"ProfilerStep#{number + 3}", step_began)
    return Trace(
        source=f"rank{rank}.json",
        activities=tuple(sorted(activities, key=lambda one: one.start)),
        annotations=tuple(sorted(annotations, key=lambda one: (one.start, -one.end))),
        rank=rank,
        world_size=world_size,
    )


def as_simulated(simulated: Simulated, rank: int, *, delay: int = 0) -> list[Did]:
    """A simulated row as it would run, `delay` ns later; its times must be whole ns."""

    def at(time: float) -> int:
        assert time.is_integer()
        return int(time) + delay

    return [
        Did(
            action.name,
            [
                Ran(f"{part.name} layer {part.layer}", part.lane, at(part.start), at(part.end))
                for part in action.phases
            ]
            or [Ran("", "compute", at(action.start), at(action.end))],
        )
        for action in simulated.rows[rank]
    ]


# Whole numbers, which stay whole with half of the SMs: times in ns are exact.
PHASES = Phases(
    {
        "attn(F)": 90_000,
        "dispatch(F)": 71_000,
        "mlp(F)": 80_000,
        "combine(F)": 93_000,
        "combine(B)": 94_000,
        "mlp(B)": 85_000,
        "dispatch(B)": 76_000,
        "attn(B)": 117_000,
        "mlp(W)": 78_000,
        "attn(W)": 49_000,
    },
    layers=2,
    comm_share=0.5,
)


def simulated_of(
    schedule: str = "dualpipe",
    ranks: int = 2,
    microbatches: int = 4,
    *,
    costs: Costs | None = None,
    unit: str = "ns",
) -> Simulated:
    """What reading a simulation's file gives; by default of `PHASES`."""
    result = simulate(
        build(schedule, ranks=ranks, microbatches=microbatches),
        costs or Costs(phases=PHASES, send=1000, unit=unit),
    )
    phases = result.costs.phases
    rows: list[tuple[SimulatedAction, ...]] = []
    for rank, row in enumerate(result.spans):
        of = [()] * len(row) if phases is None else row_phases(result, rank, phases)
        rows.append(
            tuple(
                SimulatedAction(
                    str(step), start, end, tuple(SimulatedPhase(*phase) for phase in spans)
                )
                for (step, start, end), spans in zip(row, of, strict=True)
            )
        )
    return Simulated("simulated.json", schedule, unit, result.makespan, tuple(rows))


def ran_as_simulated(simulated: Simulated, *, dp: int = 1, delay: int = 5_000_000) -> list[Trace]:
    ranks = simulated.num_ranks * dp
    return [
        gpu_trace([as_simulated(simulated, rank // dp, delay=delay)], rank=rank, world_size=ranks)
        for rank in range(ranks)
    ]


def simple(phases: bool = True, unit: str = "us") -> Simulated:
    """One rank: F of 10 attention, 6 dispatch, 4 MLP; idle 5; W of 10."""
    spans = (
        SimulatedPhase("attn(F)", 0, "compute", 0.0, 10.0),
        SimulatedPhase("dispatch(F)", 0, "communication", 10.0, 16.0),
        SimulatedPhase("mlp(F)", 0, "compute", 16.0, 20.0),
    )
    weights = (SimulatedPhase("mlp(W)", 0, "compute", 25.0, 35.0),)
    row = (
        SimulatedAction("0F0", 0.0, 20.0, spans if phases else ()),
        SimulatedAction("0W0", 25.0, 35.0, weights if phases else ()),
    )
    return Simulated("simple.json", "mine", unit, 35.0, (row,))


def forward(start: int = 0, dispatch: int = 6000, notify: int = 0, gap: int = 0) -> Did:
    """The forward of `simple`, with a dispatch of other length, and something before it."""
    sent = start + 10_000 + gap
    ran = [Ran("attn(F) layer 0", "compute", start, start + 10_000)]
    if notify:
        ran.append(Ran("dispatch(F) layer 0", "waiting", sent, sent + notify))
    arrived = sent + notify + dispatch
    ran.append(Ran("dispatch(F) layer 0", "communication", sent + notify, arrived))
    return Did("0F0", [*ran, Ran("mlp(F) layer 0", "compute", arrived, arrived + 4000)])


def weights(start: int) -> Did:
    return Did("0W0", [Ran("mlp(W) layer 0", "compute", start, start + 10_000)])


def compared(
    simulated: Simulated, traces: Sequence[Trace], offsets: Sequence[int] | None = None
) -> Comparison:
    return against(simulated, traces, [analyse(trace) for trace in traces], offsets=offsets)


def adds_up(found: Comparison) -> None:
    for rank in found.ranks:
        assert sum(part.difference for part in rank.parts) == rank.difference
        assert sum(part.measured for part in rank.parts) == rank.measured
        assert sum(part.simulated for part in rank.parts) == rank.simulated
