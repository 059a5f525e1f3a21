"""Schedules in files, in the text or the CSV form."""

from __future__ import annotations

from pathlib import Path

from .csv_form import from_csv, to_csv
from .schedule import Schedule
from .text_form import from_text, to_text


def load(path: str | Path) -> Schedule:
    """The schedule in a file, whichever form it has; it is not verified.

    A schedule from CSV takes the name of the file, without its suffix.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no schedule; the message names file, line and column, and what was
            expected.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a schedule, because it is not UTF-8 text") from error
    lines = (line.strip() for line in text.splitlines())
    first = next(filter(None, lines), "")
    # No cell holds "#" or ":", and the text form begins with one or the other.
    if first.startswith("#") or ":" in first:
        return from_text(text, str(path))
    return from_csv(text, path.stem, str(path))


def save(schedule: Schedule, path: str | Path) -> None:
    """Write a schedule: as CSV where the path ends in .csv, as text elsewhere."""
    path = Path(path)
    text = to_csv(schedule) if path.suffix.lower() == ".csv" else to_text(schedule)
    path.write_text(text, encoding="utf-8", newline="\n")
