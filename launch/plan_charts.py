"""The charts of a plan's page as SVG elements: no script, no library; colours are the page's."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..predict.prediction import RankMemory, RankTime, Share
from .plan_answer import GIB
from .plan_words import gib, ms, percent

_WIDTH = 900.0
_ROW = 30.0  # of the waterfall, one piece
_NAMES = 270.0  # at its left
_NUMBERS = 150.0  # at its right
_BAR = 26.0  # of a rank
_LEFT, _RIGHT = 60.0, 12.0
_COLOURS = 16  # of the page


def waterfall(shares: Sequence[Share]) -> str:
    """Each piece of the way from the ideal step to the predicted one, where the last one ended."""
    ends: list[float] = []
    for share in shares:
        ends.append((ends[-1] if ends else 0.0) + share.ms)
    total = ends[-1]
    most = max(*ends, total, 1e-12)
    scale = (_WIDTH - _NAMES - _NUMBERS) / most
    parts: list[str] = []
    rows = [
        (share.name, share.ms, (end - share.ms, end), "ideal" if not place else _sign(share.ms))
        for place, (share, end) in enumerate(zip(shares, ends, strict=True))
    ]
    rows.append(("predicted", total, (0.0, total), "total"))
    for place, (name, time, (start, end), kind) in enumerate(rows):
        top = place * _ROW
        left, right = (_NAMES + scale * min(start, end), _NAMES + scale * max(start, end))
        signed = f"{'+' if kind == 'more' else ''}{ms(time)}"
        parts.append(
            f'<text x="{_NAMES - 8:g}" y="{top + 19:g}" class="name">{escape(name)}</text>'
            f'<rect x="{left:.1f}" y="{top + 5:g}" width="{max(right - left, 1):.1f}" '
            f'height="{_ROW - 10:g}" class="{kind}"><title>{escape(name)}: {signed} ms'
            f"</title></rect>"
            f'<text x="{right + 6:.1f}" y="{top + 19:g}">{signed} ms, '
            f"{percent(time, total)}</text>"
        )
        if place + 1 < len(rows) - 1:
            at = _NAMES + scale * end
            parts.append(f'<path class="step" d="M{at:.1f} {top + _ROW - 5:g}v10"/>')
    return _svg("waterfall", "From the ideal step to the predicted one", len(rows) * _ROW, parts)


def _sign(time: float) -> str:
    return "more" if time >= 0 else "less"


def stacked(memory: Sequence[RankMemory], limit: int) -> str:
    """Each pipeline rank's memory by category, GiB, and the GPU's as a line."""
    names = categories(memory)
    bars = [
        (str(rank), [(name, of.parts[name] / GIB, gib(of.parts[name])) for name in names])
        for rank, of in enumerate(memory)
    ]
    return _bars("memory", "Memory of each pipeline rank", "GiB", bars, limit / GIB)


def times(ranks: Sequence[RankTime]) -> str:
    """Each pipeline rank's step by what it does, ms."""
    bars = [
        (str(rank), [(name, of, ms(of)) for name, of in time._asdict().items()])
        for rank, time in enumerate(ranks)
    ]
    return _bars("times", "Where each pipeline rank's step goes", "ms", bars, 0.0)


def categories(memory: Sequence[RankMemory]) -> list[str]:
    """Those that any rank has something of."""
    return [name for name in memory[0].parts if any(of.parts[name] for of in memory)]


def key(names: Sequence[str]) -> str:
    """What the colours of stacked bars mean."""
    items = "".join(
        f'<li><svg viewBox="0 0 26 14" aria-hidden="true"><rect width="26" height="14" '
        f'class="{_colour(name, place)}"/></svg>{escape(name)}</li>'
        for place, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def _colour(name: str, place: int) -> str:
    """Its class on the page: time in which nothing runs stays in the background."""
    return "idle" if name == "bubble" else f"k{place % _COLOURS}"


def _bars(
    kind: str,
    title: str,
    unit: str,
    bars: Sequence[tuple[str, Sequence[tuple[str, float, str]]]],
    limit: float,
) -> str:
    """Bars from left to right, one a rank, each a stack of parts; `limit` is drawn as a line."""
    totals = [sum(value for _, value, _ in parts) for _, parts in bars]
    most = max(*totals, limit, 1e-12) * 1.04
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    shown: list[str] = []
    for place, (rank, parts) in enumerate(bars):
        top, left = place * _BAR, _LEFT
        shown.append(f'<text x="{_LEFT - 8:g}" y="{top + 17:g}" class="name">rank {rank}</text>')
        for number, (name, value, text) in enumerate(parts):
            wide = scale * value
            if wide > 0:
                shown.append(
                    f'<rect x="{left:.1f}" y="{top + 3:g}" width="{wide:.1f}" '
                    f'height="{_BAR - 6:g}" class="{_colour(name, number)}"><title>rank {rank}, '
                    f"{escape(name)}: {text} {unit}</title></rect>"
                )
            left += wide
    tall = len(bars) * _BAR
    if limit:
        at = _LEFT + scale * limit
        shown.append(
            f'<path class="limit" d="M{at:.1f} 0V{tall:g}"/><text x="{at - 4:.1f}" '
            f'y="{tall + 32:g}" class="name">the GPU has {limit:,.1f}</text>'
        )
    return _svg(kind, title, tall + 38, [*_axis(most, scale, tall, unit), *shown])


def _axis(most: float, scale: float, tall: float, unit: str) -> list[str]:
    """Ticks under the bars at round numbers, some five of them."""
    step = 10.0 ** (len(str(int(most))) - 1) if most >= 1 else 0.1
    while most / step < 4:
        step /= 2
    marks: list[str] = []
    for number in range(int(most / step) + 1):
        at = _LEFT + scale * number * step
        marks.append(
            f'<path class="grid" d="M{at:.1f} 0V{tall:g}"/>'
            f'<text x="{at:.1f}" y="{tall + 15:g}" class="tick">{number * step:,g}</text>'
        )
    return [*marks, f'<text x="{_LEFT - 8:g}" y="{tall + 15:g}" class="name">{unit}</text>']


def _svg(kind: str, title: str, tall: float, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {_WIDTH:g} {tall:g}" role="img" '
        f'aria-label="{escape(title)}. The table has the numbers.">{"".join(parts)}</svg>'
    )
