"""The page of a profile in a real browser: it draws under its own policy, and answers clicks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from counterflow.comm.profile.analyse import analyse
from counterflow.comm.profile.page import to_html
from tests.comm.profile.constructed import Step, traces_of

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")

STEPS = (
    Step([300_000, 500_000], 200_000, "dispatch(F) layer 0", "attn(F) layer 0"),
    Step([250_000, 100_000], 150_000, "combine(F) layer 0", "mlp(F) layer 0"),
    Step([700_000, 900_000], 400_000, "dispatch(F) layer 1", "attn(F) layer 1"),
)

# What each test asks, of one page: a browser takes a second to start.
QUESTIONS = {
    "phase": """
        click("combine(F)", "share exposed");
        return [state.from, state.to, state.phase];
    """,
    "stretch": """
        click("dispatch(F) layer 1", "computed next");
        return [state.lane.group, state.lane.rank, state.bar, tip.innerText];
    """,
    "pointer": """
        const lane = lanes.find((l) => l.group === "communication");
        pointAt(x((lane.start[0] + lane.end[0]) / 2), lane.top + 3);
        return tip.innerText.split("\\n");
    """,
    "sorting": """
        const table = tableWith("share exposed");
        const header = [...table.tHead.rows[0].cells].find((c) => c.textContent === "exposed");
        const place = [...table.tHead.rows[0].cells].indexOf(header);
        const values = () =>
          [...table.tBodies[0].rows].map((row) => Number(row.cells[place].dataset.value));
        header.firstChild.click();
        const down = values(), first = header.getAttribute("aria-sort");
        header.firstChild.click();
        return [down, first, values(), header.getAttribute("aria-sort")];
    """,
    "choosing": """
        chosen.value = "1";
        chosen.onchange();
        return [...document.querySelectorAll("tr[data-of]")].map((r) => [r.dataset.of, r.hidden]);
    """,
    "keys": """
        const press = (key) => canvas.dispatchEvent(new KeyboardEvent("keydown", { key }));
        const seen = [];
        for (const key of "nnpn") { press(key); seen.push([state.lane.group, state.bar]); }
        press("Escape");
        const lane = state.lane;
        press("+");
        const closer = state.to - state.from < data.end;
        press("0");
        return [seen, lane, closer, state.from, state.to === data.end];
    """,
}
HELPERS = """
const tableWith = (text) =>
  [...document.querySelectorAll("table")].find((table) => table.textContent.includes(text));
const click = (name, column) => [...tableWith(column).querySelectorAll("button.go")]
  .find((button) => button.textContent === name).click();
"""


def page() -> str:
    traces = traces_of(STEPS)
    return to_html(traces, [analyse(trace) for trace in traces], title="a run")


def in_browser(html: str, folder: Path) -> str:
    """The page after its script has run."""
    path = folder / "page.html"
    path.write_text(html, encoding="utf-8")
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


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page answers to each question, asked one after the other."""
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page())
    asks = ", ".join(f"{name}: (() => {{showAll();{ask}}})()" for name, ask in QUESTIONS.items())
    script = f"<script>{HELPERS}document.title = JSON.stringify({{{asks}}});</script></body>"
    dom = in_browser(html.replace("</body>", script), tmp_path_factory.mktemp("browser"))
    title = re.search(r"<title>(.*?)</title>", dom, re.S)
    assert title is not None
    return json.loads(unescape(title[1]))


def test_a_browser_runs_the_page_to_its_end_under_its_own_policy(tmp_path: Path) -> None:
    html = in_browser(page(), tmp_path)
    # The height of the canvas is set by the last thing that the script does.
    assert re.search(r"<canvas[^>]*style=\"height: \d+px", html), html
    legend = re.findall(r"<button aria-pressed=\"false\">(.*?)</button>", html)
    assert legend == ["dispatch(F)", "combine(F)"]
    assert re.search(r'id="where"[^>]*>0 ns to 2.4 ms: 2.4 ms<', html)


def test_a_click_on_a_phase_shows_its_time_and_marks_it(told: dict[str, Any]) -> None:
    start, end, phase = told["phase"]
    report = analyse(traces_of(STEPS)[0])
    window = next(p.window for p in report.phases if p.name == "combine(F)")
    zero = report.window[0]
    assert phase == "combine(F)"
    assert 0 <= start < window[0] - zero < window[1] - zero < end < report.totals.span
    assert end - start < 1.5 * (window[1] - window[0])


def test_a_click_on_an_exposed_stretch_selects_it_and_tells_of_it(told: dict[str, Any]) -> None:
    group, rank, bar, tip = told["stretch"]
    # Rank 0 waits 200 µs for rank 1, and then its transfer takes 400.
    assert (group, rank, bar) == ("exposed", 0, 2)
    assert tip.startswith("exposed: dispatch(F) layer 1")
    assert "600 µs" in tip


def test_the_pointer_tells_what_computes_beside_a_communication(told: dict[str, Any]) -> None:
    lines = told["pointer"]
    assert lines[0] == "dispatch(F) layer 0"
    assert "computes beside: nothing" in lines
    assert "exposed for 400 µs" in lines


def test_columns_sort_by_their_numbers(told: dict[str, Any]) -> None:
    down, first, up, second = told["sorting"]
    assert (first, second) == ("descending", "ascending")
    assert down == sorted(up, reverse=True)
    assert up == sorted(up)
    assert len(set(up)) > 1


def test_one_rank_can_be_chosen_for_the_tables(told: dict[str, Any]) -> None:
    assert {of for of, _ in told["choosing"]} == {"0", "1"}
    assert all(hidden == (of == "0") for of, hidden in told["choosing"])


def test_keys_go_from_one_exposed_stretch_to_the_next_and_zoom(told: dict[str, Any]) -> None:
    seen, lane, closer, start, whole = told["keys"]
    assert seen == [["exposed", 0], ["exposed", 1], ["exposed", 0], ["exposed", 1]]
    assert (lane, closer, start, whole) == (None, True, 0, True)
