"""One rank's collectives: kernels of a GPU, or a CPU's marked moves and operators."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .classify import Class, Rule, classify_all
from .devices import of_device
from .infer import phases_of
from .kernel_table import COMMUNICATION
from .matching import Collective
from .phases import PHASE_PATTERN, Phases, Run, is_exchange, started_moves
from .trace import Activity, Exchange, Trace

# Between two ranks: the one's n-th is not the other's n-th.
_PAIRWISE = ("send", "recv", "receive", "send_recv", "sendrecv", "peer_copy", "fetch", "coalesced")
_TOKEN_MOVES = ("dispatch", "combine")
# Of these the root may be done before the others have come.
_ROOTED = ("broadcast", "reduce", "gather", "scatter")
# Kernels that only send, or only tidy up after an exchange, and wait for nobody.
_ONE_SIDED = re.compile(r"internode_ll|epilogue|update_expected_value")
# Libraries whose operators only launch what another library's then do.
_LAUNCHERS = ("c10d",)


def collectives_of(
    trace: Trace, rules: Sequence[Rule], phase_pattern: str = PHASE_PATTERN
) -> list[Collective]:
    """What a rank does together with all ranks of a group, in the order of the start.

    Sends and receives, which take two, are left out. On a CPU a move that the program marked, such
    as "dispatch(F) layer 3", is one collective, whatever it consists of.
    """
    trace = of_device(trace)
    classes = classify_all((one.name for one in trace.activities), rules)
    phases = phases_of(trace, classes, phase_pattern)
    found = _moves(phases, trace.expert_ranks) if not trace.on_gpu else []
    marked = bool(found)
    for activity, index in zip(trace.activities, phases.of, strict=True):
        known = classes[activity.name]
        run = phases.runs[index] if index >= 0 else None
        if known.group != COMMUNICATION or _is_pairwise(activity, known, run):
            continue
        if not trace.on_gpu and _is_part_of_a_move(known, run, marked):
            continue
        found.append(_collective(activity, known, run))
    return sorted(found, key=lambda one: one.interval)


def _collective(activity: Activity, known: Class, run: Run | None) -> Collective:
    told = (activity.exchange.collective if activity.exchange else "") or known.role
    rooted = told.strip("_").removesuffix("_oop") in _ROOTED
    return Collective(
        (activity.start, activity.end),
        (known.role, known.library),
        run.name if run else "",
        run.layer if run else None,
        activity.exchange,
        not rooted and _ONE_SIDED.search(activity.name) is None,
    )


def _moves(phases: Phases, expert_ranks: tuple[int, ...]) -> list[Collective]:
    """Those that a CPU run's threads mark as phases; tokens move among an expert group's ranks."""
    started = started_moves(phases)
    among = Exchange(group_ranks=expert_ranks) if expert_ranks else None
    return [
        Collective(
            (run.start, run.end),
            ("move", ""),
            run.name,
            run.layer,
            among if run.name.startswith(_TOKEN_MOVES) else None,
        )
        for index, run in enumerate(phases.runs)
        if is_exchange(run.name) and not run.name.startswith(_PAIRWISE) and index not in started
    ]


def _is_pairwise(activity: Activity, known: Class, run: Run | None) -> bool:
    """NCCL does an all-to-all by sends and receives too: what it is called for, or where, tells."""
    told = activity.exchange.collective if activity.exchange else ""
    if told:
        return told.lower() in _PAIRWISE
    exchanges = run is not None and run.name.startswith(_TOKEN_MOVES)
    return known.role in _PAIRWISE and not (known.role == "send_recv" and exchanges)


def _is_part_of_a_move(known: Class, run: Run | None, marked: bool) -> bool:
    """Whether an operator belongs to a marked move, or only launches what is counted by itself.

    A library's own thread has no marks; where moves are marked, the all-to-alls there are theirs.
    """
    if known.library in _LAUNCHERS:
        return True
    inside = run is not None and is_exchange(run.name)
    return inside or (marked and known.role == "all_to_all")
