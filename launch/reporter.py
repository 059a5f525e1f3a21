"""What rank 0 says of a run while it lasts: metrics, progress, notes; other ranks say nothing."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .checkpoint.store import Saved
from .config import Config
from .engine import StepResult
from .history import History
from .metrics import MetricsWriter
from .progress import Progress
from .resume import as_values


class Reporter:
    """Writes the metrics of a run and shows how far it is; used as a context manager.

    Args:
        config, folder: of the run.
        history: how far the run is.
        goes_on: whether an earlier start has written metrics; of later steps than `history` tells,
            which it trained before it was lost, they are dropped.
        speaks: whether this is rank 0; else every method does nothing.
    """

    def __init__(
        self, config: Config, folder: Path, history: History, *, goes_on: bool, speaks: bool
    ) -> None:
        self._config, self._folder, self._history = config, folder, history
        self._goes_on, self._speaks = goes_on, speaks
        self._open = ExitStack()
        self._metrics: MetricsWriter | None = None
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        if self._speaks:
            train = self._config.train
            self._metrics = MetricsWriter(
                self._folder,
                self._config.metrics,
                resume_step=self._history.step if self._goes_on else None,
                run=as_values(self._config),
            )
            self._progress = Progress(train.steps, log_every=train.log_every)
            self._open.enter_context(self._progress)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._metrics is not None:
            self._metrics.close()
        self._open.close()

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._progress is not None:
            self._progress.note(text)

    def step(self, result: StepResult, *, lr: float, rate: float, values: dict[str, Any]) -> None:
        """A step has ended.

        Args:
            result: of the step.
            lr: its learning rate.
            rate: tokens a second, of all ranks together.
            values: more numbers for the metrics.
        """
        if self._metrics is None or self._progress is None:
            return
        step = self._history.step
        self._metrics.write(
            "train",
            step,
            loss=result.loss,
            main_loss=result.losses["main"],
            mtp_loss=result.losses["mtp"],
            balance_loss=result.losses["balance"],
            lr=lr,
            grad_norm=result.grad_norm,
            tokens=self._history.tokens,
            tokens_per_second=rate,
            max_vio=result.max_vio,
            **values,
        )
        self._progress.update(
            step,
            loss=result.losses["main"],
            lr=lr,
            tokens_per_second=rate,
            grad_norm=result.grad_norm,
            mfu=values.get("mfu"),
        )

    def validation(self) -> None:
        """An evaluation has ended; its losses are in the history."""
        if self._metrics is None:
            return
        history, averaged = self._history, self._history.averaged("ema_loss")
        self._metrics.write("validation", history.step, loss=history.validation_loss, **averaged)
        line = f"step {history.step}: validation {history.validation_loss:.4f} nats a token"
        for loss in averaged.values():
            line += f", {loss:.4f} of the averaged parameters"
        self.note(line)

    def event(self, what: str, text: str, **values: Any) -> None:
        """Something out of the ordinary, for the metrics and whoever watches."""
        if self._metrics is not None:
            self._metrics.write(what, self._history.step, text=text, **values)
            self.note(f"step {self._history.step}: {text}")

    def sync(self) -> None:
        """Have the metrics on the disk itself: before a checkpoint that tells of the same steps."""
        if self._metrics is not None:
            self._metrics.sync()

    def saved(self, told: list[Saved]) -> None:
        """Checkpoints have been written, or could not be."""
        for save in told:
            if save.error:
                self.event("save_failed", f"no checkpoint of step {save.step}: {save.error}")

    def rolled_back(self, text: str, **values: Any) -> None:
        """The run stands at an earlier step again: the lines of later ones are dropped."""
        if self._metrics is not None:
            self._metrics.rewind(self._history.step)
            self.event("rollback", text, **values)
