"""Weights & Biases, where it is installed and asked for (metrics.wandb)."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from queue import Full, Queue
from threading import Event, Thread
from typing import Any

_log = logging.getLogger(__name__)
FILE = "wandb.json"  # the run's id there, so that it goes on as the same run
_INIT_LIMIT_S = 60.0
_MAX_WAITING = 1000  # steps


def require_wandb() -> None:
    """For a configuration that asks for W&B, before anything starts.

    Raises:
        ValueError: the package cannot be imported.
    """
    try:
        wandb = import_module("wandb")
        if not hasattr(wandb, "init"):  # as a folder of results has none that is called so
            raise ImportError(f"{list(wandb.__path__)} is another package of that name")
    except Exception as error:  # a broken installation raises anything
        raise ValueError(
            f"metrics.wandb is on, but the package wandb cannot be used ({type(error).__name__}: "
            f"{error}); pip install wandb, or set metrics.wandb=false"
        ) from error


class WandbBoard:
    """Sends numbers to one W&B run, from a thread of its own: training never waits for W&B.

    No method raises. Where WANDB_MODE says nothing, a run without credentials or without the
    network is recorded offline in FOLDER/wandb, for `wandb sync`.

    Args:
        folder: of the run; its name is the W&B run's.
        project: of W&B.
        config: the run's configuration, as plain JSON.
        resumed: whether the run goes on: then under the id that FOLDER/wandb.json keeps.
        close_limit_s: how long `close` waits for what is still to be sent.
    """

    def __init__(
        self,
        folder: Path,
        project: str,
        config: Mapping[str, Any],
        *,
        resumed: bool,
        close_limit_s: float = 10.0,
    ) -> None:
        self._close_limit_s = close_limit_s
        # None ends it.
        self._queue: Queue[tuple[int, Mapping[str, float]] | None] = Queue(_MAX_WAITING)
        self._num_lost = 0
        self._closing = Event()
        arguments = (folder, project, config, resumed)
        # A daemon, so that the process can end while it hangs.
        self._thread = Thread(target=self._send, args=arguments, name="wandb", daemon=True)
        self._thread.start()

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add numbers of one step, by name; returns at once."""
        if not self._thread.is_alive():
            return
        try:
            self._queue.put_nowait((step, numbers))
        except Full:
            self._num_lost += 1
            if self._num_lost == 1:
                _log.warning(
                    "Weights & Biases does not keep up: the numbers of step %d and more are not "
                    "sent to it",
                    step,
                )

    def close(self) -> None:
        """Send what is still to be sent, if that is done within the limit."""
        self._closing.set()
        with suppress(Full):  # then the thread sees `_closing` when it has sent all
            self._queue.put_nowait(None)
        self._thread.join(self._close_limit_s)
        if self._thread.is_alive():
            _log.warning(
                "Weights & Biases did not take everything within %g s and is waited for no longer",
                self._close_limit_s,
            )

    def _send(self, folder: Path, project: str, config: Mapping[str, Any], resumed: bool) -> None:
        """The thread: all that calls W&B."""
        try:
            run = _begin(folder, project, config, _run_id(folder, resumed=resumed))
        except Exception as error:
            _log.warning("nothing is sent to Weights & Biases: %s: %s", type(error).__name__, error)
            return
        while (item := self._next()) is not None:
            step, numbers = item
            try:
                run.log({**numbers, "step": step})
            except Exception as error:
                _log.warning(
                    "no more is sent to Weights & Biases after step %d: %s: %s",
                    step,
                    type(error).__name__,
                    error,
                )
                return
        try:
            run.finish()
        except Exception as error:
            _log.warning("Weights & Biases did not end well: %s: %s", type(error).__name__, error)

    def _next(self) -> tuple[int, Mapping[str, float]] | None:
        if self._closing.is_set() and self._queue.empty():
            return None
        return self._queue.get()


def _begin(folder: Path, project: str, config: Mapping[str, Any], run_id: str) -> Any:
    wandb = import_module("wandb")
    given = {
        "project": project,
        "name": folder.resolve().name,
        "id": run_id,
        "resume": "allow",
        "dir": str(folder),
        "config": dict(config),
        "settings": wandb.Settings(console="off", silent=True, init_timeout=_INIT_LIMIT_S),
    }
    if os.environ.get("WANDB_MODE"):
        run = wandb.init(**given)
    elif not wandb.login(prompt=False, verify=False):
        _log.warning("Weights & Biases: no credentials here; recording offline in %s/wandb", folder)
        run = wandb.init(**given, mode="offline")
    else:
        try:
            run = wandb.init(**given, mode="online")
        except Exception as error:
            _log.warning("Weights & Biases: %s; recording offline in %s/wandb", error, folder)
            run = wandb.init(**given, mode="offline")
    # Not W&B's own step, which cannot go back, as a run does that resumes from a checkpoint.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _run_id(folder: Path, *, resumed: bool) -> str:
    path = folder / FILE
    if resumed:
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["id"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # the earlier start did not use W&B
    run_id = uuid.uuid4().hex
    part = path.with_name(f"{FILE}.part")
    part.write_text(json.dumps({"id": run_id}) + "\n", encoding="utf-8")
    part.replace(path)
    return run_id
