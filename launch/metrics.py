"""Metrics of a run: JSON lines in metrics.jsonl, TensorBoard's files, Weights & Biases."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from .line_file import Keep, LineFile
from .metrics_config import MetricsConfig
from .metrics_wandb import WandbBoard
from .plain import finite

_log = logging.getLogger(__name__)
FILE = "metrics.jsonl"
_TENSORBOARD = "tensorboard"


class MetricsWriter:
    """Writes to FOLDER/metrics.jsonl and, as configured, to FOLDER/tensorboard and W&B.

    Every line is complete and on its way to the disk when `write` returns, so a run that is killed
    leaves all its lines. A disk that is full stops nothing: see `LineFile`. For one process of a
    run only.

    Args:
        folder: of the run; made if it is not there.
        config: what to write beside the file.
        resume_step: the step that the run goes on after: lines of later steps, its own evaluation,
            which comes after its checkpoint and is made again, and half a line that a killed run
            left, are dropped, so that the file has every step once. None begins anew.
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
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = config or MetricsConfig()
        resumed = resume_step is not None
        self._events = folder / _TENSORBOARD
        if resume_step is None:
            _remove_events(self._events)
        self._lines = LineFile(folder / FILE, None if resume_step is None else _until(resume_step))
        self._board = _tensorboard(self._events, resume_step) if config.tensorboard else None
        self._wandb: WandbBoard | None = None
        if config.wandb:
            self._wandb = WandbBoard(folder, config.wandb_project, run or {}, resumed=resumed)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Add a line {"kind": kind, "step": step, **values}.

        Args:
            kind: "train" or "validation"; the report reads these.
            step: the optimizer step, from 1; of an evaluation, the step before it.
            values: numbers, or lists of them; TensorBoard and W&B get the numbers only. A number
                that is not finite, for which JSON has no word, is written as null.
        """
        line = finite({"kind": kind, "step": step, **values})
        self._lines.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        numbers = {f"{kind}/{name}": value for name, value in values.items() if _is_number(value)}
        self._to_board(numbers, step)
        if self._wandb is not None:
            self._wandb.write(step, numbers)

    def sync(self) -> None:
        """Have all lines on the disk itself, as a checkpoint is that tells of the same steps."""
        self._lines.sync()

    def rewind(self, step: int) -> None:
        """Forget what a run that has gone back to `step` makes again, as `resume_step` has it.

        W&B, which forgets nothing, shows those steps twice.
        """
        self._lines.cut(_until(step))
        if self._board is not None:
            self._close_board()
            self._board = _tensorboard(self._events, step)

    def close(self) -> None:
        self._lines.close()
        self._close_board()
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

    def _to_board(self, numbers: Mapping[str, float], step: int) -> None:
        if self._board is None:
            return
        try:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        except Exception as error:  # what its thread met, such as a full disk
            self._board = None
            _log.warning("no more is written for TensorBoard after step %d: %s", step, error)

    def _close_board(self) -> None:
        if self._board is None:
            return
        try:
            self._board.close()
        except Exception as error:
            _log.warning("TensorBoard's files lack their end: %s", error)
        self._board = None


def _until(step: int) -> Keep:
    """Which lines stay of a run that goes on after `step`: all until then but its evaluation."""

    def keep(text: bytes) -> bool:
        try:
            line = json.loads(text)
            found, kind = line["step"], line["kind"]
        except (ValueError, TypeError, KeyError):
            return False
        if not isinstance(found, int) or found > step:
            return False
        return (found, kind) != (step, "validation")

    return keep


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _remove_events(folder: Path) -> None:
    """An earlier run's would be shown with this one's."""
    for old in folder.glob("events.out.tfevents.*"):
        try:
            old.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s is of an earlier run and cannot be removed: %s", old, error.strerror)


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
