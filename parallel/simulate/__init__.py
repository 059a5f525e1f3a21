"""What a schedule would cost: an event simulation of its rows, on any machine.

`costs` says what each kind of step costs, `phases` what a pair does on two lanes, `events` runs the
rows. May import `schedule` and the standard library: no torch.
"""

from .costs import Costs
from .events import Finish, Result, Span, Transfer, simulate
from .phases import Phases

__all__ = ["Costs", "Finish", "Phases", "Result", "Span", "Transfer", "simulate"]
