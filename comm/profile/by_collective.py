"""Communication that belongs to no phase, by collective and process group.

Trainers that mark nothing and exchange no tokens, such as those of sharded data parallelism, have
no phases to infer. What a kernel says of itself still tells which collective it is, and of whom:
"all_gather [group 1]". Without that its library stands in the brackets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .bandwidth import collective_of
from .classify import Class
from .kernel_table import COMMUNICATION, WAIT
from .phases import Phases, Run
from .trace import Activity, Trace


def with_collectives(trace: Trace, classes: Mapping[str, Class], phases: Phases) -> Phases:
    """The phases, and a run for each communicating kernel that is part of none.

    Args:
        trace: any; what communicates on a CPU's threads is told by operators, and left as it is.
        classes: what activities of each name do.
        phases: marked or inferred.
    """
    if not trace.on_gpu:
        return phases
    runs, of = list(phases.runs), list(phases.of)
    for index, activity in enumerate(trace.activities):
        known = classes[activity.name]
        if of[index] < 0 and known.group == COMMUNICATION:
            of[index] = len(runs)
            name = _name(activity, known)
            runs.append(Run(name, None, activity.start, activity.end, None))
    return replace(phases, runs=tuple(runs), of=tuple(of))


def is_by_collective(name: str) -> bool:
    """Whether a phase is one that `with_collectives` names, and no part of a layer."""
    return name.endswith("]")


def _name(activity: Activity, known: Class) -> str:
    exchange = activity.exchange
    told = exchange.collective if exchange is not None and known.role != WAIT else ""
    group = f"group {exchange.group}" if exchange is not None and exchange.group else ""
    return f"{collective_of(told or known.role)} [{group or known.library or 'any'}]"
