"""Tables of the page: what the reports say, exactly, and to be read without any script.

A cell that holds a time shows milliseconds and has the whole nanoseconds as `data-value`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from .kernel_table import COMMUNICATION, WAIT
from .report import Exposed, Kernels, Phase, Report, Totals
from .trace import Interval

MOST_STRETCHES = 40  # of all ranks together, that are listed
MOST_KERNELS = 40  # of each rank
_RATES = ["algbw, GB/s", "busbw, GB/s"]  # as of `bandwidth`
_MOST_BEHIND = 3  # phases that are named as running behind a communication


class Cell(NamedTuple):
    """One cell: HTML, and what its column is sorted by (None: by the text)."""

    html: str
    value: float | None = None


def text(content: object) -> Cell:
    return Cell(escape(str(content)))


def number(value: float | None, shown: str = "") -> Cell:
    """A number, or nothing where there is none."""
    return Cell("", -1) if value is None else Cell(escape(shown or f"{value:,}"), value)


def time(ns: int | None) -> Cell:
    """Nanoseconds, shown as milliseconds."""
    return number(ns, f"{ns / 1e6:,.3f}" if ns else "0")


def waiting(ns: int, known: bool) -> Cell:
    """As `time`; a dash where it is not known how much of communication only waits."""
    return time(ns) if known else Cell("–", -1)


def share(part: float, whole: float) -> Cell:
    """A part of a whole as a percentage."""
    return number(part / whole, f"{part / whole:.1%}") if whole else Cell("", -1)


def table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[tuple[str, Sequence[Cell]]],
    words: Collection[int] = (0,),
) -> str:
    """A table that the script makes sortable.

    Args:
        caption: what it is, for those who do not see where it stands.
        head: of the columns.
        rows: each with the rank that it belongs to ("" for none) and its cells.
        words: columns that hold words; the others hold numbers.
    """
    header = "".join(
        f'<th scope="col"{_word(column, words)}>{escape(title)}</th>'
        for column, title in enumerate(head)
    )
    lines: list[str] = []
    for rank, cells in rows:
        row = "".join(
            f"<td{_word(column, words)}{_value(cell)}>{cell.html}</td>"
            for column, cell in enumerate(cells)
        )
        lines.append(f"<tr{_attributes({'of': rank})}>{row}</tr>")
    return (
        f'<div class="scroll"><table class="sortable"><caption>{escape(caption)}</caption>\n'
        f"<thead><tr>{header}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _word(column: int, words: Collection[int]) -> str:
    return ' class="word"' if column in words else ""


def _value(cell: Cell) -> str:
    return "" if cell.value is None else f' data-value="{cell.value}"'


def _attributes(values: Mapping[str, object]) -> str:
    """As data attributes, without those that are empty."""
    return "".join(
        f' data-{name}="{escape(str(value))}"' for name, value in values.items() if value != ""
    )


def go(shown: str, rank: int, report: Report, interval: Interval, **values: object) -> str:
    """A button that shows an interval of a rank in the timeline."""
    start = report.window[0]
    where = {"rank": rank, "from": interval[0] - start, "to": interval[1] - start, **values}
    return f'<button class="go"{_attributes(where)}>{escape(shown)}</button>'


# ---- what a window's time went into ----


def parts(totals: Totals) -> tuple[tuple[str, str, int], ...]:
    """What the span is cut in: class of its colour, name, ns. They add up to the span."""
    return (
        ("compute", "compute only", totals.compute - totals.overlapped),
        ("overlapped", "compute and communication at once", totals.overlapped),
        ("exposed", "exposed communication", totals.exposed),
        ("copy", "copies alone", totals.span - totals.compute - totals.exposed - totals.idle),
        ("idle", "idle", totals.idle),
    )


def bar(totals: Totals) -> str:
    """The parts of the span as one bar."""
    done = 0
    drawn: list[str] = []
    for kind, name, length in parts(totals):
        if length:
            left, wide = 100 * done / totals.span, 100 * length / totals.span
            drawn.append(
                f'<rect class="{kind}" x="{left:.3f}%" width="{wide:.3f}%" height="100%">'
                f"<title>{escape(name)}: {length / 1e6:,.3f} ms, {wide:.1f} %</title></rect>"
            )
        done += length
    shares = ", ".join(
        f"{name} {length / totals.span:.1%}" for _, name, length in parts(totals) if length
    )
    return f'<svg class="bar" role="img" aria-label="{escape(shares)}">{"".join(drawn)}</svg>'


def totals_table(names: Sequence[str], reports: Sequence[Report]) -> str:
    """The six numbers of each rank, with waiting and copies."""
    rows: list[tuple[str, list[Cell]]] = []
    for rank, (name, report) in enumerate(zip(names, reports, strict=True)):
        t = report.totals
        button = Cell(go(name, rank, report, report.window), rank)
        picture = Cell(bar(t), t.exposed / t.span if t.span else 0)
        times = (t.span, t.compute, t.comm, t.overlapped, t.idle)
        waited = waiting(t.waiting, _waiting_known(report))
        exposed = [time(t.exposed), share(t.exposed, t.span)]
        rows.append(("", [button, picture, *exposed, *map(time, times), waited, time(t.copy)]))
    head = ("", "where its time went", "exposed", "share of span", "span", "compute")
    more = ("communication", "overlapped", "idle", "waiting", "copies")
    return table("Unions of intervals, in ms", (*head, *more), rows, words=(0, 1))


def _waiting_known(report: Report) -> bool:
    """Whether any kernel that only waits ran, or nothing that could wait."""
    waits = any(k.group == COMMUNICATION and k.role == WAIT for k in report.kernels)
    return waits or not report.totals.comm


# ---- phases, stretches, kernels ----


def phases_table(names: Sequence[str], reports: Sequence[Report], *, by_layer: bool) -> str:
    """Phases of all ranks, over all layers or one by one."""
    head = ["phase", "layer"] if by_layer else ["phase"]
    several = len(names) > 1
    shown = [p for r in reports for p in (r.layers if by_layer else r.phases)]
    sized = any(phase.sent_bytes is not None for phase in shown)
    rated = any(phase.algorithm_bytes is not None for phase in shown)
    rows: list[tuple[str, list[Cell]]] = []
    for rank, (name, report) in enumerate(zip(names, reports, strict=True)):
        for phase in report.layers if by_layer else report.phases:
            layer = "" if phase.layer is None else phase.layer
            where = {"phase": phase.name or "none", "layer": layer}
            label = (phase.name or "no phase") + (" (inferred)" if phase.inferred else "")
            cells = [Cell(go(label, rank, report, phase.window, **where))]
            cells += [number(phase.layer)] if by_layer else []
            cells += [text(name)] if several else []
            cells += _phase_cells(phase, sized, rated)
            rows.append((str(rank) if several else "", cells))
    head += ["rank"] if several else []
    words = range(len(head))
    head += ["runs", "communication", "exposed", "share exposed", "waiting", "compute"]
    head += ["MB sent", "GB/s"] if sized else []
    head += _RATES if rated else []
    words = (*words, len(head))
    return table("Times in ms", [*head, "ran behind its communication"], rows, words)


def _phase_cells(phase: Phase, sized: bool, rated: bool) -> list[Cell]:
    cells = [number(phase.count), time(phase.comm), time(phase.exposed)]
    waited = waiting(phase.waiting, phase.waiting_known or not phase.comm)
    cells += [share(phase.exposed, phase.comm), waited, time(phase.compute)]
    if sized:
        sent = phase.sent_bytes
        cells.append(number(sent, "" if sent is None else f"{sent / 1e6:,.1f}"))
        cells.append(_rate(sent, phase.transfer))
    if rated:
        cells.append(_rate(phase.algorithm_bytes, phase.transfer))
        cells.append(_rate(phase.bus_bytes, phase.transfer))
    most = sorted(phase.behind.items(), key=lambda item: -item[1])
    listed = [f"{name or 'no phase'} {ns / 1e6:,.3f}" for name, ns in most[:_MOST_BEHIND]]
    rest = sum(ns for _, ns in most[_MOST_BEHIND:])
    listed += [f"others {rest / 1e6:,.3f}"] if rest else []
    return [*cells, Cell(escape(", ".join(listed)), sum(phase.behind.values()))]


def _rate(num_bytes: int | None, ns: int) -> Cell:
    """GB/s."""
    rate = None if num_bytes is None or ns <= 0 else num_bytes / ns
    return number(rate, "" if rate is None else f"{rate:,.1f}")


def stretches_table(names: Sequence[str], reports: Sequence[Report]) -> str:
    """The longest exposed stretches of all ranks together."""
    found = [(stretch, rank) for rank, report in enumerate(reports) for stretch in report.exposed]
    found.sort(key=lambda item: item[0].interval[0] - item[0].interval[1])
    several = len(names) > 1
    rows: list[tuple[str, list[Cell]]] = []
    for stretch, rank in found[:MOST_STRETCHES]:
        report = reports[rank]
        start, end = stretch.interval
        cells = [Cell(go(_label(stretch), rank, report, stretch.interval, exposed=1))]
        cells += [text(names[rank])] if several else []
        cells += [text(stretch.next_phase or "nothing named"), time(end - start)]
        known = _waits_known(report, stretch.phase)
        waited = waiting(stretch.waiting, known)
        cells += [waited, share(end - start, report.totals.exposed)]
        rows.append((str(rank) if several else "", [*cells, time(start - report.window[0])]))
    head = ["phase", *(["rank"] if several else []), "computed next"]
    words = range(len(head))
    caption = f"The {len(rows):,} longest of {len(found):,}; times in ms"
    head += ["exposed", "of it waiting", "share of all", "begins at"]
    return table(caption, head, rows, words)


def _waits_known(report: Report, phase: str) -> bool:
    found = (of.waiting_known for of in report.phases if of.name == phase)
    return next(found, _waiting_known(report))


def _label(stretch: Exposed) -> str:
    layer = "" if stretch.layer is None else f" layer {stretch.layer}"
    return f"{stretch.phase or 'no phase'}{layer}"


def kernels_table(names: Sequence[str], reports: Sequence[Report], *, unknown: bool) -> str:
    """Kernels with most time, or those that no rule knows."""
    several = len(names) > 1
    rated = any(k.algorithm_bytes is not None for r in reports for k in r.kernels)
    rows: list[tuple[str, list[Cell]]] = []
    for rank, (name, report) in enumerate(zip(names, reports, strict=True)):
        kernels = report.unknown if unknown else report.kernels
        whole = sum(kernel.busy for kernel in report.kernels)
        for kernel in kernels if unknown else kernels[:MOST_KERNELS]:
            cells = [Cell(f'<span class="kernel">{escape(kernel.name)}</span>')]
            cells += [text(name)] if several else []
            cells += [text(" ".join(filter(None, (kernel.library, kernel.role or kernel.group))))]
            cells += [number(kernel.count), time(kernel.busy), share(kernel.busy, whole)]
            cells += [_blocks(kernel)]
            if rated:
                moved = (kernel.algorithm_bytes, kernel.bus_bytes)
                cells += [_rate(num_bytes, kernel.busy) for num_bytes in moved]
            rows.append((str(rank) if several else "", cells))
    head = ["kernel", *(["rank"] if several else []), "kind"]
    words = range(len(head))
    head += ["count", "sum of durations", "share", "blocks", *(_RATES if rated else [])]
    return table("Times in ms", head, rows, words)


def _blocks(kernel: Kernels) -> Cell:
    if kernel.blocks is None:
        return number(None)
    least, most = kernel.blocks
    return number(most, f"{least:,}" if least == most else f"{least:,} to {most:,}")
