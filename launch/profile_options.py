"""What `counterflow profile` is asked for, checked before any trace is read."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .outputs import Output, check_outputs

if TYPE_CHECKING:
    from ..comm.profile.classify import Rule
    from ..comm.profile.simulated import Simulated
    from .profile_conditions import Condition

# Rows of the tables of kernels and of exposed stretches.
_TOP = 10
_SUFFIXES = {"--html": (".html",), "--perfetto": (".json", ".gz")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add(
        "traces",
        nargs="+",
        metavar="TRACE",
        help="a trace of PyTorch's profiler (.json, .json.gz), a folder with one a rank, or a "
        "run's folder, runs/NAME",
    )
    add("--json", action="store_true", help="print one JSON object")
    add("--html", metavar="FILE", help="write a page with the timeline: .html")
    add("--perfetto", metavar="FILE", help="write a trace for ui.perfetto.dev: .json or .json.gz")
    add(
        "--against",
        metavar="FILE.json",
        help="what counterflow simulate --json or plan --json printed, to compare with",
    )
    add("--kernels", metavar="RULES.toml", help="what kernels are that the table does not know")
    add(
        "--window",
        metavar="NAME|START:END",
        help="what to look at: an annotation that occurs once, such as ProfilerStep#3, or "
        "milliseconds from the trace's begin (all of it)",
    )
    add("--rank", action="append", metavar="N", help="look at this rank alone; may be repeated")
    add(
        "--device",
        metavar="N",
        help="look at this GPU, of several in one trace (that with most activities)",
    )
    add(
        "--phases",
        metavar="PATTERN",
        help="regular expression of the annotations that are phases, without ' layer N' (names "
        "such as dispatch(F))",
    )
    add("--layers", action="store_true", help="show each layer's phases, too")
    add("--top", metavar="N", help=f"rows of kernels and of exposed stretches shown ({_TOP})")
    add(
        "--fail-if",
        action="append",
        metavar="CONDITION",
        help="exit with status 1 where it holds, such as 'exposed_comm_percent>5' or "
        "'phases.dispatch(F).overlapped_percent<80'; may be repeated",
    )


@dataclass(frozen=True)
class Options:
    """What the command is asked for.

    Attributes:
        traces: files or folders.
        window: name of an annotation, or start and end in ms; None: all of the trace.
        ranks: to look at; empty: all.
        device: index of the GPU to look at, or None for that with most activities.
        phase_pattern: regular expression of the annotations that are phases.
        rules: what kernels are, the user's before those of the table.
        simulated: what to compare with, or None.
        conditions: that make the command fail.
        layers, json: whether asked for.
        top: rows of kernels and of exposed stretches to show.
        outputs: files to write.
    """

    traces: tuple[Path, ...]
    window: str | tuple[float, float] | None
    ranks: tuple[int, ...]
    device: int | None
    phase_pattern: str
    rules: tuple[Rule, ...]
    simulated: Simulated | None
    conditions: tuple[Condition, ...]
    layers: bool
    top: int
    json: bool
    outputs: tuple[Output, ...]


def read_options(parsed: argparse.Namespace) -> Options:
    """The options that a command line gives.

    Raises:
        ValueError: one of them makes no sense.
    """
    from ..comm.profile.classify import RULES, load_rules
    from ..comm.profile.phases import PHASE_PATTERN
    from ..comm.profile.simulated import read_simulated
    from .profile_conditions import parse_condition

    traces = tuple(map(Path, parsed.traces))
    outputs = _outputs(parsed)
    check_outputs(outputs, _inputs(parsed))
    return Options(
        traces=traces,
        window=_window(parsed.window),
        ranks=tuple(_whole("--rank", text, 0) for text in parsed.rank or ()),
        device=None if parsed.device is None else _whole("--device", parsed.device, 0),
        phase_pattern=PHASE_PATTERN if parsed.phases is None else _pattern(parsed.phases),
        rules=tuple(RULES) if parsed.kernels is None else tuple(load_rules(parsed.kernels)),
        simulated=None if parsed.against is None else read_simulated(parsed.against),
        conditions=tuple(map(parse_condition, parsed.fail_if or ())),
        layers=parsed.layers,
        top=_TOP if parsed.top is None else _whole("--top", parsed.top, 1),
        json=parsed.json,
        outputs=tuple(outputs),
    )


def _outputs(parsed: argparse.Namespace) -> list[Output]:
    given = {"--html": parsed.html, "--perfetto": parsed.perfetto}
    for flag, text in given.items():
        if text in ("", "-"):
            raise ValueError(
                f"{flag} {text!r}: the name of a file is needed, ending in "
                f"{' or '.join(_SUFFIXES[flag])}"
            )
    return [Output(f, Path(p), _SUFFIXES[f]) for f, p in given.items() if p is not None]


def _inputs(parsed: argparse.Namespace) -> dict[str, Path]:
    given = {f"TRACE {text}": text for text in parsed.traces}
    given |= {"--against": parsed.against, "--kernels": parsed.kernels}
    return {flag: Path(text) for flag, text in given.items() if text}


def _window(text: str | None) -> str | tuple[float, float] | None:
    if text is None:
        return None
    if not text.strip():
        raise ValueError("--window: the name of an annotation or START:END in ms is needed")
    first, colon, last = text.partition(":")
    try:
        start, end = float(first), float(last)
    except ValueError:  # a name, which may have a colon
        return text
    if not colon or not (math.isfinite(start) and math.isfinite(end) and start < end):
        raise ValueError(f"--window {text}: the start must be before the end, both in ms")
    return start, end


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"--phases {text!r}: is no regular expression: {error}") from None
    return text


def _whole(flag: str, text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise ValueError(f"{flag} must be a whole number from {least} up, got {text!r}")
    return number
