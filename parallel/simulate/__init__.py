"""What a schedule would cost: an event simulation of its rows, on any machine.

`costs` and `phases` say what each kind of step costs, `events` runs the rows, `analysis` says why
ranks wait, `memory` what they hold. May import `schedule` and the standard library: no torch.
"""

from .analysis import Idle, Wait, critical_path, idle_by_cause, waits
from .costs import Costs
from .events import Finish, Result, Span, Transfer, simulate
from .memory import Memory, RankMemory, memory_of
from .phases import Phases

__all__ = [
    "Costs",
    "Finish",
    "Idle",
    "Memory",
    "Phases",
    "RankMemory",
    "Result",
    "Span",
    "Transfer",
    "Wait",
    "critical_path",
    "idle_by_cause",
    "memory_of",
    "simulate",
    "waits",
]
