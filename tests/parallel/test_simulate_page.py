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
from counterflow.parallel.simulate import Costs, Memory, Phases, Result, memory_of, simulate
from counterflow.parallel.simulate.draw.look import (
    DARK,
    LIGHT,
)
from counterflow.parallel.simulate.draw.page import page
from counterflow.parallel.simulate.draw.pictures import save_picture
from counterflow.parallel.simulate.phases import NAMES

UNIT = Costs(F=1, I=1, W=1, pair=3)
WITH_ALL = Costs(
    phases=Phases(dict.fromkeys(NAMES, 1.5), layers=2),
    send=0.25,
    message=3,
    bandwidth=2,
    reduce=3,
    mirror=2,
    optimizer=1,
    unit="ms",
)


def simulated(name: str, ranks: int, microbatches: int, costs: Costs = UNIT) -> Result:
    return simulate(build(name, ranks=ranks, microbatches=microbatches), costs)


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


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_runs_the_page_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "step.html"
    result = simulated("dualpipe", 4, 10, WITH_ALL)
    save_picture(result, memory_of(result, Memory()), path)
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    options = [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]
    ran = subprocess.run(
        [*browser, *options, path.as_uri()], capture_output=True, text=True, timeout=120
    )
    # The height of the canvas is set by the last thing that the script does.
    assert re.search(r"<canvas[^>]*style=\"height: \d+px", ran.stdout), ran.stderr
