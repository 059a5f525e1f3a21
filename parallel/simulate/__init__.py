"""What a schedule would cost: an event simulation of its rows, on any machine.

`costs` says what each kind of step costs, `events` runs the rows. May import `schedule` and the
standard library: no torch.
"""

from .costs import Costs
from .events import Result, Span, simulate

__all__ = ["Costs", "Result", "Span", "simulate"]
