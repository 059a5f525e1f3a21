"""A page to look around in a simulated step: one HTML file, without network and libraries.

`page.js` and `page_draw.js` draw what `page_data` gives them; here are the frame and a summary that
can be read without any script.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from ...schedule import Op, Pair, actions
from ..analysis import idle_by_cause
from ..events import Result
from ..memory import RankMemory
from .look import (
    DARK,
    FINISH_MEANINGS,
    LIGHT,
    MEANINGS,
    NEUTRAL,
    ON_BAR,
    Shades,
    count,
    paler,
    sizes,
    stack_meaning,
)
from .page_data import page_data

_HOW = (
    "Wheel or two fingers zoom, dragging moves. Keys: + and - zoom, arrows move along time and "
    "ranks, comma and full stop go from step to step, 0 shows all."
)


def page(result: Result, memories: Sequence[RankMemory], *, memory_unit: str = "chunks") -> str:
    """The page, as HTML.

    Args:
        result: the simulated step.
        memories: what each rank holds, of the same result.
        memory_unit: `Memory.unit` of what the memories were made from.
    """
    title = escape(f"{result.schedule}, {sizes(result)}")
    data = json.dumps(page_data(result, memories, memory_unit), separators=(",", ":"))
    summary = _summary(result)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>\n{_colours()}{_text_of('page.css')}</style>\n</head>\n"
        f"<body>\n<h1>{title}</h1>\n<p>{summary}</p>\n{_tools(result)}\n{_legend(result)}\n"
        '<div class="view"><canvas id="steps" tabindex="0" role="img" '
        f'aria-label="The steps of each rank over time, and memory below. {summary} {_HOW} '
        'The table below has the numbers."></canvas>'
        '<div id="tip" role="status" hidden></div></div>\n'
        '<noscript><p class="note">The picture needs JavaScript, the table does not.</p>'
        "</noscript>\n"
        f'<p class="note">{_HOW}</p>\n{_table(result, memories, memory_unit)}\n'
        f'<script type="application/json" id="data">{_in_script(data)}</script>\n'
        f"<script>\n{_text_of('page.js')}{_text_of('page_draw.js')}</script>\n</body>\n</html>\n"
    )


def _text_of(name: str) -> str:
    return (files(__spec__.parent) / name).read_text(encoding="utf-8")


def _in_script(data: str) -> str:
    """JSON that cannot end the element that it stands in."""
    return data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _colours() -> str:
    light, dark = (
        "".join(f"--{name}:{colour};" for name, colour in colours.items())
        for colours in (LIGHT, DARK)
    )
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"


def _with_unit(time: float, result: Result) -> str:
    return escape(f"{time:.6g} {result.costs.unit}".strip())


def _summary(result: Result) -> str:
    idle = sum(result.idle)
    ranks = count(result.ranks, "rank", "ranks together")
    return (
        f"Makespan {_with_unit(result.makespan, result)}, bubble {result.bubble_rate:.2%}: "
        f"{_with_unit(idle, result)} of idle time on {ranks}."
    )


def _tools(result: Result) -> str:
    boxes = [("critical", "critical path"), ("messages", "messages between ranks")]
    if result.costs.phases is not None:
        boxes.append(("phases", "lanes of computation and communication"))
    return (
        '<div class="tools"><button id="in" aria-label="zoom in">+</button>'
        '<button id="out" aria-label="zoom out">−</button><button id="reset">show all</button>'
        + "".join(
            f'<label><input type="checkbox" id="{name}"> {text}</label>' for name, text in boxes
        )
        + "</div>"
    )


def _legend(result: Result) -> str:
    """What occurs. Of what is said of bars or of stacks, the script shows what it draws."""
    steps = [step for row in result.plan.rows for step in row]
    ops = {action.op.value for step in steps for action in actions(step)}
    kinds = {part.kind for row in result.finish for part in row}
    keys = [("", _swatch([op]), MEANINGS[op]) for op in Op if op.value in ops]
    if any(isinstance(step, Pair) for step in steps):
        keys.append(("bars", _swatch(["F", "B"]), "pair: F above, B below, at once"))
    shades = Shades(result.plan.placement)
    for number, name in enumerate(shades.names):
        grey = f'fill="{paler(NEUTRAL, shades.white(number))}"'
        keys.append(("bars", _drawing(_lane(grey, 0, 14)), name))
    keys += [("", _swatch([kind]), text) for kind, text in FINISH_MEANINGS.items() if kind in kinds]
    if result.costs.phases is not None:
        text = "below a step: computation; under that, communication"
        keys.append(("bars", _swatch(["F", "I"]), text))
    stack = [kind for kind in "FBIW" if kind in ops]
    keys.append(("stacks", _swatch(stack), stack_meaning(ops)))
    items = "".join(
        f'<li class="{shown}">{swatch}{escape(text)}</li>' for shown, swatch, text in keys
    )
    return f'<ul class="legend" id="legend">{items}</ul>'


_HATCH_PATHS = {
    "B": "M2 14L12 0M10 14L20 0M18 14L26 3",
    "I": "M2 0L12 14M10 0L20 14M18 0L26 11",
    "W": "M0 4H26M0 10H26",
}


def _swatch(kinds: Sequence[str]) -> str:
    """A small bar; of several kinds one above the other."""
    tall = 14 / len(kinds)
    lanes = "".join(
        _lane(f'style="fill:var(--{kind})"', tall * lane, tall) for lane, kind in enumerate(kinds)
    )
    path = _HATCH_PATHS.get(kinds[0], "") if len(kinds) == 1 else ""
    hatch = f'<path class="bars" d="{path}" stroke="#fff" stroke-opacity="0.6"/>' if path else ""
    return _drawing(lanes + hatch)


def _lane(fill: str, top: float, tall: float) -> str:
    return f'<rect y="{top:g}" width="26" height="{tall:g}" {fill} stroke="{ON_BAR}"/>'


def _drawing(parts: str) -> str:
    return f'<svg viewBox="0 0 26 14" aria-hidden="true">{parts}</svg>'


def _table(result: Result, memories: Sequence[RankMemory], memory_unit: str) -> str:
    unit = escape(f" ({result.costs.unit})" if result.costs.unit else "")
    size = escape(f" ({memory_unit})" if memory_unit else "")
    head = (
        "rank",
        "stages",
        f"busy{unit}",
        f"idle{unit}",
        "idle",
        f"for other ranks{unit}",
        f"for messages under way{unit}",
        f"after the row{unit}",
        f"done before others{unit}",
        "peak activations (chunks)",
        f"peak memory{size}",
    )
    rows: list[str] = []
    for rank, idle in enumerate(idle_by_cause(result)):
        cells = (
            str(rank),
            escape(" ".join(map(str, result.plan.placement.stages(rank)))),
            *(f"{time:.6g}" for time in (result.busy[rank], result.idle[rank])),
            f"{result.idle[rank] / result.makespan:.1%}",
            *(
                f"{time:.6g}"
                for time in (sum(idle.on_rank.values()), idle.travelling, idle.finish, idle.end)
            ),
            str(result.peak_activations[rank]),
            f"{memories[rank].peak:.6g}",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    header = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return (
        '<h2>By rank</h2>\n<div class="scroll"><table>\n'
        f"<thead><tr>{header}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n"
        "</table></div>"
    )
