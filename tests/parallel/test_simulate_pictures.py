"""Pictures of simulated steps: every bar in its place, told apart without colour."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from counterflow.parallel.schedule import Action, Op, Pair, Schedule, actions, build, forward_only
from counterflow.parallel.simulate import Costs, Memory, Phases, Result, memory_of, simulate
from counterflow.parallel.simulate.draw.look import (
    DARK,
    LIGHT,
    Shades,
    bar_style,
    boxes,
    paler,
)
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


def figure_of(result: Result, memory: Memory | None = None) -> Any:
    plot = pytest.importorskip("counterflow.parallel.simulate.draw.plot")
    memory = memory or Memory()
    return plot.draw(result, memory_of(result, memory), memory_unit=memory.unit)


# ---- how things look ----


def lightness(colour: str) -> float:
    """CIE L* of a colour "#rrggbb", from 0 to 100."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * luminance ** (1 / 3) - 16


def test_kinds_of_steps_differ_in_hatch_and_in_lightness() -> None:
    kinds = ("F", "I", "W", "B", "reduce", "mirror", "optimizer")
    assert len({bar_style(kind)["hatch"] for kind in kinds}) == len(kinds)
    for colours in (LIGHT, DARK):
        levels = [lightness(colours[op]) for op in "FIWB"]
        # A just noticeable difference is about 2; bars do not always lie side by side.
        assert all(abs(one - other) > 5 for one, other in combinations(levels, 2))
    assert LIGHT.keys() == DARK.keys()


def test_text_on_every_bar_can_be_read() -> None:
    """WCAG asks for a contrast of 4.5; its luminance is that of L*."""
    ink = (lightness("#101216") + 16) / 116
    for colours in (LIGHT, DARK):
        for kind in ("F", "I", "W", "B", "reduce", "mirror", "optimizer"):
            bar = (lightness(colours[kind]) + 16) / 116
            assert (bar**3 + 0.05) / (ink**3 + 0.05) > 4.5


def test_a_pair_has_two_lanes_its_forward_above_its_backward() -> None:
    forward, backward = Action(0, Op.F, 7), Action(7, Op.B, 3)
    (one,) = boxes(forward)
    upper, lower = boxes(Pair(forward, backward))
    assert (upper.action, lower.action) == (forward, backward)
    assert upper.top == one.top
    assert upper.top + upper.height == lower.top
    assert lower.top + lower.height == one.top + one.height


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("1f1b", ()),
        ("dualpipe", ("enters at rank 0", "enters at rank 3")),
        ("dualpipev", ("1st stage of its rank", "2nd stage of its rank")),
    ],
)
def test_shades_tell_the_stages_of_a_rank_apart(name: str, names: tuple[str, ...]) -> None:
    schedule = build(name, ranks=4, microbatches=10)
    shades = Shades(schedule.placement)
    assert shades.names == names
    for rank, row in enumerate(schedule.rows):
        of_stage = {(action.stage, shades.of(action)) for step in row for action in actions(step)}
        assert len(of_stage) == len({number for _, number in of_stage}) == max(1, len(names))
        assert {stage for stage, _ in of_stage} == set(schedule.placement.stages(rank))
    whites = [shades.white(number) for number in range(len(shades))]
    assert whites == sorted(set(whites))
    assert len({paler(LIGHT["B"], white) for white in whites}) == len(whites)


# ---- the figure ----


@pytest.mark.parametrize("name", ["1f1b", "dualpipe", "dualpipev"])
def test_at_8x20_every_action_has_a_bar_with_its_micro_batch_in_it(name: str) -> None:
    result = simulated(name, 8, 20)
    figure = figure_of(result)
    steps = figure.axes[0]
    made = [action for row in result.plan.rows for step in row for action in actions(step)]
    assert len(steps.patches) == len(steps.texts) == len(made)
    assert Counter(text.get_text() for text in steps.texts) == Counter(
        str(action.microbatch) for action in made
    )
    figure.canvas.draw()
    # Every ninth, because measuring takes long; of each rank some, and of each kind.
    for bar, text in list(zip(steps.patches, steps.texts, strict=True))[::9]:
        outer, inner = bar.get_window_extent(), text.get_window_extent()
        # Half a point: the drawn text is rounded to whole pixels.
        slack = figure.dpi / 72 / 2
        assert outer.x0 - slack <= inner.x0 < inner.x1 <= outer.x1 + slack
        assert outer.y0 - slack <= inner.y0 < inner.y1 <= outer.y1 + slack
        assert text.get_fontsize() >= 4.2


def test_bars_are_where_the_steps_are() -> None:
    result = simulated("dualpipe", 4, 10, Costs(F=1, I=2, W=1, pair=4, send=1, reduce=2, mirror=1))
    drawn = Counter(
        (bar.get_x(), bar.get_y(), bar.get_width(), bar.get_height())
        for bar in figure_of(result).axes[0].patches
    )
    wanted = Counter(
        (start, rank + box.top, end - start, box.height)
        for rank, row in enumerate(result.spans)
        for step, start, end in row
        for box in boxes(step)
    )
    wanted += Counter(
        (part.start, rank - 0.4, part.end - part.start, 0.8)
        for rank, row in enumerate(result.finish)
        for part in row
    )
    assert drawn == wanted


def legend_of(result: Result, memory: Memory) -> list[str]:
    return [text.get_text() for text in figure_of(result, memory).legends[0].get_texts()]


