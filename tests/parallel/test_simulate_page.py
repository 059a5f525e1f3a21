"""The page of a simulated step: it holds what was simulated, and needs nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from html.parser import HTMLParser
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from counterflow.parallel.schedule import Pair, Schedule, build
from counterflow.parallel.simulate import Costs, Memory, Result, memory_of, simulate
from counterflow.parallel.simulate.draw.look import DARK, LIGHT, NEUTRAL, paler
from counterflow.parallel.simulate.draw.page import page
from counterflow.parallel.simulate.draw.pictures import save_picture
from tests.cases_pictures import UNIT, WITH_ALL, simulated


class Tags(HTMLParser):
    """Tags with their attributes, and what each script holds."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        tag = self.tags[-1][0] if self.tags else ""
        if tag == "script":
            self.scripts[-1] += data
        elif tag != "style":
            self.text += data


def page_of(result: Result, memory: Memory | None = None) -> tuple[Tags, dict[str, Any]]:
    memory = memory or Memory()
    tags = Tags(page(result, memory_of(result, memory), memory_unit=memory.unit))
    return tags, json.loads(tags.scripts[0])


def steps_in(data: dict[str, Any]) -> list[list[tuple[str, int, int]]]:
    """Per rank, the steps that the page draws: text form, start and end in ticks."""

    def name(code: int) -> str:
        rest, op = divmod(code, 4)
        microbatch, stage = divmod(rest, data["stages"])
        return f"{stage}{'FBIW'[op]}{microbatch}"

    codes = iter(data["steps"])
    names = [
        name(code) if code >= 0 else f"({name(-1 - code)};{name(next(codes))})" for code in codes
    ]
    found: list[list[tuple[str, int, int]]] = []
    for first, after in zip(data["first"], data["first"][1:], strict=False):
        row: list[tuple[str, int, int]] = []
        now = 0
        for step in range(first, after):
            start = now + data["gaps"][step]
            now = start + data["durations"][step]
            row.append((names[step], start, now))
        found.append(row)
    return found


@pytest.mark.parametrize(
    ("name", "costs", "tick"),
    [
        ("dualpipe", UNIT, 1),
        ("1f1b", Costs(F=1.1, I=0.7, W=0.35, send=0.2), 0.01),
        ("dualpipev", Costs(F=1 / 3, I=2 / 7, W=1 / 9), 1e-7),
        ("dualpipe", WITH_ALL, None),
    ],
)
def test_the_page_draws_what_was_simulated(name: str, costs: Costs, tick: float | None) -> None:
    result = simulated(name, 4, 10, costs)
    _, data = page_of(result)
    if tick is not None:
        assert data["tick"] == pytest.approx(tick)
    # Half a tick is what rounding takes; the rest is that of dividing by it.
    near = 0.5 * data["tick"] * (1 + 1e-9) if tick == 1e-7 else 1e-9
    for row, spans in zip(steps_in(data), result.spans, strict=True):
        assert [text for text, _, _ in row] == [str(span.step) for span in spans]
        for (_, start, end), span in zip(row, spans, strict=True):
            assert start * data["tick"] == pytest.approx(span.start, abs=near)
            assert end * data["tick"] == pytest.approx(span.end, abs=near)
    finish = [part for row in result.finish for part in row]
    assert [part[2] for part in data["finish"]] == [part.stage for part in finish]
    assert [part[4] * data["tick"] for part in data["finish"]] == pytest.approx(
        [part.end for part in finish]
    )
    ends = [end for row in steps_in(data) for _, _, end in row]
    messages = data["messages"]
    sources = list(accumulate(messages["source"]))
    assert sources == [delivery.source for delivery in result.deliveries]
    assert messages["target"] == [delivery.target for delivery in result.deliveries]
    arrivals = [
        (ends[source] + queued + time) * data["tick"]
        for source, queued, time in zip(sources, messages["queued"], messages["time"], strict=True)
    ]
    assert arrivals == pytest.approx(
        [transfer.end for transfer in result.transfers], abs=max(near, 1e-9)
    )
    links = data["critical"]["rows"] + [entry[1:] for entry in data["critical"]["messages"]]
    assert sum(end - start for _, start, end in links) == data["makespan"]


