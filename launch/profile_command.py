"""`counterflow profile`: how much communication a trace shows exposed, where and why."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .outputs import Output, write_whole
from .profile_folders import find_traces
from .profile_options import Options, read_options
from .profile_summary import Summary, summarise
from .simulate_progress import Progress

if TYPE_CHECKING:
    from ..comm.profile.comparison import Comparison
    from ..comm.profile.ranks import RanksReport
    from ..comm.profile.read import Traces
    from ..comm.profile.report import Report
    from ..comm.profile.trace import Trace
    from .profile_plan import PlanCheck

_NS = 1_000_000  # in a millisecond


@dataclass(frozen=True)
class Answer:
    """What the command prints.

    Attributes:
        options: what was asked for.
        traces: one a rank.
        reports: of each of them.
        begins: when each trace begins, ns on its clock; times are shown from there.
        missing: what files or ranks are not there, in sentences.
        across: what they show together; None of one trace.
        comparison: with what was simulated; None if not asked for.
        plan: what the run says of its plan beyond that; None without one.
    """

    options: Options
    traces: tuple[Trace, ...]
    reports: tuple[Report, ...]
    begins: tuple[int, ...]
    missing: tuple[str, ...]
    across: RanksReport | None
    comparison: Comparison | None
    plan: PlanCheck | None = None

    @cached_property
    def summary(self) -> Summary:
        """All ranks together."""
        return summarise(self.reports, self.begins)

    @property
    def window_name(self) -> str | None:
        """The annotation that is looked at; None without one."""
        return self.options.window if isinstance(self.options.window, str) else None

    @property
    def window(self) -> str:
        """The window, for titles."""
        start, end = self.summary.window
        named = "" if self.window_name is None else f"{self.window_name}, "
        return f"{named}{start / _NS:.3f} to {end / _NS:.3f} ms"

    @property
    def where(self) -> str:
        """The window, and of how many ranks the means are, for titles."""
        ranks = self.summary.num_ranks
        return f"{self.window}, means of {ranks} ranks" if ranks > 1 else self.window


class _Reading(Progress):
    def _say(self) -> None:
        print("counterflow: reading traces; this takes a while", file=sys.stderr, flush=True)


def run(parsed: argparse.Namespace) -> int:
    """Run the command; the exit status is returned: 1 where a condition of `--fail-if` holds.

    Raises:
        ValueError: one of the user's mistakes, or a trace that cannot be used; conditions are not
            judged by a trace that breaks off, which is said once all is written.
    """
    options = read_options(parsed)
    with _Reading() as progress:
        progress.tell("reading")
        traces = _traces(options)
        answer = _analysed(options, traces, progress.tell)
        for output in options.outputs:
            progress.tell(f"writing {output.path.name}")
            write_whole(output.path, _writer(output, answer))
    from .profile_json import to_json

    shown = to_json(answer) if options.json or options.conditions else {}
    if options.json:
        print(json.dumps(shown, allow_nan=False))
    else:
        from .profile_text import print_answer, print_written

        print_answer(answer)
        print_written(options.outputs)
    sys.stdout.flush()  # before what failed
    if options.conditions:
        _check_whole(traces.traces)
    failures = [condition.failure(shown) for condition in options.conditions]
    for failure in filter(None, failures):
        print(f"counterflow: {failure}", file=sys.stderr)
    return 1 if any(failures) else 0


def _check_whole(traces: Iterable[Trace]) -> None:
    for trace in traces:
        if trace.broken:
            raise ValueError(
                f"--fail-if: {trace.source} breaks off ({trace.broken}), so its numbers are not "
                "those of the run and nothing is judged by them; record it again, and let the "
                "profiler finish writing"
            )


def _traces(options: Options) -> Traces:
    """The traces, of the ranks and the GPU that are asked for."""
    from ..comm.profile.devices import of_device
    from ..comm.profile.read import Traces, read_all

    picked = [find_traces(path) for path in options.traces]
    found = read_all([path for path, _ in picked])
    notes = (note for _, note in picked if note)
    found = _of_ranks(options, Traces(found.traces, (*found.missing, *notes)))
    return Traces(tuple(of_device(trace, options.device) for trace in found.traces), found.missing)


def _of_ranks(options: Options, found: Traces) -> Traces:
    from ..comm.profile.read import Traces

    if not options.ranks:
        return found
    known = [trace.rank for trace in found.traces if trace.rank is not None]
    for rank in options.ranks:
        if rank not in known:
            there = ", ".join(map(str, known))
            raise ValueError(
                f"--rank {rank}: there is no trace of it, but of "
                + (f"rank {there}" if there else "ranks that neither file nor name tells")
            )
    return Traces(tuple(t for t in found.traces if t.rank in options.ranks), found.missing)


def _analysed(options: Options, found: Traces, tell: Callable[[str], None]) -> Answer:
    from ..comm.profile.analyse import analyse
    from .profile_window import begin_of, beyond, window_of

    traces, rules, pattern = found.traces, options.rules, options.phase_pattern
    reports: list[Report] = []
    for number, trace in enumerate(traces, 1):
        tell(f"analysing {number} of {len(traces)}")
        window = window_of(trace, options.window)
        report = analyse(trace, rules, window, phase_pattern=pattern)
        cut = beyond(trace, options.window)
        reports.append(replace(report, missing=(cut, *report.missing)) if cut else report)
    across = comparison = None
    if len(traces) > 1:
        from ..comm.profile.ranks import compare_ranks

        tell("comparing ranks")
        across = compare_ranks(traces, reports, rules, phase_pattern=pattern)
    if options.simulated is not None:
        from ..comm.profile.against import against

        tell("comparing with the simulation")
        comparison = against(
            options.simulated,
            traces,
            reports,
            offsets=_offsets(traces, across),
            rules=rules,
            phase_pattern=pattern,
        )
    begins, plan = tuple(map(begin_of, traces)), _plan_check(options, traces, comparison)
    return Answer(options, traces, tuple(reports), begins, found.missing, across, comparison, plan)


def _plan_check(
    options: Options, traces: tuple[Trace, ...], comparison: Comparison | None
) -> PlanCheck | None:
    """What the run says of the plan that its simulation is part of; None without one."""
    planned = None if options.simulated is None else options.simulated.planned
    if planned is None or comparison is None:
        return None
    from .profile_plan import check_plan

    return check_plan(planned, comparison, options.traces, traces[0].world_size)


def _offsets(traces: tuple[Trace, ...], across: RanksReport | None) -> list[int] | None:
    """What to add to the times of each trace, so that all have one clock, ns."""
    if across is None:
        return None
    rank_of = {rank.source: rank.share.rank for rank in across.ranks}
    clocks = {clock.rank: clock.offset for clock in across.clocks}
    return [clocks[rank_of[trace.source]] for trace in traces]


def _writer(output: Output, answer: Answer) -> Callable[[Path], object]:
    options, traces, reports = answer.options, answer.traces, answer.reports
    if output.flag == "--html":
        from ..comm.profile.page import to_html

        page = to_html(
            traces,
            reports,
            title=f"Profile of {', '.join(map(str, options.traces))}",
            ranks=answer.across,
            comparison=answer.comparison,
            rules=options.rules,
            phase_pattern=options.phase_pattern,
        )
        return lambda path: path.write_text(page, encoding="utf-8")
    from ..comm.profile.perfetto import write_perfetto

    return lambda path: write_perfetto(
        path,
        traces,
        reports,
        options.simulated,
        offsets=_offsets(traces, answer.across),
        rules=options.rules,
        phase_pattern=options.phase_pattern,
    )
