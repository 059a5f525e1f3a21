"""A plan as a page: one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ..parallel.simulate import Memory, memory_of
from ..parallel.simulate.draw.page import page
from ..predict.prediction import Prediction, RankTime
from .plan_answer import Answer, Searched
from .plan_charts import categories, key, stacked, times, waterfall
from .plan_words import (
    fits,
    gib,
    headline,
    layout_words,
    ms,
    on_host,
    percent,
    search_cells,
)

_STYLE = """
:root { --paper: #fefffe; --ink: #1d2129; --faint: #646b78; --grid: #dfe2e8; --limit: #c8102e;
  --k0: #5a94c8; --k1: #f0b84a; --k2: #85cabb; --k3: #b899d9; --k4: #e39a86; --k5: #c8d08a;
  --k6: #8793a8; --k7: #c39f85; --k8: #d98ab5; --k9: #b9bec8; --k10: #3f6ea3; --k11: #b3762a;
  --k12: #3d8c79; --k13: #7e5aa6; --k14: #a85b48; --k15: #8c9440; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181d; --ink: #e4e7ec; --faint: #a2aab8;
  --grid: #2f353f; --limit: #ff6b7d; --k0: #4c82b3; --k1: #c9983a; --k2: #5fa596; --k3: #9273b8;
  --k4: #bd735f; --k5: #98a05a; --k6: #6b7790; --k7: #9b7a62; --k8: #ad648d; --k9: #7f8692;
  --k10: #8fbde6; --k11: #f2cf85; --k12: #a3dccd; --k13: #cdb3ea; --k14: #eeb09e;
  --k15: #dbe3a0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 1rem 1.25rem 3rem; background: var(--paper);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.35rem; overflow-wrap: anywhere; }
h2 { margin: 1.6rem 0 0.4rem; font-size: 1.1rem; }
p { margin: 0.3rem 0 0.6rem; }
.note { color: var(--faint); font-size: 0.87rem; }
.loud { padding: 0.3rem 0.8rem; border-left: 4px solid var(--limit); }
.numbers { display: flex; flex-wrap: wrap; gap: 0.4rem 2.2rem; margin: 0.8rem 0; padding: 0; }
.numbers li { list-style: none; color: var(--faint); }
.numbers b { display: block; color: var(--ink); font-size: 1.25rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; margin: 0.5rem 0; padding: 0; }
.legend li { list-style: none; font-size: 0.87rem; }
.legend svg { width: 26px; height: 14px; margin-right: 0.4rem; vertical-align: -2px; }
.chart { display: block; width: 100%; height: auto; font: 13px system-ui, sans-serif; }
.chart text { fill: var(--ink); }
.chart .name { text-anchor: end; }
.chart .tick { text-anchor: middle; fill: var(--faint); }
.grid, .step { stroke: var(--grid); fill: none; }
.step { stroke: var(--faint); }
.limit { stroke: var(--limit); stroke-width: 2; stroke-dasharray: 6 4; fill: none; }
.ideal { fill: var(--k2); } .more { fill: var(--k4); } .less { fill: var(--k0); }
.total { fill: var(--k6); } .idle { fill: var(--grid); }
.k0 { fill: var(--k0); } .k1 { fill: var(--k1); } .k2 { fill: var(--k2); } .k3 { fill: var(--k3); }
.k4 { fill: var(--k4); } .k5 { fill: var(--k5); } .k6 { fill: var(--k6); } .k7 { fill: var(--k7); }
.k8 { fill: var(--k8); } .k9 { fill: var(--k9); } .k10 { fill: var(--k10); }
.k11 { fill: var(--k11); } .k12 { fill: var(--k12); } .k13 { fill: var(--k13); }
.k14 { fill: var(--k14); } .k15 { fill: var(--k15); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.7rem; border-bottom: 1px solid var(--grid); text-align: right;
  vertical-align: top; }
th { font-weight: 600; }
.words { text-align: left; }
iframe { width: 100%; border: 1px solid var(--grid); border-radius: 4px; }
"""
_KINDS = {"source": "from", "assumed": "assumed", "extrapolated": "extrapolated"}


def to_html(answer: Answer) -> str:
    """The page. A pure function of the answer."""
    found = answer.prediction
    title = escape(
        f"{answer.model} on {found.layout.world_size:,} x {found.cluster.gpu.name}: "
        f"{ms(found.step_ms)} ms a step"
    )
    body = "\n".join(
        [
            f"<h1>{title}</h1>",
            _summary(answer),
            _waterfall(found),
            _ranks(found),
            _memory(answer),
            _schedule(found),
            _layout(answer),
            "" if answer.searched is None else _search(answer.searched),
            _notes(found),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n"
        "</html>\n"
    )


def _summary(answer: Answer) -> str:
    found = answer.prediction
    numbers = "".join(
        f"<li>{escape(name)}<b>{escape(value)}</b></li>" for name, value in headline(found)
    )
    loud = "" if found.fits else ' class="loud"'
    return (
        f'<ul class="numbers">{numbers}</ul>\n<p{loud}>{escape(fits(answer))}</p>\n'
        f"<p>What limits it: {escape(found.limit)}</p>\n"
        f'<p class="note">Speeds from {escape(answer.calibration)}; layout from '
        f"{escape(answer.given)}. A prediction; notes on what it rests on are below.</p>"
    )


def _waterfall(found: Prediction) -> str:
    rows = [
        [share.name, ms(share.ms), percent(share.ms, found.step_ms), share.why]
        for share in found.waterfall
    ]
    return _section(
        "From the ideal step to the predicted one",
        waterfall(found.waterfall),
        _table(["", "ms", "of the step", "why"], rows, words=(0, 3)),
    )


def _ranks(found: Prediction) -> str:
    rows = [[str(rank), *map(ms, of), ms(of.total)] for rank, of in enumerate(found.ranks)]
    return _section(
        "Where each pipeline rank's step goes",
        key(RankTime._fields),
        times(found.ranks),
        _folded("In numbers, ms", _table(["rank", *RankTime._fields, "step"], rows)),
    )


def _memory(answer: Answer) -> str:
    found = answer.prediction
    names = categories(found.memory)
    rows = [
        [
            str(rank),
            *(gib(of.parts[name]) for name in names),
            gib(of.total),
            *map(gib, on_host(of).values()),
        ]
        for rank, of in enumerate(found.memory)
    ]
    saved = ""
    if answer.saved:
        told = [[name, gib(of)] for name, of in answer.saved.items()]
        head = ["what saves", f"GiB on rank {answer.fullest}"]
        saved = _table(head, told, words=(0,))
    table = _table(["rank", *names, "total", *on_host(found.memory[0])], rows)
    return _section(
        "Memory",
        key(names),
        stacked(found.memory, found.memory_bytes),
        _folded("In numbers, GiB", table),
        saved,
    )


def _schedule(found: Prediction) -> str:
    """The picture of `counterflow simulate --plot`, a page of its own inside this one."""
    inner = page(found.result, memory_of(found.result, Memory()))
    tall = min(900, 420 + 40 * found.result.ranks)
    return _section(
        "The schedule",
        '<p class="note">One pipeline, without what varies from rank to rank.</p>',
        f'<iframe title="The simulated step" height="{tall}" srcdoc="{escape(inner)}"></iframe>',
    )


def _layout(answer: Answer) -> str:
    rows = [[name, value] for name, value in layout_words(answer.layout)]
    return _section("The layout", _table(["key", "value"], rows, words=(0, 1)))


def _search(searched: Searched) -> str:
    cells, alike = search_cells(searched.best)
    rows = [[cell(of) for cell in cells.values()] for of in searched.best]
    cannot = [[of.constraint, f"{of.count:,}", of.example] for of in searched.refused]
    return _section(
        searched.words[0].upper() + searched.words[1:],
        _table(list(cells), rows),
        f"<p>In all of them: {escape(alike)}.</p>" if alike else "",
        "<h2>What cannot run</h2>" if cannot else "",
        _table(["constraint", "layouts", "such as"], cannot, words=(0, 2)) if cannot else "",
    )


def _notes(found: Prediction) -> str:
    rows = [[_KINDS[note.kind], note.text] for note in found.notes]
    return _section("What it rests on", _table(["", ""], rows, words=(0, 1))) if rows else ""


def _section(title: str, *parts: str) -> str:
    inner = "\n".join(filter(None, parts))
    return f"<section><h2>{escape(title)}</h2>\n{inner}\n</section>"


def _folded(title: str, inner: str) -> str:
    return f"<details><summary>{escape(title)}</summary>\n{inner}\n</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: Sequence[int] = ()) -> str:
    """A table; columns of `words` stand to the left."""

    def cell(tag: str, place: int, text: str) -> str:
        kind = ' class="words"' if place in words else ""
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    top = "".join(cell("th", place, name) for place, name in enumerate(head))
    body = "\n".join(
        f"<tr>{''.join(cell('td', place, text) for place, text in enumerate(row))}</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n'
        "</tbody>\n</table></div>"
    )
