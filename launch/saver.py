"""A run's state in and out of checkpoints: what is saved, when, and how a run goes on from it."""

from __future__ import annotations

import base64
import logging
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..comm.collectives import gather
from .checkpoint.pieces import Piece, State
from .checkpoint.store import Checkpoints, Found, Saved
from .checkpoint.weights import weight_pieces
from .config import Config
from .data import Loader
from .engine import Engine
from .folder import RESULT, RESULTS
from .history import History
from .life.spikes import LossGuard
from .recording import FOLDER as TRACES
from .recording import remove_traces
from .resume import (
    CHECKPOINTS,
    Decision,
    as_values,
    decide,
    has_begun,
    launch_name,
    leave_begun,
    saved_config,
    set_aside,
    started_again,
)
from .settings import ConfigError

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Saver:
    """Saves a run and restores it. Every rank makes one and calls it at the same steps.

    Args:
        config: of this start.
        folder: of the run.
        engine, loader, history, guard: what is saved, and filled where the run goes on.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        engine: Engine,
        loader: Loader,
        history: History,
        guard: LossGuard,
    ) -> None:
        self._config, self._folder = config, folder
        self._engine, self._loader = engine, loader
        self._history, self._guard = history, guard
        self._checkpoints: Checkpoints | None = None
        self._begun = -1  # the step whose save was begun last
        self._errors: dict[int, str] = {}  # by step, "" where all went well
        self._told: list[Saved] = []  # not polled yet

    def begin(self) -> Decision:
        """Find out whether the run goes on, and if so put everything where it stood; a collective.

        What the run before has left is out of the way then, or this launch's own.

        Raises:
            ConfigError: an unfinished run of this name trains something else.
            CheckpointError: there are checkpoints, and none of them can be used.
            CommError: another rank is gone or did not answer in time.
        """
        section, launch = self._config.checkpoint, launch_name()
        path = self._folder / CHECKPOINTS
        # Rank 0's word counts: others may see files later, and have another parent process.
        again, finished = self._agreed(
            (
                started_again() and has_begun(self._folder, launch),
                (self._folder / RESULT).exists(),
            )
        )
        if not section.enabled:
            return "done" if again and finished else self._begin(launch)
        if section.resume == "never" and not again:
            self._set_aside()
        store = Checkpoints(
            path,
            keep=section.keep,
            asynchronous=section.asynchronous,
            timeout_s=self._config.run.timeout_s,
            board=self._engine.mesh.waits,
        )
        self._checkpoints = store
        found = store.newest()
        decision = decide(
            section.resume,
            saved=None if found is None else saved_config(found.values, found.path),
            step=0 if found is None else found.step,
            finished=finished,
            again=again,
            config=self._config,
        )
        if decision == "go on":
            assert found is not None
            self._restore(found)
            self._history.resumed.append(found.step)
            return self._begin(launch, decision)
        if decision == "begin":
            if found is not None:
                self._set_aside()
            return self._begin(launch)
        return decision

    def _begin(self, launch: str, decision: Decision = "begin") -> Decision:
        """Remove the results of the run before, and leave word whose the folder is."""
        if self._engine.mesh.rank == 0:
            # Of a run that goes on the rest is written again only if a step is left to train.
            for name in RESULTS if decision == "begin" else (RESULT,):
                (self._folder / name).unlink(missing_ok=True)
            if decision == "begin":
                remove_traces(self._folder / TRACES)
            leave_begun(self._folder, launch)
        return decision

    def is_due(self) -> bool:
        """Whether the step that has ended is one to save after."""
        section, step = self._config.checkpoint, self._history.step
        if not section.enabled or step == self._begun:
            return False
        last = step == self._config.train.steps
        return last or bool(section.every and step % section.every == 0)

    def save(self) -> None:
        """Begin to save the run as it is; a collective. Returns when training may go on."""
        assert self._checkpoints is not None
        self._engine.settle()
        self._begun = self._history.step
        self._checkpoints.save(self._begun, self._state())

    def save_now(self) -> str:
        """See that the run as it is is on disk, once more if it failed before; the error, or ""."""
        if self._checkpoints is None:
            return ""
        step = self._history.step
        if self._begun == step:
            self._checkpoints.wait()
            self._collect()
        if self._begun != step or self._errors.get(step):
            self.save()
            self._checkpoints.wait()
            self._collect()
        return self._errors.get(step, "")

    def roll_back(self) -> int | None:
        """Put parameters and optimizer where the newest checkpoint has them; a collective.

        The data goes on from where it is: batches since then are not seen again.

        Returns:
            The step of that checkpoint; None where there is none yet, and nothing has changed.
        """
        if self._checkpoints is None:
            return None
        self._checkpoints.wait()
        found = self._checkpoints.newest()
        if found is None:
            return None
        position, events = self._loader.state(), self._guard.state()
        resumed = self._history.resumed
        self._restore(found)
        self._loader.restore(position)
        self._guard.restore(events)
        self._guard.roll_back(found.values["guard"])
        self._history.resumed = [*resumed, found.step]
        return found.step

    def poll(self) -> list[Saved]:
        """What has been written, or could not be, since the last call."""
        self._collect()
        told, self._told = self._told, []
        return told

    def _collect(self) -> None:
        told = [] if self._checkpoints is None else self._checkpoints.poll()
        self._errors.update({saved.step: saved.error for saved in told})
        self._told += told

    def close(self) -> None:
        """Wait for what is being written."""
        if self._checkpoints is not None:
            self._checkpoints.close()

    def _state(self) -> State:
        ema = self._engine.ema
        values = {
            "step": self._history.step,
            "config": as_values(self._config),
            "history": self._history.state(),
            "data": self._loader.state(),
            "guard": self._guard.state(),
            "ema_updates": None if ema is None else ema.num_updates,
        }
        return State(list(self._pieces()), values, {"random": random_states()})

    def _restore(self, found: Found) -> None:
        values, ema = found.values, self._engine.ema
        assert self._checkpoints is not None
        self._engine.settle()
        self._checkpoints.load(found, self._pieces())
        self._engine.loaded()
        if ema is not None:
            ema.num_updates = int(values["ema_updates"] or 0)
        self._loader.restore(values["data"])
        self._guard.restore(values["guard"])
        self._history.restore(values["history"])
        self._engine.pipeline.step_number = self._history.step
        self._begun = found.step
        self._errors[found.step] = ""
        if found.own is not None:
            set_random_states(found.own["random"])

    def _pieces(self) -> Iterator[Piece]:
        engine = self._engine
        yield from weight_pieces(engine.parameters, engine.held, engine.parts.values())
        yield from engine.optimizer.pieces(engine.held)
        if engine.ema is not None:
            yield from engine.ema.pieces(engine.held)

    def _agreed(self, value: T) -> T:
        """What rank 0 found."""
        mesh = self._engine.mesh
        return gather(value, mesh.world_group, "what to go on with", board=mesh.waits)[0]

    def _set_aside(self) -> None:
        """Rank 0 makes room, and all go on when it has.

        Raises:
            ConfigError: it could not.
        """
        problem = set_aside(self._folder) if self._engine.mesh.rank == 0 else ""
        if problem := self._agreed(problem):
            raise ConfigError(f"{problem}; make it writable, or give this run another run.name")


def seed_generators(seed: int, rank: int) -> None:
    """Have the generators of this process begin alike in every start of a run.

    Nothing in this project draws from them while it trains; a user's layer may.
    """
    torch.manual_seed(seed + rank)
    random.seed(seed + rank)


def random_states() -> dict[str, Any]:
    """The generators of this process, as plain JSON: torch's, the current GPU's, Python's."""
    states: dict[str, Any] = {"torch": _text(torch.get_rng_state())}
    if torch.cuda.is_available():
        states["cuda"] = _text(torch.cuda.get_rng_state())
    version, numbers, gauss = random.getstate()
    states["python"] = [version, list(numbers), gauss]
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put the generators back to what `random_states` told."""
    torch.set_rng_state(_tensor(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(states["cuda"]))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
