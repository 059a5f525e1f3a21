"""Checks of the sizes that schedules are built from, shared by their builders."""

from __future__ import annotations


def require_counts(schedule: str, **sizes: object) -> None:
    """Raise ValueError unless all sizes are whole numbers from 1 up; bool does not count as one."""
    wrong = [
        f"{name} must be a whole number from 1 up, got {value!r}"
        for name, value in sizes.items()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1
    ]
    if wrong:
        raise ValueError(f"{schedule}: {'; '.join(wrong)}")
