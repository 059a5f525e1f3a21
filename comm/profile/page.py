"""What a profile shows, as one HTML file: timeline, exposed parts, tables. No network, no library.

`page.js` draws what `page_data` gives it; every number is also in a table, which needs no script.
The page forbids itself everything from outside, and all scripts and styles but its own.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files

from .classify import RULES, Rule
from .comparison import Comparison
from .notes import listed, merged
from .page_across import comparison_section, ranks_section, sentences
from .page_data import MOST_RANKS, Timeline, timeline
from .page_ran import ran_on
from .page_tables import kernels_table, phases_table, stretches_table, totals_table
from .phases import PHASE_PATTERN
from .ranks import RanksReport
from .report import Report
from .trace import Trace

_HOW = (
    "Wheel or two fingers zoom, dragging moves; a click keeps what is told, a double click zooms "
    "there. Keys: + and - zoom, left and right move, up and down change the row, comma and full "
    "stop go from bar to bar, n and p to the next exposed stretch and back, 0 shows all."
)
_MERGED = "neighbours of one phase that together are shorter than"


def to_html(
    traces: Sequence[Trace],
    reports: Sequence[Report],
    *,
    title: str,
    ranks: RanksReport | None = None,
    comparison: Comparison | None = None,
    rules: Sequence[Rule] = RULES,
    phase_pattern: str = PHASE_PATTERN,
) -> str:
    """The page.

    Args:
        traces: one a rank; the picture shows the first 64.
        reports: `analyse` of each of them, in the same order.
        title: of the page.
        ranks: what the traces show together.
        comparison: of the run with its simulation.
        rules, phase_pattern: that the reports were made with.

    Raises:
        ValueError: there is no trace, or not one report for each.
    """
    if not traces or len(traces) != len(reports):
        raise ValueError(
            f"a page needs one report for each trace, and at least one: {len(traces)} traces, "
            f"{len(reports)} reports"
        )
    names = _names(reports, ranks)
    few = slice(MOST_RANKS)
    both = zip(traces[few], reports[few], strict=True)
    drawn = timeline(
        reports[few],
        (ran_on(trace, report, rules, phase_pattern) for trace, report in both),
        names[few],
        _offsets(traces[few], ranks),
    )
    style = _text_of("page.css")
    script = "".join(map(_text_of, ("page.js", "page_draw.js", "page_tables.js")))
    body = "\n".join(
        [
            f"<h1>{escape(title)}</h1>",
            f"<p>{escape(_summary(names, reports))}</p>",
            sentences(_lacking(names, traces, ranks), "loud"),
            sentences(_by_rank(names, [report.missing for report in reports]), "plain"),
            "<section><h2>Where the time went</h2>",
            f"{_key()}{totals_table(names, reports)}</section>",
            _picture(drawn, reports),
            _phases(names, reports),
            f"<section><h2>Exposed stretches</h2>\n{stretches_table(names, reports)}</section>",
            ranks_section(ranks) if ranks else "",
            comparison_section(comparison) if comparison else "",
            _kernels(names, reports),
        ]
    )
    data = json.dumps(drawn, separators=(",", ":"))
    html = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"{_policy(style, script)}\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n"
        f'<script type="application/json" id="data">{_in_script(data)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )
    # JSON may hold halves of characters in names, which no file in UTF-8 can.
    return html.encode("utf-8", "replace").decode("utf-8")


def _text_of(name: str) -> str:
    return (files(__spec__.parent) / name).read_text(encoding="utf-8")


def _in_script(data: str) -> str:
    """JSON that cannot end the element that it stands in."""
    return data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(style: str, script: str) -> str:
    """A content security policy that allows the page's own style and script and nothing else."""
    hashes = [
        f"'sha256-{b64encode(sha256(t.encode()).digest()).decode()}'" for t in (style, script)
    ]
    policy = f"default-src 'none'; style-src {hashes[0]}; script-src {hashes[1]}"
    return f'<meta http-equiv="Content-Security-Policy" content="{policy}">'


def _names(reports: Sequence[Report], ranks: RanksReport | None) -> list[str]:
    """What each rank is called: the comparison may have numbered those that do not say."""
    numbers = {rank.source: rank.rank for rank in ranks.ranks} if ranks else {}
    found = [numbers.get(report.source, report.rank) for report in reports]
    return [
        f"trace {place}" if number is None else f"rank {number}"
        for place, number in enumerate(found, 1)
    ]


def _offsets(traces: Sequence[Trace], ranks: RanksReport | None) -> list[int]:
    """What lays the clocks on one another: by collectives if they tell it for all, else by day."""
    if ranks is not None:
        clocks = {clock.rank: clock.offset for clock in ranks.clocks}
        offsets = {r.source: clocks[r.rank] for r in ranks.ranks if r.rank in clocks}
        if all(trace.source in offsets for trace in traces):
            return [offsets[trace.source] for trace in traces]
    return [trace.clock_ns for trace in traces]


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0.0%"


