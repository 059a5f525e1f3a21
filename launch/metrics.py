"""Metrics of a run: JSON lines in metrics.jsonl, and TensorBoard's files where it is installed."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import TracebackType
from typing import Any

_log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes to FOLDER/metrics.jsonl, and to FOLDER/tensorboard where TensorBoard is installed.

    Every line is complete and on its way to the disk when `write` returns, so a run that is killed
    leaves all its lines. A new writer begins the file anew. For one process of a run only.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._board = _tensorboard(folder / "tensorboard")

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Add a line {"kind": kind, "step": step, **values}.

        Args:
            kind: "train" or "validation"; the report reads these.
            step: the optimizer step, from 1; of an evaluation, the step before it.
            values: numbers, or lists of them; TensorBoard gets the numbers only. A number that is
                not finite, for which JSON has no word, is written as null.
        """
        line = {"kind": kind, "step": step, **values}
        json.dump(_finite(line), self._file, allow_nan=False)
        self._file.write("\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def _tensorboard(folder: Path) -> Any:
    """A SummaryWriter, or None: an extra that is missing or broken must not stop a run."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder))
    except Exception as error:  # its imports fail in many ways (protobuf, numpy, its own version)
        _log.info("no TensorBoard files are written: %s", error)
        return None
