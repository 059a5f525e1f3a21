"""What `counterflow simulate --json` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..parallel.simulate import critical_path, idle_by_cause, waits
from ..parallel.simulate.analysis import FinishLink, Link, StepLink
from ..parallel.simulate.draw.bars import row_phases

if TYPE_CHECKING:
    from ..parallel.simulate import Result
    from ..parallel.simulate.phases import PhaseSpan
    from ..parallel.simulate.search import SearchResult
    from .simulate_command import Answer


def to_json(answer: Answer) -> dict[str, object]:
    """One object; times in the unit of the costs, memory in that of the sizes."""
    result = answer.result
    shown = {
        **result.to_json(),
        "schedule": answer.name,
        "unit": result.costs.unit,
        "idle_by_cause": [
            {
                "on_rank": {str(rank): time for rank, time in idle.on_rank.items()},
                "travelling": idle.travelling,
                "finish": idle.finish,
                "end": idle.end,
            }
            for idle in idle_by_cause(result)
        ],
        "waits": [
            [
                {
                    "step": str(wait.step),
                    "start": wait.start,
                    "end": wait.end,
                    "action": str(wait.action),
                    "source": wait.source,
                    "travelling": wait.travelling,
                }
                for wait in row
            ]
            for row in waits(result)
        ],
        "critical_path": [_link(link) for link in critical_path(result)],
        "steps": [[[str(s.step), s.start, s.end] for s in row] for row in result.spans],
        "phases": [_phases(result, rank) for rank in range(result.ranks)],
        "transfers": [
            {
                "action": str(t.action),
                "source": t.source,
                "destination": t.destination,
                "start": t.start,
                "end": t.end,
            }
            for t in result.transfers
        ],
        "finish": [[part._asdict() for part in row] for row in result.finish],
        "memory": [
            {
                "peak": held.peak,
                "static": held.static,
                "weights": held.weights,
                "gradients": held.gradients,
                "optimizer": held.optimizer,
                "curve": held.curve,
                "chunks": [part._asdict() for part in held.holdings],
            }
            for held in answer.memories
        ],
        "memory_unit": answer.memory_unit,
    }
    if answer.of_model:
        shown["model_peak_activations"] = [n * answer.chunk for n in result.peak_activations]
        shown["model_peak_chunks"] = [n * answer.chunk for n in result.peak_chunks]
    if answer.comparison is not None:
        shown |= answer.comparison.to_json()
    if answer.found is not None:
        shown["search"] = _search(answer.found)
    return shown


def _phases(result: Result, rank: int) -> list[list[PhaseSpan]]:
    """Per step of the row its phases, which JSON shows as lists; no entry where costs have none."""
    phases = result.costs.phases
    return [] if phases is None else [list(spans) for spans in row_phases(result, rank, phases)]


def _search(found: SearchResult) -> dict[str, object]:
    named = found.best_named is not None
    return {
        "found": found.found,
        "best_named": found.best_named,
        "named_makespan": found.named_makespan if named else None,
        "lower_bound": found.bound,
        "tried": found.tried,
    }


def _link(link: Link) -> dict[str, object]:
    if isinstance(link, StepLink):
        what = {"kind": "step", "rank": link.rank, "action": str(link.step)}
    elif isinstance(link, FinishLink):
        part = link.finish
        action = f"{part.kind} of stage {part.stage}"
        what = {"kind": part.kind, "rank": link.rank, "action": action}
    else:
        transfer = link.transfer
        what = {"kind": "transfer", "rank": transfer.source, "action": str(transfer.action)}
        what["destination"] = transfer.destination
    return {**what, "start": link.start, "end": link.end}
