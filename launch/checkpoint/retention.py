"""Which checkpoints stay when a newer one is finished."""

from __future__ import annotations

import logging
from pathlib import Path

from .errors import told
from .folders import checkpoints_in, discard_replaced, remove, step_of
from .read import is_complete

_log = logging.getLogger(__name__)


class Retention:
    """Removes checkpoints beyond the newest `keep`; one process of a run does that.

    What is damaged does not count as kept. Contents are not read again for that: a checkpoint is
    damaged if it was found so, or at first sight, by its manifest and the sizes of its files.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._complete: dict[int, bool] = {}  # by step, of those that have been looked at

    def note(self, step: int, complete: bool) -> None:
        """The checkpoint of `step` has been finished or verified."""
        self._complete[step] = complete

    def tidy(self, step: int) -> None:
        """Remove what need not stay beside the checkpoint of `step`, which has just been finished.

        Those of later steps are of a course that the run has left. What cannot be removed is
        logged: the new checkpoint is good all the same.
        """
        self.note(step, True)
        try:
            discard_replaced(self._folder, step)
            for path in self._surplus(step):
                remove(path)
        except OSError as error:
            _log.warning("%s", told(error, self._folder, "cannot be removed"))

    def _surplus(self, step: int) -> list[Path]:
        surplus: list[Path] = []
        kept = 1
        for path in checkpoints_in(self._folder):
            number = step_of(path)
            if number > step or (number < step and kept == self._keep):
                surplus.append(path)
            elif number < step:
                if number not in self._complete:
                    self._complete[number] = is_complete(path)
                kept += self._complete[number]
        return surplus
