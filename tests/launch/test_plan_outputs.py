"""How `counterflow plan` shows what it found: text, JSON, page. By a made-up prediction."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from counterflow.launch.outputs import Output
from counterflow.launch.plan_answer import Candidate
from counterflow.launch.plan_charts import stacked, times, waterfall
from counterflow.launch.plan_json import to_json
from counterflow.launch.plan_page import to_html
from counterflow.launch.plan_text import blocks, print_answer, print_written
from counterflow.launch.plan_words import runs, search_cells
from counterflow.parallel.simulate.phases import FORWARD, NAMES, compose
from counterflow.predict.layout import Layout
from counterflow.predict.prediction import RankMemory, Share
from tests.launch.made_up_plan import GIB, made_up_answer, made_up_prediction


def shown(capsys: pytest.CaptureFixture[str], answer=None) -> str:
    print_answer(answer or made_up_answer())
    return capsys.readouterr().out


def lines_with(text: str, start: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip().startswith(start)]


# Text


def test_text_ends_with_what_is_asked_for_first(capsys: pytest.CaptureFixture[str]) -> None:
    last = shown(capsys).rstrip().splitlines()[-8:]
    text = " ".join(" ".join(last).split())
    for said in ("step: 97.00 ms", "tokens/s: 10,557", "MFU: 39.0%", "It fits in memory"):
        assert said in text
    assert "What limits it: exposed communication" in text


def test_every_headline_number_of_an_extrapolation_is_marked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer = made_up_answer()
    marked = [line for line in shown(capsys).splitlines() if line.endswith("(extrapolated)")]
    assert len(marked) == 4
    known = replace(answer.prediction, notes=answer.prediction.notes[:2])
    assert "extrapolated" not in shown(capsys, replace(answer, prediction=known))


def test_the_waterfall_runs_from_the_ideal_to_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys)
    assert lines_with(text, "ideal ")[0] == ["ideal", "57.00", "58.8%", "57.00"]
    assert lines_with(text, "jitter ")[0] == ["jitter", "5.00", "5.2%", "97.00"]
    assert "slower <products>: made up & so on" in text


def test_a_rank_that_does_not_fit_is_marked_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, made_up_answer(memory_gib=40))
    assert "61.00!" in text
    assert "does not fit in memory: rank 0" in text
    assert "61.00!" not in shown(capsys)


def test_categories_that_nothing_has_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys)
    assert "unused" not in text
    assert "saved on rank 0, GiB: FP8 activations 12.00" in text


def test_the_layers_of_the_stages_are_told_where_no_one_gave_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    answer = made_up_answer()
    found = answer.prediction
    assert found.layout.layers is None
    cut = [len(part.layers) for part in found.layout.parts(found.model, 2)]
    assert f"layers of the stages {runs(cut)};" in " ".join(shown(capsys, answer).split())
    told = to_json(answer)["layout"]
    assert isinstance(told, dict)
    assert list(told["layers"]) == cut
    assert f'<td class="words">{runs(cut)}</td>' in to_html(answer)
    assert runs([3, 4, 4, 4, 2]) == "3, 3x4, 2"


def _rows(best: list[Layout]) -> list[Candidate]:
    return [Candidate(layout, 1.0, 1.0, 0.4, GIB) for layout in best]


def test_rows_of_the_search_s_table_that_look_the_same_are_the_same() -> None:
    layout = Layout(pp=2, dp=2, ep=2)
    for changed in (
        {"fp8": False},
        {"comm_sms": 12},
        {"payload": "bf16"},
        {"recompute_norms": False},
        {"zero": 0},
        {"moments": "float32"},
        {"layers": (30, 31)},
    ):
        best = _rows([layout, replace(layout, **changed)])
        cells, alike = search_cells(best)
        first, second = ([cell(of) for cell in cells.values()] for of in best)
        assert first != second, changed
        assert len(cells) == 10
    cells, alike = search_cells(_rows([layout, replace(layout, pp=1, layers=(61,))]))
    assert not {"FP8", "layers"} & cells.keys()
    assert "FP8 on; dispatch deep_ep fp8 20; made again norms up; ZeRO 1" in alike


def test_tables_keep_to_the_terminal_s_width() -> None:
    head = ["name", *map(str, range(16))]
    body = [["weights", *["123.45"] * 16], ["total", *[f"{100 + i}.00!" for i in range(16)]]]
    whole = blocks(head, body, 200)
    assert whole == [(head, body)]
    parts = blocks(head, body, 60)
    assert len(parts) > 1
    for names, rows in parts:
        widths = [max(map(len, cells)) + 2 for cells in zip(names, *rows, strict=True)]
        assert sum(widths) - 2 <= 60
    assert [name for names, _ in parts for name in names[1:]] == head[1:]
    assert [cell for _, rows in parts for cell in rows[1][1:]] == body[1][1:]
    assert len(blocks(head, body, 1)) == 16


def test_what_the_host_holds_is_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    answer = made_up_answer()
    held = RankMemory(answer.prediction.memory[0].parts, 3 * GIB, 2 * GIB)
    found = replace(answer.prediction, memory=(held, held))
    text = shown(capsys, replace(answer, prediction=found))
    assert lines_with(text, "host: moving average")[0][-1] == "1.00"
    assert lines_with(text, "host: checkpoint's copy")[0][-1] == "2.00"
    assert "checkpoint's copy" not in shown(capsys)


def test_a_written_run_that_does_not_fit_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    files = [Output("--html", Path("a.html")), Output("--toml", Path("a.toml"))]
    print_written(made_up_answer(), files)
    assert capsys.readouterr().out == "wrote a.html\nwrote a.toml\n"
    print_written(made_up_answer(memory_gib=40), files)
    text = " ".join(capsys.readouterr().out.split())
    assert "wrote a.html wrote a.toml; this layout does not fit in memory: rank 0 needs" in text
    assert text.endswith("21.00 GiB more than the 40.00 GiB of a GPU")


def test_layouts_that_cannot_be_are_counted_by_constraint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = shown(capsys)
    assert "the best of 6 layouts: 2 timed, 3 cannot run, 1 cannot be among the best" in text
    assert "3 cannot run: memory, such as 19 GiB too much; raise pp" in text
    assert "the best of" not in shown(capsys, made_up_answer(searched=False))


# JSON


def test_json_adds_up() -> None:
    told = json.loads(json.dumps(to_json(made_up_answer()), allow_nan=False))
    assert sum(of["ms"] for of in told["waterfall"]) == told["step_ms"]
    assert sum(of["share"] for of in told["waterfall"]) == pytest.approx(1)
    for of in told["ranks"]:
        parts = [time for name, time in of.items() if name != "step_ms"]
        assert sum(parts) == of["step_ms"] == told["step_ms"]
    for of in told["memory"]:
        assert sum(of["parts_bytes"].values()) == of["total_bytes"]
    assert told["tokens_per_step"] / told["step_ms"] * 1e3 == told["tokens_per_second"]
    assert told["extrapolated"] is True
    assert told["search"]["infeasible"][0]["count"] == 3
    assert to_json(made_up_answer(searched=False))["search"] is None


def test_phases_in_json_are_those_of_each_step_s_own_layers() -> None:
    found = made_up_prediction()
    first, second = found.stages
    slow = replace(first[0], alone=dict.fromkeys(NAMES, 2.0))
    told = to_json(replace(made_up_answer(), prediction=replace(found, stages=((slow,), second))))
    simulation = told["simulation"]
    assert isinstance(simulation, dict)
    expected = compose(FORWARD, [layer.alone for layer in second], [])
    for steps, phases in zip(simulation["steps"], simulation["phases"], strict=True):
        for (name, start, _), of in zip(steps, phases, strict=True):
            begins = [phase[3] - start for phase in of]
            if name == "0F0":
                assert [phase[0] for phase in of] == [*FORWARD]
                assert begins == [0, 2, 4, 6]
            if re.fullmatch(r"1F\d", name):
                assert begins == [span.start for span in expected]
                assert [phase[1] for phase in of] == [0] * 4 + [1] * 4


# Page


class _Checked(HTMLParser):
    """Fails where elements do not close in the order in which they opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "rect", "path", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "path"):
            assert self.open.pop() == tag


