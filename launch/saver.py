"""A run's state in and out of checkpoints: what is saved, when, and how a run goes on from it."""

from __future__ import annotations

import base64
import logging
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..comm.collectives import gather
from .checkpoint.pieces import Held, Piece, State
from .checkpoint.store import Checkpoints, Found, Saved
from .config import Config
from .data import Loader
from .engine import Engine
from .folder import RESULT
from .history import History
from .life.spikes import LossGuard
from .resume import CHECKPOINTS, Decision, as_values, decide, set_aside, started_again

_log = logging.getLogger(__name__)


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
        self._last_saved = -1
        self._errors: dict[int, str] = {}  # by step, "" where all went well

    def begin(self) -> Decision:
        """Find out whether the run goes on, and if so put everything where it stood; a collective.

        Raises:
            ConfigError: an unfinished run of this name trains something else.
            CheckpointError: there are checkpoints, and none of them can be used.
            CommError: another rank is gone or did not answer in time.
        """
        section = self._config.checkpoint
        if not section.enabled:
            return "begin"
        path = self._folder / CHECKPOINTS
        if section.resume == "never" and not started_again():
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
        finished = self._agreed((self._folder / RESULT).exists())
        decision = decide(
            section.resume,
            saved=None if found is None else found.values["config"],
            finished=finished,
            again=started_again(),
            config=self._config,
        )
        if decision == "go on":
            assert found is not None
            self._restore(found)
            self._history.resumed.append(found.step)
        elif decision == "begin" and found is not None:
            self._set_aside()
        return decision

    def is_due(self) -> bool:
        """Whether the step that has ended is one to save after."""
        section, step = self._config.checkpoint, self._history.step
        if not section.enabled or step == self._last_saved:
            return False
        last = step == self._config.train.steps
        return last or bool(section.every and step % section.every == 0)

    def save(self) -> None:
        """Begin to save the run as it is; a collective. Returns when training may go on."""
        assert self._checkpoints is not None
        self._engine.settle()
        self._last_saved = self._history.step
        self._checkpoints.save(self._history.step, self._state())

    def save_now(self) -> str:
        """Save the run as it is and wait until that is on disk; the error, or ""."""
        if self._checkpoints is None:
            return ""
        if self._last_saved != self._history.step:
            self.save()
        self._checkpoints.wait()
        self.poll()
        return self._errors.get(self._history.step, "")

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
        position, guard = self._loader.state(), self._guard.state()
        resumed = self._history.resumed
        self._restore(found)
        self._loader.restore(position)
        self._guard.restore(guard)
        self._history.resumed = [*resumed, found.step]
        return found.step

    def poll(self) -> list[Saved]:
        """What has been written, or could not be, since the last call."""
        told = [] if self._checkpoints is None else self._checkpoints.poll()
        self._errors.update({saved.step: saved.error for saved in told})
        return told

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
        self._last_saved = found.step
        if found.own is not None:
            set_random_states(found.own["random"])

    def _pieces(self) -> Iterator[Piece]:
        engine = self._engine
        for name, parameter in engine.parameters.items():
            flat = parameter.detach().view(-1)
            yield from engine.held[name].pieces(f"parameters/{name}", flat)
        for name, buffer in _saved_buffers(engine):
            yield from Held.entire(buffer).pieces(f"buffers/{name}", buffer.view(-1))
        yield from engine.optimizer.pieces(engine.held)
        if engine.ema is not None:
            yield from engine.ema.pieces(engine.held)

    def _agreed(self, value: bool) -> bool:
        """What rank 0 found."""
        mesh = self._engine.mesh
        return gather(value, mesh.world_group, "what to go on with", board=mesh.waits)[0]

    def _set_aside(self) -> None:
        """Rank 0 makes room, and all go on when it has."""
        if self._engine.mesh.rank == 0:
            set_aside(self._folder)
        self._agreed(True)


def _saved_buffers(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to the model, which are the routers' biases."""
    for part in engine.parts.values():
        parameters = {name for name, _ in part.named_parameters(remove_duplicate=False)}
        for name, tensor in part.state_dict(keep_vars=True).items():
            if name not in parameters:
                yield name, tensor


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
