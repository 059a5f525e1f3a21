"""What `counterflow simulate` is asked for, checked before anything is built."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .outputs import Output, check_outputs

if TYPE_CHECKING:
    from ..parallel.simulate import Costs, Memory

DEFAULT = "dualpipe"
SEARCH = "search"
# A schedule of so many actions and its simulation take about 4 GB.
MOST_ACTIONS = 5_000_000
# A pair's time is kept for every two stages.
MOST_STAGES = 2048
# Sums over MOST_ACTIONS and all ranks, in smaller units too, stay far from what a float can hold.
LARGEST = 1e250

_SUFFIXES = {
    "--plot": (".svg", ".png", ".html"),
    "--trace": (".json",),
    "--csv": (".csv",),
    "--text": (".txt",),
}
_COSTS_HELP = (
    "such as F=1,I=1,W=1,pair=3,send=0, times of one stage of the schedule, but with --compare and "
    "search of the model cut in N stages; B is I+W and pair is F+B if left out; F=1/1/1/2 gives "
    "one a stage. Or a .toml or .json file, which can say more (docs/simulate.md)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--schedule", metavar="NAME|FILE|search", help=f"a name, a file, or search ({DEFAULT})")
    add("--ranks", metavar="N", help="pipeline ranks; of a file, its own")
    add("--microbatches", metavar="M", help="micro-batches a step; of a file, its own")
    add("--costs", metavar="TEXT|FILE", help=_COSTS_HELP)
    add("--stages-per-rank", metavar="V", help="stages a rank, of interleaved")
    add(
        "--memory-limit",
        metavar="CHUNKS",
        help="for search: activations that a rank may hold until W, in micro-batches of one of N "
        "stages; 4/4/4/6 gives one a rank",
    )
    add(
        "--parameter-copies",
        metavar="C",
        help="for search: most ranks that may hold a stage; 1 leaves out bidirectional pipelines",
    )
    add(
        "--transfers",
        metavar="HOW",
        help="check that the order gets through where messages travel so: buffered (as the "
        "executor does it), batched, in-order or blocking",
    )
    add(
        "--compare",
        action="store_true",
        help="all named schedules side by side; costs are then those of the model cut in N stages",
    )
    add("--json", action="store_true", help="print one JSON object")
    add("--plot", metavar="FILE", help="draw the step: .svg, .png or .html")
    add("--trace", metavar="FILE", help="write a trace for ui.perfetto.dev: .json")
    add("--csv", metavar="FILE", help="write the schedule, a row a rank, without its name: .csv")
    add("--text", metavar="FILE", help="write the schedule with its name and routes: .txt")


@dataclass(frozen=True)
class Options:
    """What the command is asked for.

    Attributes:
        schedule: a name, a file or SEARCH; None: nobody chose one.
        ranks, microbatches, stages_per_rank: from 1 up; None: not given.
        costs: those given, or the default.
        memory: sizes that the user gave; None: chunks are counted.
        memory_limit, parameter_copies: of a search.
        transfers: a discipline to verify under.
        compare, json: whether asked for.
        outputs: files to write.
    """

    schedule: str | None
    ranks: int | None
    microbatches: int | None
    stages_per_rank: int | None
    costs: Costs
    memory: Memory | None
    memory_limit: float | tuple[float, ...] | None
    parameter_copies: int | None
    transfers: str | None
    compare: bool
    json: bool
    outputs: tuple[Output, ...]


def read_options(parsed: argparse.Namespace) -> Options:
    """The options that a command line gives.

    Raises:
        ValueError: one of them, or two together, make no sense; files first, then costs, then
            sizes.
    """
    outputs = _outputs(parsed)
    check_outputs(outputs, _inputs(parsed))
    costs, memory = _costs(parsed.costs)
    _check_schedule(parsed.schedule)
    sizes = {
        flag: _whole(flag, getattr(parsed, flag[2:].replace("-", "_")))
        for flag in ("--ranks", "--microbatches", "--stages-per-rank", "--parameter-copies")
    }
    options = Options(
        schedule=parsed.schedule,
        ranks=sizes["--ranks"],
        microbatches=sizes["--microbatches"],
        stages_per_rank=sizes["--stages-per-rank"],
        costs=costs,
        memory=memory,
        memory_limit=_memory_limit(parsed.memory_limit),
        parameter_copies=sizes["--parameter-copies"],
        transfers=parsed.transfers,
        compare=parsed.compare,
        json=parsed.json,
        outputs=tuple(outputs),
    )
    _check_together(options)
    return options


def check_number(stages: int, actions: int) -> None:
    """Raise ValueError for what would exhaust the memory."""
    if stages > MOST_STAGES:
        raise ValueError(f"{stages:,} stages are more than this command takes, {MOST_STAGES:,}")
    if actions > MOST_ACTIONS:
        raise ValueError(
            f"{actions:,} actions (F, I and W of each stage and micro-batch) are more than this "
            f"command takes, {MOST_ACTIONS:,}; use fewer ranks or micro-batches"
        )


def _outputs(parsed: argparse.Namespace) -> list[Output]:
    given = {flag: getattr(parsed, flag[2:]) for flag in _SUFFIXES}
    for flag, text in given.items():
        if text in ("", "-"):
            raise ValueError(
                f"{flag} {text!r}: the name of a file is needed, ending in "
                f"{' or '.join(_SUFFIXES[flag])}"
            )
    outputs = [Output(f, Path(p), _SUFFIXES[f]) for f, p in given.items() if p is not None]
    if (parsed.plot or "").lower().endswith((".svg", ".png")) and not find_spec("matplotlib"):
        raise ValueError(
            f"--plot {parsed.plot}: needs matplotlib: pip install 'counterflow[plots]'; an .html "
            "page can be had without"
        )
    return outputs


def _inputs(parsed: argparse.Namespace) -> dict[str, Path]:
    given = {"--schedule": parsed.schedule, "--costs": parsed.costs}
    return {flag: Path(text) for flag, text in given.items() if text and _is_file(text)}


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with a null character
        return False


def _costs(text: str | None) -> tuple[Costs, Memory | None]:
    from ..parallel.simulate import Costs
    from ..parallel.simulate.cost_file import SUFFIXES, load_costs

    if text is None:
        return Costs(), None
    where = ""
    if text.lower().endswith(SUFFIXES) or ("=" not in text and _is_file(text)):
        file = load_costs(text)
        costs, memory, where = file.costs, file.memory, f"{text}: "
    else:
        costs, memory = Costs.parse(text), None
    for name, number in _numbers(costs, memory):
        if number > LARGEST:
            raise ValueError(
                f"{where}{name}={number:g} is too large: sums of it may be more than a "
                "number can hold; take a larger unit"
            )
    return costs, memory


def _numbers(costs: Costs, memory: Memory | None) -> Iterator[tuple[str, float]]:
    """The times and sizes given, and what to call them."""

    def each(value: object) -> Iterator[float]:
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float):
                yield number

    for kind, of in (("cost", costs), ("memory", memory)):
        for field in fields(of) if of is not None else ():
            if field.name != "bandwidth":
                for number in each(getattr(of, field.name)):
                    yield f"{kind} {field.name}", number
    for size in each(costs.message):
        yield "cost message / bandwidth", size / costs.bandwidth
    if costs.phases is not None:
        for name, time in costs.phases.times.items():
            yield f"phase {name}", time


def _check_schedule(name: str | None) -> None:
    """Raise ValueError for what is neither a name nor meant as a file; the nearest is offered."""
    from ..parallel.schedule import names
    from ..parallel.simulate.amounts import unknown_name

    known = (*names(), SEARCH)
    if name == "":
        raise ValueError("--schedule '': a name, a file, or search is needed")
    if name is None or name in known or "/" in name or Path(name).suffix or Path(name).exists():
        return
    raise ValueError(f"--schedule: {unknown_name(name, known)}")


def _whole(flag: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError(f"{flag} must be a whole number from 1 up, got {text!r}")
    return number


def _memory_limit(text: str | None) -> float | tuple[float, ...] | None:
    if text is None:
        return None
    try:
        limits = tuple(map(float, text.split("/")))
    except ValueError:
        limits = (math.nan,)
    if not all(math.isfinite(limit) and limit > 0 for limit in limits):
        raise ValueError(
            f"--memory-limit must be a number above 0, or one a rank such as 4/4/4/6, got {text!r}"
        )
    return limits if "/" in text else limits[0]


def _check_together(options: Options) -> None:
    searched = options.schedule == SEARCH
    for flag, value in (
        ("--memory-limit", options.memory_limit),
        ("--parameter-copies", options.parameter_copies),
    ):
        if value is not None and not searched:
            raise ValueError(
                f"{flag} goes with --schedule search; a named schedule holds what it holds"
            )
    if searched and options.stages_per_rank is not None:
        raise ValueError(
            "--stages-per-rank goes with interleaved; a search chooses the number of stages itself"
        )
    limits, ranks = options.memory_limit, options.ranks
    if isinstance(limits, tuple) and ranks is not None and len(limits) != ranks:
        raise ValueError(
            f"--memory-limit has {len(limits)} entries, but there are {ranks} ranks; give one "
            "number, or one a rank"
        )
    if options.transfers is not None:
        from ..parallel.schedule.rendezvous import Discipline

        Discipline.named(options.transfers)
    if ranks and options.microbatches:
        stages = ranks * (options.stages_per_rank or 1)
        check_number(stages, 3 * stages * options.microbatches)