def checked(html: str) -> _Checked:
    found = _Checked()
    found.feed(html)
    assert found.open == []
    return found


def test_the_page_is_whole_and_fetches_nothing() -> None:
    html = to_html(made_up_answer())
    page = checked(html)
    for tag, attributes in page.tags:
        assert not {"src", "href"} & attributes.keys(), tag
    assert not re.search(r"https?://|@import|url\(", html)
    assert "slower &lt;products&gt;" in html
    assert "GPU&lt;1&gt;" in html


def test_the_page_holds_the_schedule_s_own_page() -> None:
    frames = [of for tag, of in checked(to_html(made_up_answer())).tags if tag == "iframe"]
    inner = frames[0]["srcdoc"]
    assert inner is not None
    assert "dualpipe" in inner
    assert inner.rstrip().endswith("</html>")


def _rects(svg: str) -> list[dict[str, str]]:
    return [dict(of.attrib) for of in ElementTree.fromstring(svg).iter("rect")]


def test_each_bar_of_the_waterfall_begins_where_the_last_one_ended() -> None:
    shares = [Share("ideal", 50, ""), Share("more", 30, ""), Share("less", -20, "")]
    ideal, more, less, total = _rects(waterfall(shares))
    left = float(ideal["x"])
    assert float(more["x"]) == pytest.approx(left + float(ideal["width"]), abs=0.2)
    ends = float(more["x"]) + float(more["width"])
    assert float(less["x"]) + float(less["width"]) == pytest.approx(ends, abs=0.2)
    assert float(total["x"]) == left
    assert float(total["width"]) == pytest.approx(float(ideal["width"]) * 60 / 50, abs=0.2)
    assert [of["class"] for of in (ideal, more, less, total)] == ["ideal", "more", "less", "total"]


def test_stacks_are_as_long_as_their_parts_and_the_limit_lies_on_their_scale() -> None:
    memory = (RankMemory({"a": 10 * GIB, "b": 30 * GIB}, 0), RankMemory({"a": GIB, "b": 0}, 0))
    svg = stacked(memory, 80 * GIB)
    first, second, third = _rects(svg)
    assert float(second["width"]) == pytest.approx(3 * float(first["width"]), abs=0.2)
    assert float(third["width"]) == pytest.approx(float(first["width"]) / 10, abs=0.2)
    limit = re.search(r'class="limit" d="M([\d.]+) ', svg)
    assert limit is not None
    assert float(limit[1]) - float(first["x"]) == pytest.approx(8 * float(first["width"]), abs=1)
    assert 'class="limit"' not in stacked(memory, 0)


def test_time_without_work_is_drawn_in_the_background_colour() -> None:
    kinds = [of["class"] for of in _rects(times(made_up_prediction().ranks))]
    assert kinds.count("idle") == 2
    assert len(kinds) == 14