def _summary(names: Sequence[str], reports: Sequence[Report]) -> str:
    worst = max(range(len(reports)), key=lambda rank: reports[rank].totals.exposed)
    t = reports[worst].totals
    where = f"{names[worst]}, of {len(names)} the one with most" if len(names) > 1 else names[worst]
    if t.comm:
        lines = [
            f"Exposed communication is {_percent(t.exposed, t.span)} of {t.span / 1e6:,.3f} ms on "
            f"{where}: {t.exposed / 1e6:,.3f} of {t.comm / 1e6:,.3f} ms of communication "
            f"({_percent(t.overlapped, t.comm)} of it is hidden behind computation)."
        ]
    else:
        lines = [f"Nothing communicates in {t.span / 1e6:,.3f} ms on {where}."]
    split = reports[worst].sm_split
    if split is not None and split.comm is not None:
        wide = f", wide computation with {split.compute}" if split.compute else ""
        total = f"; the GPU has {split.num_sms} SMs" if split.num_sms else ""
        lines.append(f"Communication mostly runs with {split.comm} blocks{wide}{total}.")
    return " ".join(lines)


def _lacking(names: Sequence[str], traces: Sequence[Trace], ranks: RanksReport | None) -> list[str]:
    """That traces break off or are not there; the sentences below say what that means."""
    broken = [name for name, trace in zip(names, traces, strict=True) if trace.broken]
    found = [f"Incomplete: the trace of {listed(broken)} breaks off."] if broken else []
    absent = [f"rank {rank}" for rank in ranks.missing_ranks] if ranks else []
    return [*found, f"Incomplete: there is no trace of {listed(absent)}."] if absent else found


def _by_rank(names: Sequence[str], lines: Sequence[Iterable[str]]) -> list[str]:
    """Sentences of each rank; those that all have alike come once."""
    first: dict[str, list[str]] = {}
    for name, of_rank in zip(names, lines, strict=True):
        for line in of_rank:
            first.setdefault(line, []).append(name)
    return merged(
        line if len(of) == len(names) else f"{', '.join(of)}: {line}" for line, of in first.items()
    )


_KEY = (
    ("compute", "compute only"),
    ("overlapped", "compute and communication at once"),
    ("exposed", "exposed communication"),
    ("copy", "copies alone"),
    ("idle", "idle"),
)


def _swatch(kind: str, text: str) -> str:
    return (
        f'<li><svg viewBox="0 0 26 14" aria-hidden="true"><rect class="{kind}" width="26" '
        f'height="14"/></svg>{escape(text)}</li>'
    )


def _key() -> str:
    return f'<ul class="legend">{"".join(_swatch(*both) for both in _KEY)}</ul>\n'


def _picture(drawn: Timeline, reports: Sequence[Report]) -> str:
    """The canvas with its tools; the script adds the legend of phases, which has its colours."""
    notes: list[str] = []
    ranks = drawn["ranks"]
    if len(reports) > len(ranks):
        notes.append(f"The picture has the first {len(ranks)} of {len(reports)} ranks.")
    if not drawn["aligned"]:
        notes.append("The ranks' clocks have no time in common: each begins at 0.")
    coarse = max((rank["resolution"] for rank in ranks), default=0)
    if coarse:
        notes.append(
            f"To keep the page small, {_MERGED} {coarse / 1000:,.3g} µs are drawn as one. The "
            "tables are exact."
        )
    deeper = sum(rank["deeper"] for rank in ranks)
    if deeper:
        notes.append(f"{deeper:,} activities that run beside many others are not drawn.")
    return (
        '<section><h2>Timeline</h2>\n<div class="tools">'
        '<button id="in" aria-label="zoom in">+</button>'
        '<button id="out" aria-label="zoom out">−</button><button id="reset">show all</button>'
        '<button id="previous">previous exposed</button><button id="next">next exposed</button>'
        '<span id="where" role="status"></span></div>\n'
        '<ul class="legend" id="legend"></ul>\n'
        '<div class="view"><canvas id="timeline" tabindex="0" role="img" '
        'aria-label="What computes, communicates and is exposed on each rank over time. '
        f'{_HOW} The tables have the numbers."></canvas>'
        '<div id="tip" role="status" hidden></div></div>\n'
        '<noscript><p class="note">The timeline needs JavaScript, the tables do not.</p>'
        "</noscript>\n"
        f'<p class="note how">{_HOW}</p>\n{sentences(notes, "note")}</section>'
    )


def _phases(names: Sequence[str], reports: Sequence[Report]) -> str:
    layers = any(report.layers for report in reports)
    chooser = ""
    if len(names) > 1:
        options = "".join(
            f'<option value="{rank}">{escape(name)}</option>' for rank, name in enumerate(names)
        )
        chooser = (
            '<p class="tools"><label>tables of <select id="chosen">'
            f'<option value="">all ranks</option>{options}</select></label></p>\n'
        )
    more = (
        "<details><summary>By phase and layer</summary>\n"
        f"{phases_table(names, reports, by_layer=True)}</details>"
        if layers
        else ""
    )
    return (
        f"<section><h2>Phases</h2>\n{chooser}{phases_table(names, reports, by_layer=False)}\n"
        f"{more}</section>"
    )


def _kernels(names: Sequence[str], reports: Sequence[Report]) -> str:
    unknown = (
        f"<h3>Known to no rule</h3>\n{kernels_table(names, reports, unknown=True)}\n"
        if any(report.unknown for report in reports)
        else ""
    )
    return (
        f"<section><h2>Kernels</h2>\n{unknown}<details><summary>Those with most time</summary>\n"
        f"{kernels_table(names, reports, unknown=False)}</details></section>"
    )
