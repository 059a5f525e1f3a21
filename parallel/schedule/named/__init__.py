"""The schedules that have names, one module each, and `build`, which finds them by name.

Each is a pure function of ranks and micro-batches, and of little else. Its docstring says where it
comes from and its closed form. Imports nothing outside `schedule`.
"""

from .catalogue import build, names

__all__ = ["build", "names"]
