"""Checks of the sizes that schedules are built from, shared by their builders."""

from __future__ import annotations


def require_count(schedule: str, name: str, value: object) -> None:
    """Raise ValueError unless `value` is a whole number from 1 up; bool does not count as one."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{schedule}: {name} must be a whole number from 1 up, got {value!r}")
