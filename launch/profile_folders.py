"""Where the traces are in a folder that the command line names: a run's, or that of all runs.

runs/NAME/traces/step5/rank0.json.gz       of a run that recorded step 5
runs/NAME/config.toml                      of any run
"""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = "traces"  # within a run's
# A folder of traces that `counterflow train --profile` wrote.
_STEPS = re.compile(r"steps?(\d+)(-\d+)?")
_CONFIG = "config.toml"  # every run's folder has it
_REMEDY = "train with --profile STEPS"


def find_traces(path: Path) -> tuple[Path, str]:
    """The trace or folder of traces that a path stands for, and what to say of what is left out.

    Of a run's folder it is where its traces are, of the steps that were recorded together.

    Raises:
        ValueError: a run recorded nothing, or several stretches of steps, which would make several
            traces of each rank; or the folder is that of all runs.
    """
    if not path.is_dir():
        return path, ""
    inside = path / FOLDER
    folder = inside if inside.is_dir() else path
    stretches = _stretches(folder)
    if not stretches:
        if (path / _CONFIG).exists():
            raise ValueError(f"{path} recorded no steps; {_REMEDY}")
        if not _holds_traces(folder):
            _refuse_runs(path)
        return folder, ""
    whole = [each for each in stretches if _holds_traces(each)]
    lost = ", ".join(each.name for each in stretches if each not in whole)
    if not whole:
        raise ValueError(
            f"{path} holds no whole trace: the recording of {lost} was cut short; {_REMEDY} again, "
            "and let it finish"
        )
    if len(whole) > 1:
        names = ", ".join(map(str, whole))
        raise ValueError(f"{path} has traces of several stretches of steps; name one of {names}")
    note = f"{folder} holds no whole trace of {lost}: the recording was cut short" if lost else ""
    return whole[0], note


def _stretches(folder: Path) -> list[Path]:
    """Folders of traces, by their first step."""
    found = ((each, _STEPS.fullmatch(each.name)) for each in folder.iterdir() if each.is_dir())
    steps = [(int(fit[1]), each) for each, fit in found if fit]
    return [each for _, each in sorted(steps)]


def _holds_traces(folder: Path) -> bool:
    from ..comm.profile.files import is_trace_file

    return folder.is_dir() and any(is_trace_file(each) for each in folder.iterdir())


def _refuse_runs(path: Path) -> None:
    """Raise ValueError if a folder holds runs: one of them is to be named."""
    runs = sorted(each for each in path.iterdir() if (each / _CONFIG).exists())
    if not runs:
        return
    recorded = [run for run in runs if any(map(_holds_traces, _all_stretches(run)))]
    if not recorded:
        raise ValueError(f"none of the runs in {path} recorded any steps; {_REMEDY}")
    names = ", ".join(map(str, recorded))
    raise ValueError(f"{path} holds runs; name one that recorded steps: {names}")


def _all_stretches(run: Path) -> list[Path]:
    return _stretches(run / FOLDER) if (run / FOLDER).is_dir() else []
