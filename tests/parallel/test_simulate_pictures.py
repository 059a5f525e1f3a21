"""Pictures of simulated steps: every bar in its place, told apart without colour."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from colorsys import rgb_to_hsv
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from counterflow.parallel.schedule import Action, Op, Pair, Schedule, actions, build, forward_only
from counterflow.parallel.simulate import Costs, Memory, Result, memory_of, simulate
from counterflow.parallel.simulate.draw import paint
from counterflow.parallel.simulate.draw.look import (
    DARK,
    LIGHT,
    NEUTRAL,
    STACK,
    Shades,
    bar_style,
    boxes,
    paler,
)
from counterflow.parallel.simulate.draw.pictures import save_picture
from tests.cases_pictures import UNIT, WITH_ALL, simulated


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


def bars_of(figure: Any) -> dict[tuple[float, float, float, float], Any]:
    """Left, top, width and height of each bar, with the patch that it is of."""
    return {
        (left, top, right - left, bottom - top): patch
        for patch in figure.axes[0].patches
        for (left, top), _, (right, bottom), _, _ in patch.get_path().vertices.reshape(-1, 5, 2)
    }


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches"),
    [("1f1b", 8, 20), ("dualpipe", 8, 20), ("dualpipev", 8, 20), ("dualpipe", 16, 64)],
)
def test_every_action_has_a_bar_with_its_micro_batch_in_it(
    name: str, ranks: int, microbatches: int
) -> None:
    figure = figure_of(simulated(name, ranks, microbatches))
    result = simulated(name, ranks, microbatches)
    steps = figure.axes[0]
    made = [action for row in result.plan.rows for step in row for action in actions(step)]
    bars = list(bars_of(figure))
    assert len(bars) == len(steps.texts) == len(made)
    assert Counter(text.get_text() for text in steps.texts) == Counter(
        str(action.microbatch) for action in made
    )
    figure.canvas.draw()
    middles = {(round(x + w / 2, 6), round(y + h / 2, 6)): (x, y, w, h) for x, y, w, h in bars}
    # Some, because measuring takes long; of each rank and of each kind.
    for text in steps.texts[:: max(9, len(made) // 70)]:
        x, y, wide, tall = middles[tuple(round(at, 6) for at in text.get_position())]
        corners = steps.transData.transform([(x, y), (x + wide, y + tall)])
        (left, right), (bottom, top) = (sorted(axis) for axis in corners.T)
        inner = text.get_window_extent()
        # Half a point: the drawn text is rounded to whole pixels.
        slack = figure.dpi / 72 / 2
        assert left - slack <= inner.x0 < inner.x1 <= right + slack
        assert bottom - slack <= inner.y0 < inner.y1 <= top + slack
        assert text.get_fontsize() >= 4.2


def test_numbers_of_a_class_of_bars_are_there_for_all_or_for_none() -> None:
    # B is wide enough for two digits, F is not even for one that stands upright.
    result = simulated("1f1b", 32, 64, Costs(F=1, I=1, W=1))
    texts = figure_of(result).axes[0].texts
    assert Counter(text.get_text() for text in texts) == {
        str(microbatch): 32 for microbatch in range(64)
    }
    assert len({(text.get_fontsize(), text.get_rotation()) for text in texts}) == 1


@pytest.mark.parametrize(("name", "kinds"), [("zbv", "FIW"), ("dualpipe", "FBIW"), ("1f1b", "FB")])
def test_at_16x64_bars_and_their_legend_are_hatched(name: str, kinds: str) -> None:
    figure = figure_of(simulated(name, 16, 64))
    wanted = {bar_style(kind)["hatch"] for kind in kinds}
    assert not figure.axes[0].images
    assert {patch.get_hatch() or "" for patch in figure.axes[0].patches} == wanted
    swatches = figure.legends[0].get_patches()
    assert wanted <= {patch.get_hatch() or "" for patch in swatches}


def test_bars_are_where_the_steps_are() -> None:
    result = simulated("dualpipe", 4, 10, Costs(F=1, I=2, W=1, pair=4, send=1, reduce=2, mirror=1))
    drawn = bars_of(figure_of(result))
    shades = Shades(result.plan.placement)
    wanted = {
        (start, rank + box.top): (
            *(end - start, box.height),
            paler(LIGHT[box.action.op], shades.white(shades.of(box.action))),
        )
        for rank, row in enumerate(result.spans)
        for step, start, end in row
        for box in boxes(step)
    }
    for rank, row in enumerate(result.finish):
        for part in row:
            wanted[part.start, rank - 0.4] = (part.end - part.start, 0.8, LIGHT[part.kind])
    assert {bar[:2] for bar in drawn} == wanted.keys()
    for (left, top, wide, tall), patch in drawn.items():
        length, height, colour = wanted[left, top]
        # Heights are differences of numbers of ranks and tenths.
        assert (wide, tall) == pytest.approx((length, height), abs=1e-12)
        channels = tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        assert patch.get_facecolor() == (*channels, 1.0)


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


def test_shades_and_memory_have_colours_that_no_kind_of_step_has() -> None:
    figure = figure_of(simulated("dualpipe", 4, 10))
    legend = figure.legends[0]
    colours = {
        text.get_text(): tuple(round(255 * c) for c in patch.get_facecolor()[:3])
        for text, patch in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }
    for name in ("enters at rank 0", "enters at rank 3"):
        assert max(colours[name]) - min(colours[name]) <= 16, "a grey"
    assert len({lightness(paler(NEUTRAL, white)) // 10 for white in (0.0, 0.55)}) == 2
    kinds = ("F", "B", "I", "W", "reduce", "mirror")
    for colours in (LIGHT, DARK):
        hues = {name: hue(colours[name]) for name in (*kinds, "activations")}
        others = [abs(hues["activations"] - hues[kind]) for kind in kinds]
        # Salmon and yellow are next to it on the circle, and are much more saturated.
        assert min(min(other, 1 - other) for other in others) > 8 / 360


def hue(colour: str) -> float:
    return rgb_to_hsv(*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)))[0]


def test_one_rank_and_one_micro_batch_are_not_called_by_plurals() -> None:
    assert figure_of(simulated("1f1b", 1, 1)).axes[0].get_title("left") == (
        "1f1b   1 rank × 1 micro-batch"
    )


@pytest.mark.parametrize("costs", [UNIT, Costs(F=1, I=0.75, W=0.5, send=0.3, reduce=2)])
def test_shares_of_the_columns_are_the_times_of_the_kinds(costs: Costs) -> None:
    result = simulated("dualpipe", 4, 10, costs)
    columns = 97  # in which bars begin and end anywhere
    for rank, row in enumerate(result.spans):
        spent: defaultdict[str, float] = defaultdict(float)
        for step, start, end in row:
            for action in actions(step):
                spent[action.op.value] += (end - start) / len(tuple(actions(step)))
        for part in result.finish[rank]:
            spent[part.kind] += part.end - part.start
        found = paint.shares(result, rank, columns)
        assert {kind: sum(of) * result.makespan / columns for kind, of in found.items()} == (
            pytest.approx(spent)
        )
        together = [sum(column) for column in zip(*found.values(), strict=True)]
        assert max(together) <= 1 + 1e-9


def test_a_column_is_painted_in_the_colours_of_its_kinds_and_in_no_others() -> None:
    result = simulated("dualpipe", 4, 10, Costs(F=1, I=1, W=1, pair=2.4, reduce=2, optimizer=1))
    rows: Any = paint.paint(result, 37).tolist()
    known = {bytes.fromhex(LIGHT[kind][1:]) for kind in ("F", *STACK)}
    assert {bytes(pixel[:3]) for row in rows for pixel in row if pixel[3]} <= known
    assert {pixel[3] for row in rows for pixel in row} == {0, 255}
    for rank, busy in enumerate(result.busy):
        own = rows[paint.ROWS_A_RANK * rank : paint.ROWS_A_RANK * (rank + 1)]
        filled = sum(pixel[3] for row in own for pixel in row) / 255 / paint.LEVELS / 37
        # Each column is rounded to whole levels.
        assert filled == pytest.approx(busy / result.makespan, abs=0.5 / paint.LEVELS)
        assert not any(pixel[3] for row in (own[0], own[-1]) for pixel in row)


def test_a_column_has_its_forward_above_its_backward_below_and_idle_time_between() -> None:
    assert paint.stacked({"F": 0.25, "W": 0.25, "I": 0.25}) == [
        ("W", 15, 20),
        ("I", 10, 15),
        ("F", 0, 5),
    ]
    # F and B of 1 and 3 units: two columns, the first of which is half F and half B.
    result = simulated("1f1b", 1, 1, Costs(F=1, B=3))
    assert paint.shares(result, 0, 2) == {"F": [0.5, 0.0], "B": [0.5, 1.0]}


def test_many_ranks_are_painted_and_their_memory_is_a_band(tmp_path: Path) -> None:
    result = simulated("1f1b", 64, 512)
    figure = figure_of(result)
    steps, held = figure.axes
    assert (len(steps.images), len(steps.patches), len(steps.texts)) == (1, 0, 0)
    legend = figure.legends[0]
    assert legend.get_title().get_text() == (
        "a column: the shares of its time, F from above, B from below; empty: idle"
    )
    assert not any(patch.get_hatch() for patch in legend.get_patches())
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
