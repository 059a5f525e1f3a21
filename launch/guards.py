"""What the configuration's dataclasses guard themselves with."""

from __future__ import annotations

from typing import get_args


def require(key: str, value: object, fine: bool, wanted: str) -> None:
    if not fine:
        raise ValueError(f"{key} must be {wanted}, got {value}")


def require_choice(key: str, value: str, kind: object) -> None:
    """Guards a field of the Literal type `kind` where Python code, not the loader, gives it."""
    choices = get_args(kind)
    if value not in choices:
        raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}")
