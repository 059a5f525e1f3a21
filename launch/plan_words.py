"""Numbers and layouts of a plan as people read them: in the table and on the page alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from .plan_answer import GIB, Answer, Candidate

if TYPE_CHECKING:
    from ..predict.layout import Layout
    from ..predict.prediction import Note, Prediction, RankMemory

EXTRAPOLATED = "extrapolated"


def ms(time: float) -> str:
    """Milliseconds, to some four digits."""
    return _four(time)


def gib(num_bytes: float) -> str:
    """GiB, to a hundredth, or of less than one to some four digits."""
    size = num_bytes / GIB
    return f"{size:,.2f}" if abs(size) >= 1 else _four(size)


def _four(number: float) -> str:
    for least, digits in ((100, 1), (1, 2), (0.01, 4)):
        if abs(number) >= least:
            return f"{number:,.{digits}f}"
    return f"{number:.2g}" if number else "0"


def percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def is_extrapolated(notes: Sequence[Note]) -> bool:
    return any(note.kind == EXTRAPOLATED for note in notes)


def headline(found: Prediction) -> list[tuple[str, str]]:
    """The numbers that one asks for first: what they are called, and each with its unit."""
    mark = f" ({EXTRAPOLATED})" if is_extrapolated(found.notes) else ""
    lines = [
        ("step", f"{ms(found.step_ms)} ms{mark}"),
        ("tokens/s", f"{found.tokens_per_second:,.0f}{mark}"),
        ("GPU hours per 10^12 tokens", f"{found.gpu_hours_per_trillion:,.0f}{mark}"),
    ]
    if found.mfu is not None:
        lines.append(("MFU", f"{found.mfu:.1%}{mark}"))
    return lines


def fits(answer: Answer) -> str:
    """Whether it fits in memory, in a sentence."""
    found = answer.prediction
    most = found.memory[answer.fullest].total
    if not found.memory_bytes:
        return f"The fullest rank, {answer.fullest}, holds {gib(most)} GiB."
    over = most - found.memory_bytes
    how = f"{gib(over)} GiB too much" if over > 0 else f"{gib(-over)} GiB are free"
    verdict = "does not fit" if over > 0 else "fits"
    return (
        f"It {verdict} in memory: rank {answer.fullest}, the fullest, holds {gib(most)} of "
        f"{gib(found.memory_bytes)} GiB; {how}."
    )


def does_not_fit(answer: Answer) -> str:
    """What its fullest rank lacks, where it lacks memory."""
    found = answer.prediction
    return (
        f"this layout does not fit in memory: rank {answer.fullest} needs "
        f"{gib(answer.over_bytes)} GiB more than the {gib(found.memory_bytes)} GiB of a GPU"
    )


def layout_words(layout: Layout) -> list[tuple[str, str]]:
    """The keys of a layout that matter, as texts."""
    return list(_layout(layout))


def _layout(layout: Layout) -> Iterator[tuple[str, str]]:
    yield "pp x dp", f"{layout.pp} x {layout.dp}"
    yield "ep", str(layout.ep)
    yield "schedule", layout.schedule + _of_rank(layout)
    yield "micro-batches", f"{layout.microbatches} of {layout.sequences} x {layout.length}"
    if layout.layers is not None:
        yield "layers of the stages", runs(layout.layers)
    yield "format", _format(layout)
    yield "dispatch", dispatch(layout)
    yield "made again", made_again(layout)
    yield (
        "optimizer",
        f"moments {layout.moments}, ZeRO-{layout.zero}"
        + (", average on the host" if layout.ema else ""),
    )
    yield "overlap", "on" if layout.overlap else "off"


def runs(layers: Sequence[int]) -> str:
    """Layers of stages, those in a row with as many together, such as 3, 14x4, 2."""
    alike = [(count, len(list(same))) for count, same in groupby(layers)]
    return ", ".join(f"{times}x{count}" if times > 1 else str(count) for count, times in alike)


def on_host(memory: RankMemory) -> dict[str, int]:
    """What a rank has in the host's memory, bytes, by what it is."""
    return {
        "host: moving average": memory.host - memory.staging,
        "host: checkpoint's copy": memory.staging,
    }


def _of_rank(layout: Layout) -> str:
    return "" if layout.stages_per_rank is None else f", {layout.stages_per_rank} stages a rank"


def _format(layout: Layout) -> str:
    return f"{layout.dtype}, products in FP8" if layout.fp8 else layout.dtype


def dispatch(layout: Layout) -> str:
    """The dispatcher, its payload and its SMs."""
    if layout.ep == 1:
        return "none"
    sms = "" if layout.comm_sms is None else f", {layout.comm_sms} SMs"
    return f"{layout.dispatcher}, {layout.payload}{sms}"


def made_again(layout: Layout) -> str:
    """What the backward computes a second time."""
    norms, up = layout.recompute_norms, layout.recompute_up_projections
    names = [name for name, on in (("norms", norms), ("up-projections", up)) if on]
    return ", ".join(names) or "nothing"


def _schedule(layout: Layout) -> str:
    stages = layout.stages_per_rank
    return layout.schedule if stages is None else f"{layout.schedule} {stages}"


def _short_dispatch(layout: Layout) -> str:
    if layout.ep == 1:
        return "none"
    return f"{layout.dispatcher} {layout.payload} {layout.comm_sms or '-'}"


def _short_again(layout: Layout) -> str:
    norms, up = layout.recompute_norms, layout.recompute_up_projections
    return " ".join(name for name, on in (("norms", norms), ("up", up)) if on) or "-"


def _layers(layout: Layout) -> str:
    return "-" if layout.layers is None else runs(layout.layers)


Cells = dict[str, Callable[["Candidate"], str]]

_MESH: Cells = {
    "pp": lambda c: str(c.layout.pp),
    "dp": lambda c: str(c.layout.dp),
    "ep": lambda c: str(c.layout.ep),
    "schedule": lambda c: _schedule(c.layout),
    "micro-batches": lambda c: f"{c.layout.microbatches} x {c.layout.sequences}",
}
_CHOSEN: Cells = {
    "FP8": lambda c: "on" if c.layout.fp8 else "off",
    "dispatch": lambda c: _short_dispatch(c.layout),
    "made again": lambda c: _short_again(c.layout),
    "ZeRO": lambda c: str(c.layout.zero),
    "moments": lambda c: c.layout.moments,
}
_LAYERS: Cells = {"layers": lambda c: _layers(c.layout)}
_NUMBERS: Cells = {
    "GiB": lambda c: gib(c.memory_bytes),
    "MFU": lambda c: "-" if c.mfu is None else f"{c.mfu:.1%}",
    "GPU hours": lambda c: f"{c.gpu_hours:,.0f}",
    "step, ms": lambda c: ms(c.step_ms),
}


def search_cells(best: Sequence[Candidate]) -> tuple[Cells, str]:
    """What stands in each column of a search's table, and what is the same in all rows.

    What is chosen has a column where the rows differ in it. Layers of stages have one where rows
    would look the same without.
    """
    differ = {name: cell for name, cell in _CHOSEN.items() if len({cell(c) for c in best}) > 1}
    alike = [f"{name} {cell(best[0])}" for name, cell in _CHOSEN.items() if name not in differ]
    shown = {**_MESH, **differ}
    by_layers = len({tuple(cell(c) for cell in shown.values()) for c in best}) < len(best)
    layers = _LAYERS if by_layers else {}
    return {**shown, **layers, **_NUMBERS}, "; ".join(alike)
