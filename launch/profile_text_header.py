"""The first lines of what `counterflow profile` prints: of what it is, and what is not there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..comm.profile.notes import listed
from .profile_text import fill

if TYPE_CHECKING:
    from .profile_command import Answer


def print_header(answer: Answer) -> None:
    """Print files, ranks and device, and a line where traces break off or are missing."""
    traces = answer.traces
    first, last = traces[0], traces[-1]
    known = [str(trace.rank) for trace in traces if trace.rank is not None]
    parts = [first.source if len(traces) == 1 else f"{first.source} to {last.source}"]
    if known:
        of = "" if first.world_size is None else f" of {first.world_size}"
        parts.append(f"rank{'s' * (len(known) > 1)} {', '.join(known)}{of}")
    if first.device_name:
        sms = "" if first.num_sms is None else f" with {first.num_sms} SMs"
        parts.append(f"{first.device_name}{sms}")
    if not any(trace.on_gpu for trace in traces):
        parts.append("operators of a CPU run, as there are no kernels")
    fill("; ".join(parts))
    if lacking := list(_lacking(answer)):
        fill(f"INCOMPLETE: {'; '.join(lacking)}")


def _lacking(answer: Answer) -> Iterator[str]:
    """Which traces break off and which are not there; notes say what that means."""
    broken = [
        trace.source if trace.rank is None else f"rank {trace.rank}"
        for trace in answer.traces
        if trace.broken
    ]
    if broken and len(answer.traces) == 1:
        yield "the trace breaks off"
    elif broken:
        yield f"of {len(answer.traces)} traces {len(broken)} break off ({listed(broken)})"
    absent = answer.across.missing_ranks if answer.across and not answer.options.ranks else ()
    if absent:
        yield f"there is no trace of {listed([f'rank {rank}' for rank in absent])}"
    elif answer.missing:
        yield "traces are missing or left out, see the notes"
