"""The report at the end of a training run: `report.html`, which needs no network, and its pictures.

Works without matplotlib: the page then has its tables and says how to get the pictures.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from .palette import DARK, LIGHT
from .run_data import (
    KINDS,
    Load,
    RunData,
    Timeline,
    idle_share,
    makespan_ms,
    number,
    read_run,
    series,
)

_HOW_TO_GET_PICTURES = (
    "The pictures need matplotlib: pip install 'counterflow[plots]', then write the report again."
)
_MAX_EVENTS = 200
# What comes first in the table of results, with its unit; the rest follows as it is.
_RESULTS = {
    "train_loss": "nats per token",
    "validation_loss": "nats per token",
    "unigram_entropy": "nats per token",
    "tokens_per_second": "tokens / s",
    "seconds": "s",
    "steps": "",
    "world_size": "processes",
}
# Units of what follows.
_UNITS = {
    **_RESULTS,
    "dispatch.sent_bytes": "bytes, all ranks",
    "dispatch.crossed_bytes": "bytes, all ranks",
    "fp8.weight_bytes": "bytes, all ranks",
}


def write_report(folder: Path | str, result: dict[str, Any] | None = None) -> Path:
    """Write `report.html` and, where matplotlib is installed, its pictures into a run's folder.

    Args:
        folder: `runs/NAME`, with what `run_data` reads.
        result: in place of what result.json says, of a run that has not written it yet.

    Returns:
        The path of `report.html`.

    Raises:
        ValueError: the folder or a file in it is not what training writes.
    """
    folder = Path(folder)
    run = read_run(folder)
    if result is not None:
        run = replace(run, result=result)
    path = folder / "report.html"
    path.write_text(to_html(run, _pictures(run, folder)), encoding="utf-8")
    return path


def _pictures(run: RunData, folder: Path) -> dict[str, str] | None:
    """Pictures by name as inline SVG, and as files in `folder`; None without matplotlib."""
    try:
        from . import plots
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        return None
    figures = {}
    if run.train or run.validation:
        figures["loss"] = plots.loss_figure(run)
    if run.timeline is not None:
        figures["timeline"] = plots.timeline_figure(run.timeline)
    if run.loads:
        figures["load"] = plots.load_figure(run.loads)
    inline = {}
    for name, figure in figures.items():
        svg = plots.to_svg(figure)
        (folder / f"{name}.svg").write_text(plots.on_white(svg), encoding="utf-8")
        plots.save_png(figure, folder / f"{name}.png")
        inline[name] = plots.inline(svg, name)
    return inline


def to_html(run: RunData, pictures: Mapping[str, str] | None) -> str:
    """The page. A pure function of its arguments.

    Args:
        run: what to show.
        pictures: "loss", "timeline", "load" -> <svg> element; None where there can be none.
    """
    drawn = pictures or {}
    parts = [
        _result_section(run),
        "" if pictures is not None else f'<p class="note">{escape(_HOW_TO_GET_PICTURES)}</p>',
        _loss_section(run, drawn.get("loss", "")),
        _events_section(run.events),
        _timeline_section(run.timeline, drawn.get("timeline", "")),
        _load_section(run.loads, drawn.get("load", "")),
    ]
    title = escape(run.name)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title} - counterflow run</title>\n<style>{_css()}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n" + "\n".join(part for part in parts if part) + "\n</body>\n</html>\n"
    )


def _result_section(run: RunData) -> str:
    flat = _flatten(run.result)
    order = [key for key in _RESULTS if key in flat] + [key for key in flat if key not in _RESULTS]
    rows = [(key.replace("_", " "), _show(flat[key]), _UNITS.get(key, "")) for key in order]
    if not rows:
        return '<p class="note">result.json is not there: the run has not ended in order.</p>'
    return (
        f"{_verdict(run)}\n{_precision(run)}<h2>Result</h2>\n{_table(('', 'value', 'unit'), rows)}"
    )


def _verdict(run: RunData) -> str:
    """One sentence: how far the model is under what counting tokens alone would reach."""
    loss, entropy = number(run.result.get("validation_loss")), run.unigram_entropy
    if loss is None or entropy is None or not math.isfinite(loss):
        return ""
    gap = entropy - loss
    side = "under" if gap >= 0 else "above"
    return (
        f'<p class="verdict">Validation loss <strong>{loss:.3f}</strong> nats per token, '
        f"<strong>{abs(gap):.3f}</strong> {side} the unigram entropy of {entropy:.3f}.</p>"
    )


def _precision(run: RunData) -> str:
    """One sentence: what ran in FP8; nothing where nothing did."""
    fp8 = run.fp8
    if not fp8.get("enabled"):
        return ""
    names = dict.fromkeys(name for found in fp8.get("backends", {}).values() for name in found)
    text = (
        f"Linear layers ran in FP8: scales {fp8.get('scales')}, gradients "
        f"{fp8.get('gradient_format')}, products by {', '.join(names)} ({fp8.get('why')}); "
        f"{_show(fp8.get('weight_bytes'))} bytes of weights in FP8."
    )
    return f"<p>{escape(text)}</p>\n"


def _loss_section(run: RunData, picture: str) -> str:
    if not run.train and not run.validation:
        return ""
    rows = [(_show(line.get("step")), _show(line.get("loss"))) for line in run.validation]
    _, speeds = series(run.train, "tokens_per_second")
    speed = ""
    if speeds:
        speed = (
            f"<p>Tokens per second: median {_show(median(speeds))}, "
            f"lowest {_show(min(speeds))}, highest {_show(max(speeds))}.{_shares(run)}</p>"
        )
    return (
        "<h2>Loss and speed</h2>\n"
        + _figure(picture, "Loss by step, with the unigram entropy; speed and balance below")
        + speed
        + _details("Validation losses", _table(("step", "loss, nats per token"), rows), rows)
    )


def _events_section(events: Sequence[Mapping[str, Any]]) -> str:
    """Where the run was stopped, went on, skipped a batch: nothing of one that just ran."""
    if not events:
        return ""
    counts = Counter(str(event.get("kind")).replace("_", " ") for event in events)
    told = ", ".join(f"{kind} {count}" for kind, count in counts.items())
    rows = [
        (_show(e.get("step")), str(e.get("kind")).replace("_", " "), str(e.get("text", "")))
        for e in events[-_MAX_EVENTS:]
    ]
    which = f"The last {_MAX_EVENTS}" if len(events) > _MAX_EVENTS else "All"
    table = _table(("after step", "what", "said"), rows)
    return f"<h2>Out of the ordinary</h2>\n<p>{escape(told)}.</p>\n" + _details(which, table, rows)


def _shares(run: RunData) -> str:
    """What the GPUs' peak was used for, and what of a step was waiting, where it was measured."""
    _, used = series(run.train, "mfu")
    _, exposed = series(run.train, "exposed_comm_percent")
    text = f" Model FLOPs utilisation: median {median(used):.1%}." if used else ""
    if exposed:
        text += f" Rank 0 waited for other ranks in {median(exposed):.1f} % of a step (median)."
    return text


