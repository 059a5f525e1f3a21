"""Live progress of a run: a bar where there is a terminal and rich, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO


class Progress:
    """Shows how far a run is. Used as a context manager, by one process of the run.

    Args:
        steps: of the whole run.
        log_every: steps between plain lines; the bar of a terminal moves with every step.
        stream: where to write.
    """

    def __init__(self, steps: int, *, log_every: int = 10, stream: TextIO | None = None) -> None:
        self._steps, self._log_every = steps, log_every
        self._stream = sys.stdout if stream is None else stream
        self._bar = _rich_bar(self._stream) if self._stream.isatty() else None
        self._task: Any = None
        self._begun: tuple[float, int] | None = None  # when, and the step that had ended then

    def update(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        tokens_per_second: float,
        grad_norm: float,
        mfu: float | None = None,
    ) -> None:
        """Say that `step` (from 1) has ended.

        Args:
            loss: nats per token.
            lr: of this step.
            tokens_per_second: of all ranks together.
            grad_norm: before clipping.
            mfu: model FLOPs utilisation, 0 to 1; None where it is not known.
        """
        text = (
            f"loss {loss:.4f}  lr {lr:.2e}  grad norm {grad_norm:.3f}  "
            f"{tokens_per_second:,.0f} tokens/s"
        )
        if mfu is not None:
            text = f"{text}  MFU {mfu:.1%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif step % self._log_every == 0 or step == self._steps or self._begun is None:
            self._line(f"step {step}/{self._steps}  {text}  {self._eta(step)}".rstrip())
        if self._begun is None:
            self._begun = (time.monotonic(), step)

    def note(self, text: str) -> None:
        """Show a line that stays, such as the result of an evaluation."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._line(text)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("step", total=self._steps, text="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _eta(self, step: int) -> str:
        """Time left at the pace since the first step ended: the first step itself is slower."""
        if self._begun is None or step <= self._begun[1]:
            return ""
        pace = (time.monotonic() - self._begun[0]) / (step - self._begun[1])
        minutes, seconds = divmod(round(pace * (self._steps - step)), 60)
        return f"eta {minutes}:{seconds:02d}"


def _rich_bar(stream: TextIO) -> Any:
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.MofNCompleteColumn(),
        progress.BarColumn(bar_width=20),
        progress.TextColumn("{task.fields[text]}", markup=False),
        progress.TextColumn("eta"),
        progress.TimeRemainingColumn(),
        console=Console(file=stream),
    )
