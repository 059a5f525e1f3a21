"""What `counterflow profile --json` prints. Times are milliseconds, means over the ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from ..comm.profile.by_phase import by_phase
from ..comm.profile.report import Kernels, Phase, SmSplit
from .profile_summary import Stretch, Summary, percent, summarise

if TYPE_CHECKING:
    from ..comm.profile.comparison import Comparison
    from ..comm.profile.imbalance import Imbalance
    from ..comm.profile.ranks import RanksReport, Share
    from .profile_command import Answer
    from .profile_plan import PlanCheck

Json: TypeAlias = dict[str, object]

# The numbers that `--fail-if` takes: of the window, and of a phase.
NUMBERS = (
    "span_ms",
    "compute_ms",
    "comm_ms",
    "overlapped_ms",
    "exposed_comm_ms",
    "idle_ms",
    "copy_ms",
    "copies_alone_ms",
    "waiting_ms",
    "exposed_waiting_ms",
    "compute_percent",
    "comm_percent",
    "exposed_comm_percent",
    "idle_percent",
    "overlapped_percent",
    "unknown_percent",
)
PHASE_NUMBERS = (
    "count",
    "compute_ms",
    "comm_ms",
    "overlapped_ms",
    "exposed_comm_ms",
    "waiting_ms",
    "transfer_ms",
    "exposed_comm_percent",
    "overlapped_percent",
)
_NS = 1_000_000  # in a millisecond


def to_json(answer: Answer) -> Json:
    """One object: all ranks together, then each by itself."""
    summary = answer.summary
    first = answer.reports[0]
    return {
        "num_ranks": summary.num_ranks,
        "window": _window(answer.window_name, summary),
        **_numbers(summary),
        "waiting_known": summary.waiting_known,
        "phases": [_phase(summary, phase) for phase in summary.phases],
        "layers": [{"layer": phase.layer, **_phase(summary, phase)} for phase in summary.layers],
        "sm_split": _sm_split(first.sm_split),
        "exposed": [_stretch(stretch) for stretch in summary.exposed],
        "kernels": [_kernel(summary, kernel) for kernel in summary.kernels],
        "unknown": [_kernel(summary, kernel) for kernel in summary.unknown],
        "missing": [*answer.missing, *summary.missing],
        "ranks": [_rank(answer, index) for index in range(len(answer.reports))],
        "across": None if answer.across is None else _across(answer.across),
        "against": None if answer.comparison is None else _against(answer.comparison, answer.plan),
    }


def _window(name: str | None, summary: Summary) -> Json:
    start, end = summary.window
    return {"name": name, "start_ms": start / _NS, "end_ms": end / _NS}


def _numbers(summary: Summary) -> dict[str, float | None]:
    totals, ms = summary.totals, summary.ms
    return {
        "span_ms": ms(totals.span),
        "compute_ms": ms(totals.compute),
        "comm_ms": ms(totals.comm),
        "overlapped_ms": ms(totals.overlapped),
        "exposed_comm_ms": ms(totals.exposed),
        "idle_ms": ms(totals.idle),
        "copy_ms": ms(totals.copy),
        "copies_alone_ms": ms(totals.span - totals.compute - totals.exposed - totals.idle),
        "waiting_ms": ms(totals.waiting),
        "exposed_waiting_ms": ms(summary.exposed_waiting),
        "compute_percent": percent(totals.compute, totals.span),
        "comm_percent": percent(totals.comm, totals.span),
        "exposed_comm_percent": percent(totals.exposed, totals.span),
        "idle_percent": percent(totals.idle, totals.span),
        "overlapped_percent": percent(totals.overlapped, totals.comm),
        "unknown_percent": summary.unknown_percent,
    }


def _phase(summary: Summary, phase: Phase) -> Json:
    ms = summary.ms
    overlapped = phase.comm - phase.exposed
    return {
        "name": phase.name,
        "count": phase.count,
        "start_ms": phase.window[0] / _NS,
        "end_ms": phase.window[1] / _NS,
        "compute_ms": ms(phase.compute),
        "comm_ms": ms(phase.comm),
        "overlapped_ms": ms(overlapped),
        "exposed_comm_ms": ms(phase.exposed),
        "waiting_ms": ms(phase.waiting),
        "waiting_known": phase.waiting_known,
        "transfer_ms": ms(phase.transfer),
        "exposed_comm_percent": percent(phase.exposed, summary.totals.span),
        "overlapped_percent": percent(overlapped, phase.comm),
        "behind_ms": {name: ms(length) for name, length in phase.behind.items()},
        "sent_bytes": phase.sent_bytes,
        "sent_gbps": gbps(phase.sent_bytes, phase.transfer),
        "algorithm_gbps": gbps(phase.algorithm_bytes, phase.transfer),
        "bus_gbps": gbps(phase.bus_bytes, phase.transfer),
        "inferred": phase.inferred,
    }


def gbps(num_bytes: int | None, length_ns: int) -> float | None:
    """GB/s, of what was sent; None where it is not told."""
    return None if num_bytes is None or not length_ns else num_bytes / length_ns


def _kernel(summary: Summary, kernel: Kernels) -> Json:
    least, most = kernel.blocks or (None, None)
    return {
        "name": kernel.name,
        "group": kernel.group,
        "role": kernel.role,
        "library": kernel.library,
        "count": kernel.count,
        "busy_ms": summary.ms(kernel.busy),
        "min_blocks": least,
        "max_blocks": most,
        "sent_bytes": kernel.sent_bytes,
        "algorithm_gbps": gbps(kernel.algorithm_bytes, kernel.busy),
        "bus_gbps": gbps(kernel.bus_bytes, kernel.busy),
    }


def _stretch(stretch: Stretch) -> Json:
    found = stretch.exposed
    start, end = found.interval
    return {
        "rank": stretch.rank,
        "start_ms": (start - stretch.begin) / _NS,
        "end_ms": (end - stretch.begin) / _NS,
        "length_ms": (end - start) / _NS,
        "phase": found.phase,
        "layer": found.layer,
        "next_phase": found.next_phase,
        "waiting_ms": found.waiting / _NS,
        "waited_before_ms": found.waited_before / _NS,
    }


def _sm_split(split: SmSplit | None) -> Json | None:
    if split is None:
        return None
    return {
        "num_sms": split.num_sms,
        "comm_blocks": split.comm,
        "compute_blocks": split.compute,
        "comm_ms": split.comm_ns / _NS,
    }


def _rank(answer: Answer, index: int) -> Json:
    trace, report = answer.traces[index], answer.reports[index]
    alone = summarise([report], [answer.begins[index]])
    return {
        "rank": report.rank,
        "world_size": trace.world_size,
        "source": report.source,
        "device_name": trace.device_name,
        "on_gpu": report.on_gpu,
        "num_events": trace.num_events,
        "window": _window(answer.window_name, alone),
        **_numbers(alone),
        "waiting_known": alone.waiting_known,
        "phases": [_phase(alone, phase) for phase in alone.phases],
        "streams": [
            {"name": name, "compute_ms": compute / _NS, "comm_ms": comm / _NS}
            for name, compute, comm in report.streams
        ],
        "sm_split": _sm_split(report.sm_split),
        "missing": list(report.missing),
    }


def _across(found: RanksReport) -> Json:
    return {
        "world_size": found.world_size,
        "missing_ranks": list(found.missing_ranks),
        "matched": found.matched,
        "by_sequence": found.by_sequence,
        "transfer_ms": found.transfer / _NS,
        "skew_ms": found.skew / _NS,
        "ranks": [
            {
                "compute_ms": rank.compute / _NS,
                "compute_excess_ms": rank.compute_excess / _NS,
                **_share(rank.share),
            }
            for rank in found.ranks
        ],
        "phases": [
            {
                "name": phase.name,
                "count": phase.count,
                "transfer_ms": phase.transfer / _NS,
                "skew_ms": phase.skew / _NS,
                "shares": [_share(share) for share in phase.shares],
            }
            for phase in found.phases
        ],
        "stragglers": [
            {
                "rank": late.rank,
                "held_up_ms": late.held_up / _NS,
                "phase": late.phase,
                "phase_held_up_ms": late.phase_held_up / _NS,
                "compute_excess_ms": late.compute_excess / _NS,
                "compute_phase": late.compute_phase,
                "sentence": late.sentence,
            }
            for late in found.stragglers
        ],
        "clocks": [
            {
                "rank": clock.rank,
                "offset_ms": clock.offset / _NS,
                "uncertainty_ms": _maybe_ms(clock.uncertainty),
                "collectives": clock.collectives,
                "bounds_ms": None if clock.bounds is None else [b / _NS for b in clock.bounds],
                "off_by_ms": _maybe_ms(clock.off_by),
                "jumps_ms": [jump / _NS for jump in clock.jumps],
            }
            for clock in found.clocks
        ],
        "imbalance": None if found.imbalance is None else _imbalance(found.imbalance),
        "unmatched": [
            {"name": left.name, "counts": dict(left.counts), "reason": left.reason}
            for left in found.unmatched
        ],
        "notes": list(found.notes),
    }


def _share(share: Share) -> Json:
    return {
        "rank": share.rank,
        "count": share.count,
        "transfer_ms": share.transfer / _NS,
        "skew_ms": share.skew / _NS,
        "last": share.last,
        "held_up_ms": share.held_up / _NS,
    }


def _imbalance(found: Imbalance) -> Json:
    return {
        "measure": found.measure,
        "phase": found.phase,
        "overall": found.overall,
        "layers": [
            {
                "layer": layer.layer,
                "ranks": list(layer.ranks),
                "loads": list(layer.loads),
                "ratio": layer.ratio,
            }
            for layer in found.layers
        ],
    }


def _against(found: Comparison, plan: PlanCheck | None) -> Json:
    return {
        "source": found.source,
        "schedule": found.schedule,
        "unit": found.unit,
        "ms_per_unit": found.ns_per_unit / _NS,
        "fitted": found.fitted,
        "steps": found.steps,
        "together": found.together,
        "kinds": [
            {
                "kind": kind.kind,
                "stage": kind.stage,
                "count": kind.count,
                **_both(kind.measured, kind.simulated),
                "ratio": kind.ratio,
            }
            for kind in found.kinds
        ],
        "phases": [
            {
                "name": phase.name,
                "kind": phase.kind,
                "lane": phase.lane,
                "count": phase.count,
                **_both(phase.measured, phase.simulated),
                "ratio": phase.ratio,
                "waiting_ms": phase.waiting / _NS,
                "exposed_ms": phase.exposed / _NS,
                "simulated_exposed_ms": _maybe_ms(phase.simulated_exposed),
            }
            for phase in found.phases
        ],
        "actions": [
            {
                "rank": action.rank,
                "name": action.name,
                "kind": action.kind,
                "stage": action.stage,
                **_both(action.measured, action.simulated),
                "measured_start_ms": action.starts[0] / _NS,
                "simulated_start_ms": action.starts[1] / _NS,
            }
            for action in found.actions
        ],
        "ranks": [
            {
                "rank": rank.rank,
                "pipeline_rank": rank.pipeline_rank,
                "step": rank.step,
                **_both(rank.measured, rank.simulated),
                "parts": [
                    {
                        "kind": part.kind,
                        "part": part.part,
                        "phase": part.phase,
                        **_both(part.measured, part.simulated),
                    }
                    for part in rank.parts
                ],
            }
            for rank in found.ranks
        ],
        "pair": None if found.pair is None else _both(*found.pair),
        "findings": list(found.findings),
        "missing": list(found.missing),
        "plan": None if plan is None else _plan(found, plan),
    }


def _plan(found: Comparison, plan: PlanCheck) -> Json:
    phases = () if found.longest is None else by_phase(found.longest)
    return {
        "numbers": [
            {
                "name": of.name,
                "unit": of.unit,
                "predicted": of.predicted,
                "measured": of.measured,
                "ratio": of.ratio,
            }
            for of in plan.numbers
        ],
        "phases": [
            {
                "name": of.name,
                **_both(of.measured, of.simulated),
                "ratio": of.ratio,
                "difference_ms": of.difference / _NS,
            }
            for of in phases
        ],
        "missing": list(plan.missing),
    }


def _both(measured: int, simulated: int | None) -> Json:
    return {"measured_ms": measured / _NS, "simulated_ms": _maybe_ms(simulated)}


def _maybe_ms(length: int | None) -> float | None:
    return None if length is None else length / _NS
