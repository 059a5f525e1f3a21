"""The report of a training run: right numbers, nothing from outside, nothing lost without plots."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from counterflow.launch import report
from counterflow.launch.conclusion import conclude
from counterflow.launch.folder import RESULT
from counterflow.launch.palette import DARK, LIGHT
from counterflow.launch.report import to_html, write_report
from counterflow.launch.run_data import RunData, idle_share, makespan_ms, read_run, read_timeline
from counterflow.parallel.schedule import Action, Op, build
from counterflow.parallel.schedule.text_form import to_text
from counterflow.parallel.simulate import Costs, simulate

COSTS = Costs(F=10, I=11, W=9, B=21, pair=27)
WAIT_MS = 2.0


def measured_timeline(name: str = "dualpipe", ranks: int = 2, microbatches: int = 8) -> Any:
    """A step as simulated with COSTS, but every step of rank 1 starts with a wait."""
    schedule = build(name, ranks=ranks, microbatches=microbatches)
    rows = [
        [
            {
                "action": str(span.step),
                "start_ms": span.start + 5 - (WAIT_MS if rank == 1 else 0),
                "end_ms": span.end + 5,
                "waited_ms": WAIT_MS if rank == 1 else 0,
            }
            for span in row
        ]
        for rank, row in enumerate(simulate(schedule, COSTS).spans)
    ]
    return {"schedule": to_text(schedule), "ranks": rows}


def make_run(parent: Path) -> Path:
    """A run's folder with everything in it."""
    folder = parent / "first <run> & more"
    folder.mkdir()
    lines: list[dict[str, Any]] = [
        {
            "kind": "train",
            "step": step,
            "loss": 5.5 - 0.02 * step,
            "main_loss": 5.4 - 0.02 * step,
            "tokens_per_second": 1000.0 + step,
            "max_vio": 0.5,
        }
        for step in range(1, 121)
    ]
    lines += [{"kind": "validation", "step": step, "loss": 5 - 0.02 * step} for step in (60, 120)]
    write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write(
        folder / "result.json",
        {
            "train_loss": 3.0,
            "validation_loss": 2.125,
            "unigram_entropy": 3.25,
            "tokens_per_second": 1060.5,
            "seconds": 61.2,
            "steps": 120,
            "world_size": 4,
            "mesh": {"pp": 2, "dp": 2, "ep": 2},
            "schedule": "<script>alert('x')</script>",
        },
    )
    write(folder / "config.toml", "")
    write(folder / "timeline.json", measured_timeline())
    write(
        folder / "load.json",
        {"layers": {"10": [10, 20, 30, 40], "2": [25, 25, 25, 25], "$3$": [0, 0, 0, 0]}},
    )
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder, to change and to report on."""
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with its report; only to be read."""
    folder = make_run(tmp_path_factory.mktemp("reported"))
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture
def html(reported: Path) -> str:
    return (reported / "report.html").read_text(encoding="utf-8")


def write(path: Path, content: object) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


