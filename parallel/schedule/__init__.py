"""Schedules as plain values, per rank a list of actions: built, read, written and verified here.

Nothing else decides order: `simulate` predicts what a schedule costs and `pipeline` executes it.
The schedules themselves, one module each, are in `named`. Imports nothing but the standard library:
no torch.
"""

from .actions import Action, Op, Pair, Step, actions, dependencies, parse_step
from .files import load, save
from .named import build, names
from .placement import Placement
from .rendezvous import Discipline, Rendezvous, rendezvous
from .replay import Blocked, Replay, replay
from .schedule import Position, Schedule, forward_only
from .text_grid import grid
from .times import Times
from .verifier import ScheduleError, verify

__all__ = [
    "Action",
    "Blocked",
    "Discipline",
    "Op",
    "Pair",
    "Placement",
    "Position",
    "Rendezvous",
    "Replay",
    "Schedule",
    "ScheduleError",
    "Step",
    "Times",
    "actions",
    "build",
    "dependencies",
    "forward_only",
    "grid",
    "load",
    "names",
    "parse_step",
    "rendezvous",
    "replay",
    "save",
    "verify",
]