def test_the_page_has_the_memory_curve_of_each_rank() -> None:
    result = simulated("1f1b", 4, 6, Costs(F=1, I=1, W=0.5))
    memory = Memory(weights=2, optimizer=3.5, activations=[1.5, 1, 1, 0.75], kept=0.25, unit="GiB")
    _, data = page_of(result, memory)
    for drawn, held in zip(data["memory"], memory_of(result, memory), strict=True):
        times = [time * data["tick"] for time in accumulate(drawn["times"])]
        levels = [level / data["level_parts"] for level in accumulate(drawn["levels"])]
        assert list(zip(times, levels, strict=True)) == list(held.curve)
        assert drawn["fixed"] == [held.weights, held.gradients, held.optimizer]


def test_the_page_has_the_phases_of_each_kind_of_step() -> None:
    result = simulated("dualpipe", 4, 10, WITH_ALL)
    tags, data = page_of(result)
    assert {"F 2 0", "I 0 2", "W 0 2", "B 0 2", "pair 2 2"} == data["phases"]["shapes"].keys()
    ends = {
        kind: max(span[4] for span in spans) for kind, spans in data["phases"]["shapes"].items()
    }
    for rank, row in enumerate(result.plan.rows):
        for index, step in enumerate(row):
            kind = next(
                k for k in ends if k.startswith("pair" if isinstance(step, Pair) else step.op)
            )
            number = data["first"][rank] + index
            assert ends[kind] == data["durations"][number]
    assert any(attributes.get("id") == "phases" for _, attributes in tags.tags)
    without, data = page_of(simulated("dualpipe", 4, 10))
    assert data["phases"] is None
    assert not any(attributes.get("id") == "phases" for _, attributes in without.tags)


def test_the_page_needs_nothing_from_outside() -> None:
    tags, _ = page_of(simulated("dualpipe", 4, 10))
    for tag, attributes in tags.tags:
        assert tag not in ("link", "img", "iframe", "object")
        assert not {"src", "href"} & attributes.keys()
    assert not re.search(r"https?:|\bimport\b|fetch\(|XMLHttp|innerHTML", tags.scripts[1])


def test_the_page_can_be_read_without_its_script() -> None:
    result = simulated("dualpipe", 4, 10, Costs(F=1, I=1, W=1, pair=3, unit="<ms>"))
    tags, _ = page_of(result)
    assert f"Makespan {result.makespan:g} <ms>" in tags.text
    assert f"bubble {result.bubble_rate:.2%}" in tags.text
    names = [tag for tag, _ in tags.tags]
    assert names.count("tr") == 1 + result.ranks
    assert "noscript" in names
    canvas = next(attributes for tag, attributes in tags.tags if tag == "canvas")
    assert canvas["tabindex"] == "0"
    assert "Makespan" in (canvas["aria-label"] or "")


def test_names_are_escaped_wherever_they_come() -> None:
    schedule = build("1f1b", ranks=2, microbatches=3)
    bad = "</script><script>alert('\"&')</script>"
    result = simulate(Schedule(bad, schedule.placement, schedule.rows), Costs(unit=bad))
    html = page(result, memory_of(result, Memory()), memory_unit=bad)
    assert "<script>alert" not in html
    tags = Tags(html)
    assert [tag for tag, _ in tags.tags].count("script") == 2
    data = json.loads(tags.scripts[0])
    assert data["unit"] == data["memory_unit"] == bad
    assert tags.text.count(bad) > 2


def test_the_page_is_light_or_dark_as_its_reader_has_it() -> None:
    result = simulated("1f1b", 2, 3)
    html = page(result, memory_of(result, Memory()))
    light, dark = re.findall(r":root\{(.*?)\}", html)
    assert "prefers-color-scheme: dark" in html
    for colours, css in ((LIGHT, light), (DARK, dark)):
        assert css == "".join(f"--{name}:{colour};" for name, colour in colours.items())


def test_the_files_of_the_page_are_in_the_wheel() -> None:
    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    kept = settings["tool"]["setuptools"]["package-data"].get(
        "counterflow.parallel.simulate.draw", []
    )
    folder = root / "parallel" / "simulate" / "draw"
    found = {path.name for pattern in kept for path in folder.glob(pattern)}
    assert {"page.js", "page_draw.js", "page.css"} <= found


def test_one_rank_and_one_micro_batch_are_not_called_by_plurals() -> None:
    tags, _ = page_of(simulated("1f1b", 1, 1))
    assert "1f1b, 1 rank × 1 micro-batch\n" in tags.text
    assert "of idle time on 1 rank." in tags.text