class Page(HTMLParser):
    """What a browser would read: tags with their attributes, and the text outside of styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._texts: list[str] = []
        self._style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = self._style and tag != "style"

    def handle_data(self, data: str) -> None:
        if not self._style:
            self._texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self._texts))


def test_mfu_and_waits_are_told_where_they_were_measured(tmp_path: Path) -> None:
    lines = [
        {"kind": "train", "step": step, "tokens_per_second": 1e3, **more}
        for step, more in enumerate(
            (
                {"mfu": 0.3, "exposed_comm_percent": 10.0},
                {"mfu": 0.389, "exposed_comm_percent": 12.5},
                {"mfu": 0.5, "exposed_comm_percent": 30.0},
            ),
            start=1,
        )
    ]
    write(tmp_path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    page = to_html(read_run(tmp_path), None)
    assert "Model FLOPs utilisation: median 38.9%." in page
    assert "Rank 0 waited for other ranks in 12.5 % of a step (median)." in page
    unknown = [{**line, "mfu": None, "exposed_comm_percent": None} for line in lines]
    write(tmp_path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in unknown))
    page = to_html(read_run(tmp_path), None)
    assert "Tokens per second: median" in page
    assert "utilisation" not in page
    assert "waited" not in page


def test_the_page_holds_the_result_and_all_pictures(reported: Path, html: str) -> None:
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("svg") == 3
    for said in (
        "first <run> & more",
        "Validation loss 2.125 nats per token, 1.125 under the unigram entropy of 3.250",
        "mesh.pp 2",
        "tokens per second 1,060 tokens / s",
        "Tokens per second: median 1,060 , lowest 1,001 , highest 1,120",
        "unigram entropy 3.250",
    ):
        assert said.replace(" ,", ",") in page.text.replace(" ,", ","), said
    for name in ("loss", "timeline", "load"):
        assert ET.parse(reported / f"{name}.svg").getroot().tag.endswith("svg")
        assert (reported / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_needs_nothing_from_outside(html: str) -> None:
    for tag, attributes in Page(html).tags:
        assert tag not in ("script", "link", "img", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, name)
    assert not re.search(r"url\((?!#)|@import", html)


def test_ids_on_the_page_are_unique_and_references_find_them(html: str) -> None:
    ids = [a["id"] for _, a in Page(html).tags if "id" in a]
    assert len(ids) == len(set(ids)) > 10
    wanted = set(re.findall(r"""url\(#([^)]*)\)|href="#([^"]*)\"""", html))
    assert {first or second for first, second in wanted} <= set(ids)


def test_what_the_user_wrote_is_escaped(html: str) -> None:
    assert "<script" not in html
    assert "<title>first &lt;run&gt; &amp; more" in html
    assert "alert(&#x27;x&#x27;)" in html
    assert "layer $3$" in html  # not taken for a formula


def test_the_page_can_be_light_or_dark(html: str) -> None:
    assert LIGHT.keys() == DARK.keys()
    assert "prefers-color-scheme: dark" in html
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    used = set(re.findall(r"var\(--(\w+)\)", drawn))
    assert {"ink", "grid", "first", "second", "F", "B", "I", "W"} <= used <= LIGHT.keys()
    assert not any(colour in drawn for colour in LIGHT.values())


def test_two_reports_of_one_run_are_the_same(folder: Path, html: str) -> None:
    assert write_report(folder).read_text(encoding="utf-8") == html


def test_the_plan_is_the_simulation_with_measured_medians(folder: Path) -> None:
    timeline = read_run(folder).timeline
    assert timeline is not None
    assert timeline.name == "dualpipe"
    assert timeline.planned is not None
    # Waits are not part of what a step costs, so the plan is the simulation that was measured.
    expected = simulate(build("dualpipe", ranks=2, microbatches=8), COSTS)
    assert makespan_ms(timeline.planned) == pytest.approx(expected.makespan)
    assert idle_share(timeline.planned) == pytest.approx(expected.bubble_rate)
    for row, spans in zip(timeline.planned, expected.spans, strict=True):
        assert [bar.step for bar in row] == [span.step for span in spans]
        assert [bar.start_ms for bar in row] == pytest.approx([span.start for span in spans])


def test_the_plan_of_uneven_stages_has_each_stage_at_its_own_cost() -> None:
    schedule = build("1f1b", ranks=4, microbatches=8)
    costs = Costs(F=[1, 1, 1, 3], I=1, W=[2, 1, 1, 3])
    simulated = simulate(schedule, costs)
    data = {
        "schedule": to_text(schedule),
        "ranks": [
            [{"action": str(s.step), "start_ms": s.start, "end_ms": s.end} for s in row]
            for row in simulated.spans
        ],
    }
    timeline = read_timeline(data)
    assert timeline is not None
    assert timeline.planned == timeline.measured
    assert makespan_ms(timeline.measured) == simulated.makespan


def test_idle_counts_waits(folder: Path) -> None:
    timeline = read_run(folder).timeline
    assert timeline is not None
    expected = simulate(build("dualpipe", ranks=2, microbatches=8), COSTS)
    span = expected.makespan + WAIT_MS  # rank 1's first step begins with a wait
    assert makespan_ms(timeline.measured) == pytest.approx(span)
    assert idle_share(timeline.measured) == pytest.approx(1 - sum(expected.busy) / (2 * span))


def test_without_a_plan_the_measured_step_is_still_shown(folder: Path) -> None:
    data = measured_timeline()
    data["ranks"] = [[bar for bar in row if "W" not in bar["action"]] for row in data["ranks"]]
    write(folder / "timeline.json", data)
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert "The plan cannot be shown: no step such as " in text
    assert "measured:" in text
    assert "planned:" not in text


def test_a_schedule_that_cannot_be_read_does_not_hide_the_measured_step(folder: Path) -> None:
    write(folder / "timeline.json", {**measured_timeline(), "schedule": "rank 0: 0F0"})
    timeline = read_run(folder).timeline
    assert timeline is not None
    assert timeline.planned is None
    assert "timeline.json" in timeline.why_no_plan


def test_load_is_by_layer_with_its_max_vio(folder: Path) -> None:
    loads = read_run(folder).loads
    assert [load.layer for load in loads] == ["2", "10", "$3$"]
    assert loads[0].max_vio == 0
    assert loads[1].relative == (0.4, 0.8, 1.2, 1.6)
    assert loads[1].max_vio == pytest.approx(0.6)


def test_without_matplotlib_the_tables_stay_and_the_remedy_is_said(folder: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from counterflow.launch.report import write_report; write_report(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=60)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "pip install 'counterflow[plots]'" in page.text
    assert "svg" not in [tag for tag, _ in page.tags]
    assert not list(folder.glob("*.svg"))
    for said in ("validation loss 2.125", "60 3.8", "measured", "planned", "10 10 25 40 0.600"):
        assert said in page.text


def test_writing_a_report_needs_neither_torch_nor_pyplot(folder: Path) -> None:
    code = (
        "import sys; from counterflow.launch.report import write_report\n"
        "write_report(sys.argv[1])\n"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=60)


@pytest.mark.parametrize(
    "missing", ["metrics.jsonl", "result.json", "timeline.json", "load.json", "*.json*"]
)
def test_what_is_missing_is_left_out(folder: Path, missing: str) -> None:
    for path in list(folder.glob(missing)):
        path.unlink()
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    sections = {
        "metrics.jsonl": "Loss and speed",
        "result.json": "Validation loss 2.125",
        "timeline.json": "One step",
        "load.json": "Load of the experts",
    }
    for name, said in sections.items():
        assert (said in page.text) == (missing not in (name, "*.json*")), said


def test_what_was_out_of_the_ordinary_is_listed(folder: Path) -> None:
    """A run that skipped a batch, was stopped, and went on; a skipped step has no loss."""
    assert "Out of the ordinary" not in to_html(read_run(folder), None)
    lines = [
        {"kind": "train", "step": 121, "loss": None, "main_loss": None, "grad_norm": None},
        {"kind": "skip", "step": 121, "text": "loss is <nan>: the batch was skipped"},
        {"kind": "stop", "step": 121, "text": "stopped by SIGUSR1, saved"},
        {"kind": "resume", "step": 121, "text": "going on from the checkpoint of step 121"},
        {"kind": "save_failed", "step": 121},
        {"kind": "train", "step": 122, "loss": 2.0, "main_loss": 2.0, "tokens_per_second": 1001},
        {"kind": "skip", "step": 122, "text": "the norm is high: the batch was skipped"},
    ]
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        metrics.writelines(json.dumps(line) + "\n" for line in lines)
    run = read_run(folder)
    assert (len(run.train), len(run.validation), len(run.events)) == (122, 2, 5)
    plots = pytest.importorskip("counterflow.launch.plots")
    drawn = {"loss": plots.to_svg(plots.loss_figure(run))}
    text = Page(to_html(run, drawn)).text
    assert "Out of the ordinary skip 2, stop 1, resume 1, save failed 1." in text
    assert "121 skip loss is <nan>: the batch was skipped" in text
    assert "121 resume going on from the checkpoint of step 121" in text


def test_of_very_many_events_the_last_are_listed(folder: Path) -> None:
    lines = [{"kind": "skip", "step": step, "text": f"number {step}."} for step in range(1, 1001)]
    write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    text = Page(to_html(read_run(folder), None)).text
    assert "skip 1000." in text
    assert "The last 200" in text
    assert "number 801." in text
    assert "number 800." not in text


@pytest.fixture
def early(tmp_path: Path) -> Path:
    """The folder of a run without pictures, which take seconds."""
    write(tmp_path / "config.toml", "")
    return tmp_path


def concluded() -> dict[str, Any]:
    """A result as training makes it, of a run whose every last step was skipped."""
    return {
        "train_loss": None,
        "validation_loss": math.nan,
        "unigram_entropy": 3.25,
        "tokens_per_second": 1060.5,
        "seconds": 61.2,
        "steps": 120,
        "mesh": {"pp": 2},
        "traces": [],
    }


def test_a_run_that_is_lost_while_its_report_is_written_has_no_result(
    early: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report, "write_report", killed)
        with pytest.raises(KeyboardInterrupt):
            conclude(early, concluded())
    assert not (early / RESULT).exists()
    conclude(early, concluded())
    assert (early / RESULT).exists()


def test_the_report_at_the_end_is_the_one_that_is_written_again(
    early: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conclude(early, concluded())
    page = (early / "report.html").read_text(encoding="utf-8")
    assert "train loss" in page
    assert write_report(early).read_text(encoding="utf-8") == page
    assert "report.html" in capsys.readouterr().out


def test_a_result_is_strict_json(early: Path) -> None:
    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    conclude(early, concluded())
    result = json.loads((early / RESULT).read_text(encoding="utf-8"), parse_constant=refuse)
    assert result["validation_loss"] is result["train_loss"] is None
    assert not list(early.glob("*.part"))


def test_a_report_that_fails_does_not_take_the_result_with_it(
    early: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*given: object) -> None:
        raise OSError("no fonts")

    monkeypatch.setattr(report, "write_report", broken)
    conclude(early, concluded())
    assert (early / RESULT).exists()
    assert "no report: OSError: no fonts" in caplog.text


def test_half_a_last_line_of_a_killed_run_is_left_out(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        metrics.write('{"kind": "train", "st')
    assert len(read_run(folder).train) == 120


def test_losses_that_are_not_numbers_do_not_break_the_page(folder: Path) -> None:
    write(
        folder / "metrics.jsonl",
        '{"kind": "train", "step": 1, "loss": NaN, "tokens_per_second": NaN}\n'
        '{"kind": "train", "step": 2}\n{"kind": "validation", "step": 2, "loss": Infinity}\n',
    )
    write(folder / "result.json", {"validation_loss": float("nan"), "unigram_entropy": None})
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "validation loss nan nats per token" in page.text
    assert "under the unigram entropy" not in page.text


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("result.json", "{", r"result\.json is not JSON"),
        ("result.json", "[]", r"result\.json must hold a JSON object, it holds a list"),
        ("metrics.jsonl", "oops\n{}\n", r"metrics\.jsonl, line 1 is not JSON"),
        ("metrics.jsonl", "3\n", r"metrics\.jsonl, line 1 is not a JSON object"),
        ("timeline.json", {"ranks": [[{"action": "9Z"}]]}, "not in the form.*9Z"),
        ("timeline.json", {}, "not in the form that training writes.*ranks"),
        ("load.json", {"layers": [1]}, "not in the form"),
    ],
)
def test_a_broken_file_is_named(folder: Path, name: str, content: object, reason: str) -> None:
    write(folder / name, content)
    with pytest.raises(ValueError, match=reason):
        write_report(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is not the folder of a run"):
        write_report(tmp_path / "nowhere")


def test_a_folder_that_is_no_runs_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "load.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not the folder of a run: it has none of config"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["load.json"]


def test_bars_of_every_kind_differ_without_colour() -> None:
    plots = pytest.importorskip("counterflow.launch.plots")
    assert len(set(plots.HATCHES.values())) == len(plots.HATCHES) == 4


@pytest.mark.parametrize("action", [Action(0, Op.F, 3), Action(1, Op.W, 1), Action(10, Op.W, 12)])
def test_a_bar_is_labelled_where_the_label_as_drawn_leaves_its_ends_clear(action: Action) -> None:
    plots = pytest.importorskip("counterflow.launch.plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(plots.Figure(dpi=720))  # ten pixels a point
    drawn = canvas.figure.text(0, 0, str(action), fontsize=6.5)
    width = drawn.get_window_extent(canvas.get_renderer()).width / 10
    slack = 0.05 * len(str(action))  # the renderer rounds each glyph to whole pixels
    assert plots._label(action, width + 2 + slack) == str(action)
    assert plots._label(action, width + 2 - slack) == str(action.microbatch)
    assert plots._label(action, 4.0) == ""


def test_an_empty_run_says_that_it_has_not_ended() -> None:
    page = Page(to_html(RunData("r", {}, (), (), None, ()), {}))
    assert "the run has not ended in order" in page.text