def test_the_legend_has_what_occurs_and_nothing_else() -> None:
    only = simulate(forward_only(build("1f1b", ranks=2, microbatches=3)), UNIT)
    assert legend_of(only, Memory()) == ["F  forward", "activations"]
    assert legend_of(simulated("1f1b", 2, 3), Memory(weights=2)) == [
        "F  forward",
        "B  full backward",
        "weights",
        "activations",
    ]
    said = legend_of(simulated("dualpipe", 10, 20, WITH_ALL), Memory())
    for words in (
        "input-gradient",
        "pair:",
        "enters at rank 9",
        "optimizer step",
        "of all ranks",
    ):
        assert any(words in text for text in said), words


def test_titles_and_units_are_said_and_never_taken_for_formulas() -> None:
    schedule = build("1f1b", ranks=2, microbatches=3)
    named = Schedule("$x_1$ <b>", schedule.placement, schedule.rows)
    result = simulate(named, Costs(unit="$s$"))
    figure = figure_of(result, Memory(unit="$GiB$"))
    steps, held = figure.axes
    assert steps.get_title("left") == "$x_1$ <b>   2 ranks × 3 micro-batches"
    assert steps.get_title("right") == "makespan 12 $s$,  bubble 25.0%"
    assert held.get_title("left") == "memory ($GiB$)"
    assert held.get_xlabel() == "time ($s$)"
    figure.canvas.draw()


@pytest.mark.parametrize("costs", [UNIT, Costs(F=1, I=0.75, W=0.5, send=0.3, reduce=2)])
def test_a_painted_rank_is_as_opaque_as_it_is_busy(costs: Costs) -> None:
    paint = pytest.importorskip("counterflow.parallel.simulate.draw.paint")
    result = simulated("dualpipe", 4, 10, costs)
    columns = 97  # in which bars begin and end anywhere
    pixels = paint.paint(result, Shades(result.plan.placement), columns)
    rows = pixels.tolist()
    for rank, busy in enumerate(result.busy):
        upper, lower = (rows[paint.LANES_A_RANK * rank + row] for row in (1, 8))
        for line in (upper, lower):
            opaque = sum(pixel[3] for pixel in line) / 255 / columns
            # Each column's opacity is one of 256.
            assert opaque == pytest.approx(busy / result.makespan, abs=0.5 / 255)
        blank = rows[paint.LANES_A_RANK * rank]
        assert not any(pixel[3] for pixel in blank)


def test_a_column_is_painted_in_the_shares_of_its_colours() -> None:
    paint = pytest.importorskip("counterflow.parallel.simulate.draw.paint")
    # F and B of 1 and 3 units: two columns, the first of which is half F and half B.
    result = simulated("1f1b", 1, 1, Costs(F=1, B=3))
    row = paint.paint(result, Shades(result.plan.placement), 2).tolist()[1]
    colours = [[int(LIGHT[op][i : i + 2], 16) for i in (1, 3, 5)] for op in "FB"]
    mixed = [round((f + b) / 2) for f, b in zip(*colours, strict=True)]
    assert row == [[*mixed, 255], [*colours[1], 255]]


def test_many_ranks_are_painted_and_their_memory_is_a_band(tmp_path: Path) -> None:
    result = simulated("1f1b", 64, 512)
    steps, held = figure_of(result).axes
    assert (len(steps.images), len(steps.patches), len(steps.texts)) == (1, 0, 0)
    assert len(held.lines) == 2  # the highest and the lowest rank
    memories = memory_of(result, Memory())
    for suffix, most in ((".svg", 2e6), (".png", 2e6), (".html", 4e6)):
        path = tmp_path / f"step{suffix}"
        save_picture(result, memories, path)
        assert path.stat().st_size < most


# ---- files ----


def saved(result: Result, path: Path) -> bytes:
    save_picture(result, memory_of(result, Memory()), path)
    return path.read_bytes()


def test_the_suffix_decides_the_form(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = simulated("1f1b", 2, 3)
    assert saved(result, tmp_path / "step.png").startswith(b"\x89PNG")
    assert saved(result, tmp_path / "step.HTML").startswith(b"<!doctype html>")
    svg = ET.parse(tmp_path / "step.svg") if saved(result, tmp_path / "step.svg") else None
    assert svg is not None
    texts = [
        "".join(element.itertext()) for element in svg.iter("{http://www.w3.org/2000/svg}text")
    ]
    assert "1f1b   2 ranks × 3 micro-batches" in texts
    assert texts.count("2") >= 4  # micro-batch 2: F and B on two ranks


@pytest.mark.parametrize("name", ["step.pdf", "step", "step.svg.gz"])
def test_another_suffix_is_refused_with_the_three_there_are(name: str, tmp_path: Path) -> None:
    result = simulated("1f1b", 2, 3)
    with pytest.raises(ValueError, match=r"saved as \.svg, \.png or \.html, not as"):
        save_picture(result, memory_of(result, Memory()), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    costs = Costs(F=1, I=1, W=1, pair=3, reduce=1)
    for suffix in (".svg", ".html"):
        first, second = (
            saved(simulated("dualpipe", 4, 10, costs), tmp_path / f"{number}{suffix}")
            for number in (1, 2)
        )
        assert first == second


def test_without_matplotlib_the_remedy_is_said_and_a_page_can_be_had(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.modules['matplotlib'] = None\n"
        "from counterflow.parallel.schedule import build\n"
        "from counterflow.parallel.simulate import *\n"
        "from counterflow.parallel.simulate.draw.pictures import save_picture\n"
        "result = simulate(build('1f1b', ranks=2, microbatches=3), Costs())\n"
        "memories = memory_of(result, Memory())\n"
        "save_picture(result, memories, Path(sys.argv[1]) / 'step.html')\n"
        "try:\n    save_picture(result, memories, Path(sys.argv[1]) / 'step.svg')\n"
        "except ValueError as error:\n    print(error)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert "pip install 'counterflow[plots]'" in ran.stdout, ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step.html"]