def test_the_legend_has_shades_in_grey_and_entries_for_bars_and_for_stacks() -> None:
    result = simulated("dualpipe", 4, 10)
    html = page(result, memory_of(result, Memory()))
    entries = dict(re.findall(r'<li class="(\w*)">.*?</svg>(.*?)</li>', html))
    assert entries.keys() == {"", "bars", "stacks"}
    assert entries["stacks"].startswith("a column: the shares of its time, F from above")
    for white in (0.0, 0.55):
        assert html.count(f'fill="{paler(NEUTRAL, white)}"') == 1
    # Hatches are those of bars: where these are not drawn, swatches have none.
    hatched = re.findall(r'<path class="bars" [^>]*>', html)
    assert len(hatched) == len(re.findall("<path ", html)) == len("BIW")


def test_steps_so_short_that_no_number_counts_their_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="too small to be so many of them; multiply"):
        page_of(simulated("1f1b", 2, 2, Costs(F=1e-310, I=0, W=0)))


def in_browser(result: Result, folder: Path, before: str = "", after: str = "") -> str:
    """The page after its script has run, with more script before and after it."""
    path = folder / "step.html"
    save_picture(result, memory_of(result, Memory()), path)
    html = path.read_text(encoding="utf-8")
    html = html.replace("<script>", f"<script>{before}</script>\n<script>", 1)
    path.write_text(html.replace("</body>", f"<script>{after}</script></body>"), encoding="utf-8")
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    options = [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000"]
    options.append("--disable-dev-shm-usage")  # /dev/shm is too small for it in some containers
    ran = subprocess.run(
        [*browser, *options, "--window-size=1300,900", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return ran.stdout


needs_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")


@needs_browser
def test_a_browser_runs_the_page_to_its_end(tmp_path: Path) -> None:
    html = in_browser(simulated("dualpipe", 4, 10, WITH_ALL), tmp_path)
    # The height of the canvas is set by the last thing that the script does.
    assert re.search(r"<canvas[^>]*style=\"height: \d+px", html), html


# What is written on bars, with its width and what is seen of the bar's.
_NOTE_LABELS = """
const drawLabel = label, drawn = [];
label = (text, widest, left, top, wide, tall) => {
  const seen = Math.min(left + wide, LEFT + plotWidth()) - Math.max(left, LEFT);
  const fill = ctx.fillText.bind(ctx);
  ctx.fillText = (text) => drawn.push([text, ctx.measureText(text).width, seen]);
  drawLabel(text, widest, left, top, wide, tall);
  ctx.fillText = fill;
};
VIEW
draw();
document.title = JSON.stringify([legend.className, drawn]);
"""


def labels(result: Result, folder: Path, view: str) -> tuple[str, list[tuple[str, float, float]]]:
    html = in_browser(result, folder, after=_NOTE_LABELS.replace("VIEW", view))
    title = re.search(r"<title>(.*?)</title>", html)
    assert title is not None
    return json.loads(title[1])


@needs_browser
@pytest.mark.parametrize(
    ("schedule", "view", "form", "share"),
    [
        # All 8 x 20 x 2 actions; of those that a view cuts, some have no room.
        (("dualpipe", 8, 20), "", r"\d+", 1.0),
        (("dualpipe", 8, 20), "moveTo(10 / data.tick, 20 / data.tick);", r"\d[FBIW]\d+", 0.2),
        # Two digits do not fit into an F, and one digit alone is not written either.
        (("1f1b", 8, 64), "", "", 0.0),
    ],
)
def test_labels_have_one_form_and_fit_into_their_bars(
    schedule: tuple[str, int, int], view: str, form: str, share: float, tmp_path: Path
) -> None:
    result = simulated(*schedule)
    kind, drawn = labels(result, tmp_path, view)
    assert "stacked" not in kind
    made = sum(2 if isinstance(step, Pair) else 1 for row in result.plan.rows for step in row)
    assert share * made <= len(drawn) <= (made if share else 0)
    for text, wide, room in drawn:
        assert re.fullmatch(form, text)
        assert wide <= room


@needs_browser
def test_bars_too_narrow_to_be_seen_are_stacked_and_the_legend_says_so(tmp_path: Path) -> None:
    kind, drawn = labels(simulated("zbv", 8, 128), tmp_path, "")
    assert "stacked" in kind
    assert not drawn
