"""What `counterflow profile` prints for people: of each table its title says the window."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from ..comm.profile.kernel_table import IN_NO_RULE
from ..comm.profile.notes import merged
from ..comm.profile.report import Kernels, Phase, SmSplit
from .profile_json import gbps
from .profile_summary import Stretch, Summary, percent
from .tables import Table, print_table, widest_that_fits

if TYPE_CHECKING:
    from .outputs import Output
    from .profile_command import Answer

_NS = 1_000_000  # in a millisecond
# Columns of the phases that go, one after the other, where there is too little room.
_FIRST_TO_GO = (
    *("transfer", "algbw", "runs", "hides behind", "waiting", "compute", "hidden"),
    "busbw",
)
_KERNELS_FIRST_TO_GO = ("algbw", "library", "blocks", "busbw", "runs", "kind")
_COLUMNS = {
    "waiting": "waiting: of comm, where only notifications and barriers run",
    "hidden": "hidden: share of comm during which anything computes",
    "hides behind": "hides behind: what computes then, in shares of comm",
    "busbw": "busbw: GB/s as nccl-tests counts them, over transfer",
}
_NAMED = 6  # phases named in a sentence
_WORST = 3  # phases named that are exposed most
_BEHIND = 2  # phases shown that one hides behind
_NAME = 24  # least room for a kernel's name
_SMALL = 0.05  # percent that would look like none
_NONE = "(no phase)"

# A kernel whose template argument says what it is.
_WRAPPER = re.compile(r"cutlass::\w+<(.*)>")

_Row = TypeVar("_Row")


def print_answer(answer: Answer) -> None:
    """Print all of it; ranks and what was simulated come after what one rank shows as well."""
    summary = answer.summary
    from .profile_text_header import print_header

    print_header(answer)
    _print_totals(answer)
    if summary.phases:
        shown = _print_phases(f"phases, ms; {answer.where}", summary, summary.phases)
        fill("; ".join(text for name, text in _COLUMNS.items() if name in shown))
        if any(phase.inferred for phase in summary.phases):
            fill("phases of layers are inferred from the order of kernels, as the trace marks none")
    if answer.options.layers and summary.layers:
        _print_phases(f"phases by layer, ms; {answer.where}", summary, summary.layers)
    _print_exposed(answer)
    _print_sm_split(answer)
    _print_kernels(answer)
    if answer.across is not None:
        from .profile_text_ranks import print_ranks

        print_ranks(answer, answer.across)
    if answer.comparison is not None:
        from .profile_text_against import print_comparison

        print_comparison(answer, answer.comparison)
    if summary.unknown:
        _print_unknown(answer)
    for line in merged((*answer.missing, *summary.missing, *_about_waiting(summary))):
        if IN_NO_RULE not in line:  # there is a table of it
            fill(f"note: {line}")


def print_written(outputs: Sequence[Output]) -> None:
    """Say what was written."""
    for output in outputs:
        print(f"wrote {output.path}")


def fitting(
    cells: Mapping[str, Callable[[_Row], str]], rows: Sequence[_Row], first_to_go: Sequence[str]
) -> Table:
    """A table without those columns for which the terminal is too narrow.

    Args:
        cells: what each column has in a row.
        rows: what the table is of.
        first_to_go: columns that may be left out, in that order.
    """
    tables: list[Table] = []
    for count in range(len(first_to_go) + 1):
        shown = {name: cell for name, cell in cells.items() if name not in first_to_go[:count]}
        tables.append((list(shown), [[cell(row) for cell in shown.values()] for row in rows]))
    return widest_that_fits(tables)


def fill(text: str) -> None:
    """Print a paragraph as wide as there is room."""
    print(textwrap.fill(text, shutil.get_terminal_size().columns))


def ms(length: float | None) -> str:
    """A length in ns, as milliseconds."""
    return "-" if length is None else f"{length / _NS:.3f}"


def share(part: float, whole: float) -> str:
    """A percentage; - of nothing."""
    found = percent(part, whole)
    if found is None:
        return "-"
    return f"{found:.1f} %" if found == 0 or found >= _SMALL else f"{found:.1g} %"


def _print_totals(answer: Answer) -> None:
    summary, totals = answer.summary, answer.summary.totals
    copies = totals.span - totals.compute - totals.exposed - totals.idle
    rows = [  # name, sum over the ranks, whether it is of communication
        ("span", totals.span, False),
        ("compute", totals.compute, False),
        ("communication", totals.comm, True),
        ("  overlapped", totals.overlapped, True),
        ("  exposed", totals.exposed, True),
        ("    of it waiting", summary.exposed_waiting, True),
        ("  waiting in all", totals.waiting, True),
        ("copies alone", copies, False),
        ("idle", totals.idle, False),
    ]
    cells: dict[str, Callable[[tuple[str, int, bool]], str]] = {
        "": lambda row: row[0],
        "ms": lambda row: "-" if row[0] in untold else f"{summary.ms(row[1]):.3f}",
        "of span": lambda row: "-" if row[0] in untold else share(row[1], totals.span),
        "of communication": lambda row: (
            share(row[1], totals.comm) if row[2] and row[0] not in untold else "-"
        ),
    }
    untold = () if summary.waiting_known else ("    of it waiting", "  waiting in all")
    head, body = fitting(cells, rows, ("of communication",))
    print()
    print_table(f"where the time goes; {answer.where}", head, body, names=1)
    if totals.exposed:
        fill(_about_exposed(summary))


def _about_exposed(summary: Summary) -> str:
    """In a sentence, how much is exposed and where."""
    phases = sorted(summary.phases, key=lambda phase: -phase.exposed)[:_WORST]
    total = summary.totals.exposed
    text = f"exposed: {summary.ms(total):.3f} ms, {share(total, summary.totals.span)} of the span"
    where = [f"{share(phase.exposed, total)} in {phase.name}" for phase in phases if phase.exposed]
    return f"{text}; of it {', '.join(where)}" if where else text


def _print_phases(title: str, summary: Summary, phases: Sequence[Phase]) -> Sequence[str]:
    """Print a table of phases; the columns that there was room for are returned."""

    def mean(length: int) -> str:
        return f"{summary.ms(length):.3f}" if length else "-"

    def behind(phase: Phase) -> str:
        longest = sorted(phase.behind.items(), key=lambda item: -item[1])[:_BEHIND]
        return (
            ", ".join(
                f"{name or 'other'} {100 * length / phase.comm:.0f}%" for name, length in longest
            )
            or "-"
        )

    cells: dict[str, Callable[[Phase], str]] = {
        "phase": phase_name,
        "runs": lambda phase: str(phase.count),
        "compute": lambda phase: mean(phase.compute),
        "comm": lambda phase: mean(phase.comm),
        "waiting": lambda phase: mean(phase.waiting),
        "transfer": lambda phase: mean(phase.transfer),
        "exposed": lambda phase: mean(phase.exposed),
        "hidden": lambda phase: share(phase.comm - phase.exposed, phase.comm),
        "hides behind": behind,
        "algbw": lambda phase: _speed(phase.algorithm_bytes, phase.transfer),
        "busbw": lambda phase: _speed(phase.bus_bytes, phase.transfer),
    }
    for name in ("compute", "algbw", "busbw"):
        if all(cells[name](phase) == "-" for phase in phases):
            del cells[name]
    head, body = fitting(cells, phases, _FIRST_TO_GO)
    print()
    print_table(title, head, body, names=1)
    return head


def _speed(num_bytes: int | None, length: int) -> str:
    """GB/s."""
    found = gbps(num_bytes, length)
    return "-" if not found else f"{found:.3g}"


def _about_waiting(summary: Summary) -> Iterator[str]:
    """Where it cannot be told how much of communication is waiting, in a sentence."""
    phases = [p for p in summary.phases if p.comm and not p.waiting_known]
    names = ", ".join(phase_name(phase) for phase in phases[:_NAMED])
    if phases:
        more = len(phases) - _NAMED
        names += f" and {more} more" if more > 0 else ""
        yield (
            f"How much of the communication of {names} is waiting for other ranks cannot be told: "
            "nothing ran that only waits, and what moves data, such as NCCL's kernels, waits for "
            "its peers itself. Traces of all ranks tell it (skew)."
        )


def phase_name(phase: Phase) -> str:
    """A phase, with its layer if it is of one."""
    name = phase.name or _NONE
    return name if phase.layer is None else f"{name} layer {phase.layer}"


def _print_exposed(answer: Answer) -> None:
    summary, top = answer.summary, answer.options.top
    if not summary.exposed:
        return
    cells: dict[str, Callable[[Stretch], str]] = {
        "phase": lambda s: s.exposed.phase or _NONE,
        "then computes": lambda s: s.exposed.next_phase or "-",
        "rank": lambda s: "-" if s.rank is None else str(s.rank),
        "layer": lambda s: "-" if s.exposed.layer is None else str(s.exposed.layer),
        "at": lambda s: ms(s.exposed.interval[0] - s.begin),
        "ms": lambda s: ms(s.exposed.interval[1] - s.exposed.interval[0]),
        "waiting": lambda s: ms(s.exposed.waiting) if told(s) else "-",
    }
    known = {phase.name: phase.waiting_known for phase in summary.phases}

    def told(stretch: Stretch) -> bool:
        return known.get(stretch.exposed.phase, summary.waiting_known)

    stretches = summary.exposed[:top]
    if summary.num_ranks == 1:
        del cells["rank"]
    if all(s.exposed.layer is None for s in stretches):
        del cells["layer"]
    head, body = fitting(cells, stretches, ("then computes", "layer", "waiting"))
    which = f"the longest {len(stretches)} of " if len(summary.exposed) > top else ""
    print()
    print_table(
        f"exposed communication, {which}{len(summary.exposed)} stretches; {answer.window}",
        head,
        body,
        names=2 if "then computes" in head else 1,
    )
    for stretch in stretches[:_WORST]:
        for line in _why(stretch, summary):
            fill(line)


def _why(stretch: Stretch, summary: Summary) -> Iterator[str]:
    """What probably made a stretch of communication late, if waiting before it did."""
    found = stretch.exposed
    length = found.interval[1] - found.interval[0]
    if found.waited_before > length > 2 * found.waiting:
        rank = "" if summary.num_ranks == 1 else f"rank {stretch.rank}, "
        yield (
            f"{rank}{found.phase or 'communication'} at {ms(found.interval[0] - stretch.begin)} ms "
            f"is probably late: before it its stream waited {ms(found.waited_before)} ms for other "
            f"ranks, and never stood idle for as long as the {ms(length)} ms that are exposed"
        )


def _print_sm_split(answer: Answer) -> None:
    splits = [report.sm_split for report in answer.reports if report.sm_split is not None]
    if splits and (text := _about_split(splits[0])):
        print()
        fill(text)


def _about_split(split: SmSplit) -> str:
    parts: list[str] = []
    if split.comm is not None:
        parts.append(
            f"communication launches {split.comm} blocks (for {ms(split.comm_ns)} ms of its time)"
        )
    if split.compute is not None:
        parts.append(f"the widest computing grids that fit have {split.compute}")
    if not parts:
        return ""
    of = "" if split.num_sms is None else f" of {split.num_sms} SMs"
    return f"split{of}, from launch grids: {'; '.join(parts)}"


def _print_kernels(answer: Answer) -> None:
    summary = answer.summary
    top = summary.kernels[: answer.options.top]
    if not top:
        return
    what = "kernels" if answer.reports[0].on_gpu else "operators"
    title = f"{len(top)} of {len(summary.kernels)} {what}, those with most time; {answer.where}"
    _print_by_name(title, summary, top)


def _print_by_name(title: str, summary: Summary, kernels: Sequence[Kernels]) -> None:
    cells: dict[str, Callable[[Kernels], str]] = {
        "kind": lambda k: k.role or k.group,
        "library": lambda k: k.library or "-",
        "runs": lambda k: str(k.count),
        "blocks": _blocks,
        "ms": lambda k: f"{summary.ms(k.busy):.3f}",
        "algbw": lambda k: _speed(k.algorithm_bytes, k.busy),
        "busbw": lambda k: _speed(k.bus_bytes, k.busy),
    }
    for name in ("library", "blocks", "algbw", "busbw"):
        if all(cells[name](kernel) == "-" for kernel in kernels):
            del cells[name]
    columns = shutil.get_terminal_size().columns
    shown, rest, room = dict(cells), list[list[str]](), 0
    for count in range(len(_KERNELS_FIRST_TO_GO) + 1):
        gone = _KERNELS_FIRST_TO_GO[:count]
        shown = {name: cell for name, cell in cells.items() if name not in gone}
        rest = [[cell(kernel) for cell in shown.values()] for kernel in kernels]
        widths = [max(map(len, column)) for column in zip(list(shown), *rest, strict=True)]
        room = columns - sum(widths) - 2 * len(widths)
        if room >= _NAME:
            break
    room = max(room, _NAME)
    body = [[short(kernel.name, room), *row] for kernel, row in zip(kernels, rest, strict=True)]
    print()
    print_table(title, ["name", *shown], body, names=1 + len({"kind", "library"} & shown.keys()))


def short(name: str, room: int) -> str:
    """A kernel's name without what says least; cut where even that does not fit."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    if len(name) > room:
        name = name.partition("(")[0].strip() or name  # without parameters
    if len(name) > room and (wrapped := _WRAPPER.fullmatch(name)):
        name = wrapped[1]
    if len(name) > room:
        qualified, bracket, arguments = name.partition("<")
        name = "::".join(qualified.split("::")[-2:]) + bracket + arguments
    return name if len(name) <= room else f"{name[: room - 3]}..."


def _blocks(kernel: Kernels) -> str:
    if kernel.blocks is None:
        return "-"
    least, most = kernel.blocks
    return str(least) if least == most else f"{least}..{most}"


def _print_unknown(answer: Answer) -> None:
    summary = answer.summary
    busy = sum(kernel.busy for kernel in summary.unknown)
    everything = sum(kernel.busy for kernel in summary.kernels)
    _print_by_name(
        f"WARNING: what no rule names, {share(busy, everything)} of the time of all kernels; it "
        f"counts as computation; {answer.where}",
        summary,
        summary.unknown[: answer.options.top],
    )
    more = len(summary.unknown) - answer.options.top
    left = f"{more} more are in --json; " if more > 0 else ""
    fill(f"{left}say what they are in a file for --kernels (docs/profile.md)")
