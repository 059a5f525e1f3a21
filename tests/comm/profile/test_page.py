"""The page of a profile: it holds what the reports say, and needs nothing else."""

from __future__ import annotations

import json
import re
import tomllib
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest

from counterflow.comm.profile.analyse import analyse
from counterflow.comm.profile.comparison import (
    ActionTime,
    Comparison,
    KindTime,
    Part,
    PhaseTime,
    RankDifference,
)
from counterflow.comm.profile.page import to_html
from counterflow.comm.profile.page_data import Timeline
from counterflow.comm.profile.page_tables import parts
from counterflow.comm.profile.ranks import compare_ranks
from counterflow.comm.profile.trace import Activity, Annotation, Trace
from tests.comm.profile.constructed import Step, traces_of

STEPS = (
    Step([3000, 5000, 4000], 2000, "dispatch(F) layer 0", "attn(F) layer 0"),
    Step([2500, 1000, 6000], 1500, "combine(F) layer 0", "mlp(F) layer 0"),
    Step([700, 900, 800], 4000, "dispatch(F) layer 1", "attn(F) layer 1"),
)


class Read(HTMLParser):
    """Tags with their attributes, each table's rows of (text, value), scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[tuple[str, str | None]]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.text = ""
        self.open = ""
        self.in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = tag
        self.in_cell = self.in_cell or tag in ("td", "th")
        if tag in self.inside:
            self.inside[tag].append("")
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(("", dict(attrs).get("data-value")))

    def handle_endtag(self, tag: str) -> None:
        self.open = ""
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.open in self.inside:
            self.inside[self.open][-1] += data
            return
        self.text += data
        if self.in_cell:
            text, value = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = (text + data, value)

    @property
    def data(self) -> Timeline:
        return json.loads(self.inside["script"][0])

    def table(self, *head: str) -> list[dict[str, tuple[str, str | None]]]:
        """The rows of the first table that has these columns, by column."""
        for first, *rows in self.tables:
            names = [name.strip() for name, _ in first]
            if set(head) <= set(names):
                return [dict(zip(names, row, strict=True)) for row in rows]
        raise AssertionError(f"no table has {head}")


def page_of(traces: list[Trace], **more: object) -> Read:
    reports = [analyse(trace) for trace in traces]
    return Read(to_html(traces, reports, title="a run", **more))  # pyright: ignore[reportArgumentType]


def bad_names() -> list[Trace]:
    bad = "</script><script>alert('\"&')</script>"
    trace = traces_of(STEPS)[0]
    activities = (*trace.activities, Activity(bad, 40_000_000, 40_001_000, lane=bad))
    return [replace(trace, activities=activities, missing=(bad,), source=bad)]


def test_each_number_of_each_rank_stands_in_the_table_to_the_nanosecond() -> None:
    traces = traces_of(STEPS)
    rows = page_of(traces).table("span", "exposed", "idle")
    assert len(rows) == 3
    columns = {
        "span": "span",
        "compute": "compute",
        "communication": "comm",
        "overlapped": "overlapped",
        "exposed": "exposed",
        "idle": "idle",
        "waiting": "waiting",
        "copies": "copy",
    }
    for row, trace in zip(rows, traces, strict=True):
        totals = analyse(trace).totals
        for column, field in columns.items():
            text, value = row[column]
            ns = getattr(totals, field)
            if column == "waiting":  # nothing ran that only waits
                assert (text, value) == ("–", "-1")
                continue
            assert value == str(ns)
            assert float(text.replace(",", "")) == pytest.approx(ns / 1e6, abs=0.0005)


def test_each_phase_of_each_rank_stands_in_the_tables_over_all_layers_and_by_layer() -> None:
    traces = traces_of(STEPS)
    page = page_of(traces)
    reports = [analyse(trace) for trace in traces]
    for column, phases in (
        ("runs", [phase for report in reports for phase in report.phases]),
        ("layer", [phase for report in reports for phase in report.layers]),
    ):
        rows = page.table(column, "phase", "rank", "share exposed")
        found = [
            tuple(row[name][1] for name in ("compute", "communication", "waiting", "exposed"))
            for row in rows
        ]
        # Nothing ran that only waits, so where something communicated waiting is not known.
        assert found == [
            tuple(map(str, (p.compute, p.comm, -1 if p.comm else 0, p.exposed))) for p in phases
        ]
        assert [row["phase"][0] for row in rows] == [phase.name for phase in phases]


def test_waiting_that_is_known_and_bandwidths_stand_in_the_tables() -> None:
    trace = traces_of(STEPS)[0]
    report = analyse(trace)
    first, *others = [phase for phase in report.phases if phase.comm]
    told = replace(
        first, waiting=1000, waiting_known=True, algorithm_bytes=first.comm - 1000, bus_bytes=0
    )
    report = replace(report, phases=(told, *others))
    rows = Read(to_html([trace], [report], title="a run")).table("runs", "phase", "busbw, GB/s")
    assert (rows[0]["waiting"], rows[0]["algbw, GB/s"][0]) == (("0.001", "1000"), "1.0")
    assert rows[1]["waiting"] == ("–", "-1")
    assert rows[1]["algbw, GB/s"] == ("", "-1")
    assert "algbw" not in page_of([trace]).text


def test_what_breaks_off_or_is_not_there_is_said_at_the_top() -> None:
    first, second, _ = traces_of(STEPS)
    traces = [replace(first, broken="its text ends"), second]
    ranks = compare_ranks(traces, [analyse(trace) for trace in traces])
    text = page_of(traces, ranks=ranks).text
    top = text[: text.index("Where the time went")]
    assert "Incomplete: the trace of rank 0 breaks off." in top
    assert "Incomplete: there is no trace of rank 2." in top
    assert "Incomplete" not in page_of([first, second]).text


def test_the_parts_of_the_bar_add_up_to_the_span() -> None:
    for trace in traces_of(STEPS):
        totals = analyse(trace).totals
        assert sum(length for _, _, length in parts(totals)) == totals.span
        assert all(length >= 0 for _, _, length in parts(totals))


def test_exposed_stretches_are_listed_the_longest_first() -> None:
    traces = traces_of(STEPS)
    rows = page_of(traces).table("computed next")
    lengths = [int(row["exposed"][1] or "") for row in rows]
    expected = [
        stretch.interval[1] - stretch.interval[0]
        for trace in traces
        for stretch in analyse(trace).exposed
    ]
    assert lengths == sorted(expected, reverse=True)
    assert sum(lengths) == sum(analyse(trace).totals.exposed for trace in traces)


def test_the_page_needs_nothing_from_outside() -> None:
    html = to_html(traces := traces_of(STEPS), [analyse(trace) for trace in traces], title="run")
    page = Read(html)
    assert not re.search(r"https?://", html)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base", "form")
        assert not {"src", "href", "action", "style"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    outside = r"\bimport\b|fetch\(|XMLHttp|innerHTML|\beval\(|Function\(|url\("
    assert not re.search(outside, page.inside["script"][1] + page.inside["style"][0])


def test_the_page_allows_its_own_script_and_style_and_no_other() -> None:
    page = page_of(traces_of(STEPS))
    policy = next(a["content"] or "" for tag, a in page.tags if "http-equiv" in a)

    def hashed(text: str) -> str:
        return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"

    style, script = hashed(page.inside["style"][0]), hashed(page.inside["script"][1])
    assert policy == f"default-src 'none'; style-src {style}; script-src {script}"


def test_names_are_escaped_wherever_they_come() -> None:
    bad = "</script><script>alert('\"&')</script>"
    traces = bad_names()
    reports = [analyse(trace) for trace in traces]
    html = to_html(traces, reports, title=bad)
    assert "<script>alert" not in html
    page = Read(html)
    assert len(page.inside["script"]) == 2
    assert bad in [kernel[0] for kernel in page.data["kernels"]]  # pyright: ignore[reportIndexIssue]
    # The title, the heading, what is missing, and the kernel that no rule knows.
    assert page.text.count(bad) >= 4


def test_a_name_with_half_a_character_can_be_written() -> None:
    trace = bad_names()[0]
    halved = trace.activities[-1]._replace(name="half \ud800")
    trace = replace(trace, activities=(*trace.activities[:-1], halved))
    html = to_html([trace], [analyse(trace)], title="a run")
    assert "half ?" in html.encode("utf-8").decode("utf-8")


def test_the_page_can_be_read_without_its_script() -> None:
    traces = traces_of(STEPS)
    page = page_of(traces)
    worst = max((analyse(trace).totals for trace in traces), key=lambda totals: totals.exposed)
    assert f"{worst.exposed / worst.span:.1%} of {worst.span / 1e6:,.3f} ms" in page.text
    names = [tag for tag, _ in page.tags]
    assert "noscript" in names
    canvas = next(attributes for tag, attributes in page.tags if tag == "canvas")
    assert canvas["tabindex"] == "0"
    assert "The tables have the numbers" in (canvas["aria-label"] or "")


def test_what_is_missing_comes_once_where_all_ranks_miss_it_and_with_ranks_otherwise() -> None:
    first, *others = (replace(trace, missing=("no sizes",)) for trace in traces_of(STEPS))
    page = page_of([replace(first, missing=("no sizes", "cut off")), *others])
    assert page.text.count("no sizes") == 1
    assert "rank 0: cut off" in page.text
    assert "rank 0, rank 1" not in page.text


def test_kernels_that_no_rule_knows_have_their_own_table() -> None:
    page = page_of(bad_names())
    assert "Known to no rule" in page.text
    rows = page.table("kernel", "sum of durations")
    assert [row["sum of durations"][1] for row in rows] == ["1000"]
    assert "Known to no rule" not in page_of(traces_of(STEPS)).text


def test_the_section_across_ranks_has_transfer_and_waiting_of_each() -> None:
    traces = traces_of(STEPS)
    ranks = compare_ranks(traces, [analyse(trace) for trace in traces])
    page = page_of(traces, ranks=ranks)
    rows = page.table("rank", "made others wait", "arrived last", "transfer")
    assert [row["transfer"][1] for row in rows] == [str(r.share.transfer) for r in ranks.ranks]
    assert [row["waited"][1] for row in rows] == [str(r.share.skew) for r in ranks.ranks]
    assert f"{ranks.skew / 1e6:,.3f} ms of waiting" in page.text
    for straggler in ranks.stragglers:
        assert straggler.sentence in page.text
    assert "Across ranks" not in page_of(traces).text


def comparison() -> Comparison:
    waits = Part("pair", "waiting", "combine(F)", 900, 200)
    works = Part("F", "computing", "mlp(F)", 1100, 1000)
    return Comparison(
        source="step <1>.json",
        schedule="dualpipe",
        unit="ms",
        ns_per_unit=1e6,
        fitted=False,
        steps=2,
        actions=(
            ActionTime(0, "0F0", "F", "0", 1100, 1000, (0, 0)),
            ActionTime(0, "(0F1;1B0)", "pair", "0;1", 4000, 2000, (1200, 1000)),
        ),
        kinds=(KindTime("F", "0", 1, 1100, 1000), KindTime("pair", "0;1", 1, 4000, 0)),
        phases=(PhaseTime("mlp(F)", "F", "compute", 4, 1100, 0, 0, None, None),),
        together=True,
        ranks=(RankDifference(0, 0, "ProfilerStep#1", 2000, 1200, (waits, works)),),
        pair=None,
        findings=("Most of it is <waiting>.",),
        missing=("No sends.",),
    )


def test_the_section_beside_the_simulation_has_what_explains_the_difference() -> None:
    value = comparison()
    page = page_of(traces_of(STEPS), comparison=value)
    assert "The makespan, of rank 0: 0.002 ms measured, 0.001 ms simulated." in page.text
    for sentence in (*value.findings, *value.missing):
        assert sentence in page.text
    parts = page.table("part", "difference")
    assert [row["difference"][1] for row in parts] == ["700", "100"]
    assert [row["of the whole"][0] for row in parts] == ["87.5%", "12.5%"]
    actions = page.table("action", "began")
    assert [row["action"][0] for row in actions] == ["(0F1;1B0)", "0F0"]
    kinds = page.table("action", "stage", "ratio")
    assert [row["ratio"][0] for row in kinds] == ["1.100", ""]
    assert page.table("phase", "lane")[0]["simulated"] == ("", "-1")


def test_ranks_that_collectives_lay_on_one_clock_are_drawn_on_it() -> None:
    apart = traces_of(STEPS, offsets=[0, 7_000_000_000, -300_000_000])
    ranks = compare_ranks(apart, [analyse(trace) for trace in apart])
    data = page_of(apart, ranks=ranks).data
    assert data["aligned"]
    assert [rank["end"] for rank in data["ranks"]] == [data["end"]] * 3
    page = page_of(apart)
    assert not page.data["aligned"]
    assert [rank["start"] for rank in page.data["ranks"]] == [0, 0, 0]
    assert "clocks have no time in common" in page.text


def test_a_rank_that_is_not_told_is_called_by_its_place() -> None:
    traces = [replace(trace, rank=None) for trace in traces_of(STEPS)]
    assert [rank["name"] for rank in page_of(traces).data["ranks"]] == [
        "trace 1",
        "trace 2",
        "trace 3",
    ]


def test_a_run_without_communication_says_so() -> None:
    trace = traces_of(STEPS)[0]
    only = tuple(activity for activity in trace.activities if "gemm" not in activity.name)
    only = tuple(activity for activity in only if "dispatch" not in activity.name)
    page = page_of([replace(trace, activities=only)])
    assert "Nothing communicates in" in page.text


def test_a_page_without_traces_or_reports_is_refused() -> None:
    traces = traces_of(STEPS)
    with pytest.raises(ValueError, match="one report for each trace"):
        to_html([], [], title="")
    with pytest.raises(ValueError, match="3 traces, 1 reports"):
        to_html(traces, [analyse(traces[0])], title="")


def test_a_run_on_cpus_is_drawn_as_pieces_of_its_threads() -> None:
    traces = traces_of(STEPS, on_gpu=False)
    # What is nested in an operator is drawn with it, once.
    outer = traces[0].activities[0]
    inner = outer._replace(name="aten::add", start=outer.start + 10, end=outer.end - 10)
    waits = Annotation("wait dispatch(F) layer 0", outer.end, outer.end + 2, outer.launcher)
    nested = replace(
        traces[0],
        activities=(outer, inner, *traces[0].activities[1:]),
        annotations=(*traces[0].annotations, waits),
    )
    rows = page_of([nested]).data["ranks"][0]["rows"]
    totals = analyse(nested).totals
    assert [sum(lane["time"]) for lane in rows["compute"]] == [totals.compute]
    assert [sum(lane["time"]) for lane in rows["communication"]] == [totals.comm]


def test_each_colour_that_is_used_exists_in_light_and_dark() -> None:
    page = page_of(traces_of(STEPS))
    style, script = page.inside["style"][0], page.inside["script"][1]
    light, dark = (
        set(re.findall(r"--([\w-]+):", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.S)
    )
    assert light == dark
    used = set(re.findall(r"var\(--([\w-]+)\)", style))
    names = re.search(r"const names = \[(.*?)\.\.\.", script, re.S)
    assert names is not None
    used |= set(re.findall(r'"([\w-]+)"', names[1])) | {f"c{number}" for number in range(8)}
    assert used <= light


def test_the_files_of_the_page_are_in_the_wheel() -> None:
    root = Path(__file__).parents[3]
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    kept = settings["tool"]["setuptools"]["package-data"].get("counterflow.comm.profile", [])
    folder = root / "comm" / "profile"
    found = {path.name for pattern in kept for path in folder.glob(pattern)}
    assert {"page.js", "page_draw.js", "page_tables.js", "page.css"} <= found