def _timeline_section(timeline: Timeline | None, picture: str) -> str:
    if timeline is None:
        return ""
    measured = timeline.measured
    rows = [("measured", f"{makespan_ms(measured):.4g}", f"{100 * idle_share(measured):.1f} %")]
    if timeline.planned is not None:
        planned = timeline.planned
        rows.append(
            ("planned", f"{makespan_ms(planned):.4g}", f"{100 * idle_share(planned):.1f} %")
        )
        ratio = makespan_ms(measured) / makespan_ms(planned)
        note = (
            f"As planned, each step costs the median of what its kind was measured to cost on its "
            f"stage, and transfers cost nothing. Measured / planned: {ratio:.3f}."
        )
    else:
        note = f"The plan cannot be shown: {timeline.why_no_plan}"
    kinds = [
        (kind, str(len(times)), f"{median(times):.4g}", f"{min(times):.4g}", f"{max(times):.4g}")
        for kind in KINDS
        if (times := timeline.durations_ms(kind))
    ]
    return (
        f"<h2>One step: {escape(timeline.name)}</h2>\n"
        + _figure(picture, "Timeline of one step, a row a rank: as measured, and as planned")
        + f"<p>{escape(note)} A bar's label is stage, kind and micro-batch; a pair is drawn as two "
        "lanes. Time spent waiting for messages is drawn at the front of its bar.</p>\n"
        + _table(("", "step, ms", "idle"), rows)
        + _table(("kind", "count", "median, ms", "lowest", "highest"), kinds)
    )


def _load_section(loads: Sequence[Load], picture: str) -> str:
    if not loads:
        return ""
    rows = [
        (
            load.layer,
            _show(min(load.tokens)),
            _show(sum(load.tokens) / len(load.tokens)),
            _show(max(load.tokens)),
            f"{load.max_vio:.3f}",
        )
        for load in loads
    ]
    return (
        "<h2>Load of the experts</h2>\n"
        + _figure(picture, "Load of each expert over the mean of its layer")
        + "<p>Tokens routed to each expert in the last steps. MaxVio is how far the busiest "
        "expert is above the mean: 0 is balanced.</p>\n"
        + _table(("layer", "lowest", "mean", "highest", "MaxVio"), rows)
    )


def _figure(picture: str, caption: str) -> str:
    if not picture:
        return ""
    text = escape(caption)
    svg = picture.replace("<svg", f'<svg role="img" aria-label="{text}"', 1)
    return f'<figure><div class="wide">{svg}</div><figcaption>{text}</figcaption></figure>\n'


def _details(summary: str, body: str, rows: Sequence[object]) -> str:
    if not rows:
        return ""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    header = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{header}</tr>\n{body}</table></div>\n'


def _flatten(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """{"mesh": {"pp": 2}} -> {"mesh.pp": 2}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = value
    return flat


def _show(value: object) -> str:
    as_number = number(value)
    if as_number is None:
        return value if isinstance(value, str) else json.dumps(value)
    if not math.isfinite(as_number):
        return str(as_number)
    if as_number.is_integer() or abs(as_number) >= 1000:
        return f"{as_number:,.0f}"
    return f"{as_number:.4g}"


def _css() -> str:
    light, dark = (
        "; ".join(f"--{name}: {colour}" for name, colour in palette.items())
        for palette in (LIGHT, DARK)
    )
    return (
        f"\n:root {{ {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{_RULES}"
    )


_RULES = """\
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.verdict { font-size: 1.1rem; }
.note { border-left: 4px solid var(--second); padding: 0.3rem 0.8rem; }
.wide { overflow-x: auto; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; }
figcaption, th { color: var(--faint); font-size: 0.85rem; }
table { border-collapse: collapse; margin: 0.8rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 0.2rem 0.9rem; border-bottom: 1px solid var(--grid);
  font-weight: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
"""
