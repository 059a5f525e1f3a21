"""Metrics of a run: JSON lines in metrics.jsonl, TensorBoard's files, Weights & Biases."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from .metrics_config import MetricsConfig
from .metrics_wandb import WandbBoard

_log = logging.getLogger(__name__)
FILE = "metrics.jsonl"
_TENSORBOARD = "tensorboard"


class MetricsWriter:
    """Writes to FOLDER/metrics.jsonl and, as configured, to FOLDER/tensorboard and W&B.

    Every line is complete and on its way to the disk when `write` returns, so a run that is killed
    leaves all its lines. For one process of a run only.

    Args:
        folder: of the run; made if it is not there.
        config: what to write beside the file.
        resume_step: the step that the run goes on after: lines of later steps, and half a line that
            a killed run left, are dropped, so that the file has every step once. None begins anew.
        run: what W&B is told of the run: its configuration, as plain JSON.
    """

    def __init__(
        self,
        folder: str | Path,
        config: MetricsConfig | None = None,
        *,
        resume_step: int | None = None,
        run: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        config = config or MetricsConfig()
        self._with_tensorboard = config.tensorboard
        self._file, self._board = self._open(resume_step)
        self._wandb: WandbBoard | None = None
        if config.wandb:
            resumed = resume_step is not None
            self._wandb = WandbBoard(self._folder, config.wandb_project, run or {}, resumed=resumed)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Add a line {"kind": kind, "step": step, **values}.

        Args:
            kind: "train" or "validation"; the report reads these.
            step: the optimizer step, from 1; of an evaluation, the step before it.
            values: numbers, or lists of them; TensorBoard and W&B get the numbers only. A number
                that is not finite, for which JSON has no word, is written as null.
        """
        line = {"kind": kind, "step": step, **values}
        json.dump(_finite(line), self._file, allow_nan=False)
        self._file.write("\n")
        self._file.flush()
        numbers = {f"{kind}/{name}": value for name, value in values.items() if _is_number(value)}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.write(step, numbers)

    def rewind(self, step: int) -> None:
        """Forget what was written of steps after `step`: the run has gone back to it.

        W&B, which forgets nothing, shows those steps twice.
        """
        self._close_files()
        self._file, self._board = self._open(step)

    def close(self) -> None:
        self._close_files()
        if self._wandb is not None:
            self._wandb.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, resume_step: int | None) -> tuple[TextIO, Any]:
        path, events = self._folder / FILE, self._folder / _TENSORBOARD
        if resume_step is None:
            for old in events.glob("events.out.tfevents.*"):
                old.unlink(missing_ok=True)
        elif path.exists():
            keep_until(path, resume_step)
        file = path.open("w" if resume_step is None else "a", encoding="utf-8")
        return file, _tensorboard(events, resume_step) if self._with_tensorboard else None

    def _close_files(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def keep_until(path: Path, step: int) -> None:
    """Drop from a file of metrics, at once, what a run that goes on after `step` writes again.

    That is all lines of later steps, the evaluation after `step`, and half lines.
    """
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(_lines_until(path, step))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _lines_until(path: Path, step: int) -> Iterator[str]:
    dropped = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            found = _step_and_kind(text)
            if found is None:
                dropped += 1
            elif found[0] <= step and found != (step, "validation"):
                yield text
    if dropped:
        _log.info("%s: %d lines that were not written to their end are dropped", path, dropped)


def _step_and_kind(text: str) -> tuple[int, str] | None:
    """What a whole line is of; None of what is none."""
    try:
        line = json.loads(text)
        step, kind = line["step"], line["kind"]
    except (ValueError, TypeError, KeyError):
        return None
    return (step, kind) if text.endswith("\n") and isinstance(step, int) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def _tensorboard(folder: Path, resume_step: int | None) -> Any:
    """A SummaryWriter, or None: an extra that is missing or broken must not stop a run."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        # What TensorBoard has of this step and later ones, it then leaves out.
        purge = None if resume_step is None else resume_step + 1
        return SummaryWriter(str(folder), purge_step=purge)
    except Exception as error:  # its imports fail in many ways (protobuf, numpy, its own version)
        _log.info("no TensorBoard files are written: %s", error)
        return None
