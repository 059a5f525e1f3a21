"""A moving average of the parameters, in CPU memory, added to while training goes on.

DeepSeek-V3 keeps such an average to see early how the model would do after the learning rate's
decay; it lies in CPU memory and is updated asynchronously after each step, so it takes neither the
GPU's memory nor its time (arXiv 2412.19437, section 3.2.3). Decay and start are not published.
Here the average after t updates is the mean of the parameters p_1 ... p_t with weights that fall by
`decay` from each to the one before it:

    a_1 = p_1,    a_t = a_(t-1) + w_t (p_t - a_(t-1)),    w_t = (1 - decay) / (1 - decay^t)

so that the random initial values have no share in it, however short the run. All in float32, each
operation rounded once, w_t computed in float64 and rounded.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..parallel.zero import Sharing
from .checkpoint.pieces import Held, Piece

_log = logging.getLogger(__name__)

# Elements that are averaged at a time: both operands fit a core's cache.
_PIECE = 1 << 17


class EMA:
    """Averages of this rank's parameters; `update` after each optimizer step, `close` at the end.

    `update` copies the parameters to a staging buffer in CPU memory and returns; a thread adds them
    to the averages. One update is under way at most: the next, and whatever reads the averages,
    waits for it. Memory: 8 bytes of the CPU's a parameter. From a GPU the copy is asynchronous too
    (the staging buffer is pinned), so `before_change` must be called before parameters change.

    An error of the thread is raised by whichever method is called next, and by all after it.

    Args:
        named_parameters: the model's.
        decay: above 0 and below 1; the average reaches back some 1 / (1 - decay) updates.
        masters: what is averaged in the stead of a parameter, by name: its float32 master.
        shards: of the parameters where those given here are this rank's shares (ZeRO-1): averages
            are of shares too then, and `swapped` brings those of all ranks into the model.
        timeout_s: limit of every wait for the thread, seconds.

    Raises:
        ValueError: a decay out of range, a master of no parameter, or several devices.

    Attributes:
        num_updates: how many there have been; to be set when averages were loaded into `pieces`.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        decay: float,
        *,
        masters: Mapping[str, Tensor] | None = None,
        shards: Sharing | None = None,
        timeout_s: float = 300.0,
    ) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"the decay of a moving average is above 0 and below 1, got {decay}")
        self._parameters = dict(named_parameters)
        masters = dict(masters or {})
        if unknown := masters.keys() - self._parameters.keys():
            raise ValueError(f"{min(unknown)} has a master and is no parameter")
        self._sources = {name: masters.get(name, p) for name, p in self._parameters.items()}
        self._shards = shards
        self.decay = decay
        self._timeout_s = timeout_s
        self._averages = {
            name: source.detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, source in self._sources.items()
        }
        devices = {source.device for source in self._sources.values()}
        if len(devices) > 1:
            raise ValueError(f"the parameters lie on {len(devices)} devices; make an EMA for each")
        self._device = next(iter(devices), torch.device("cpu"))
        on_gpu = self._device.type == "cuda"
        self._staging = {
            name: torch.empty(source.shape, dtype=torch.float32, pin_memory=on_gpu)
            for name, source in self._sources.items()
        }
        self._stream = torch.cuda.Stream(self._device) if on_gpu else None
        self._copied = torch.cuda.Event() if on_gpu else None
        self.num_updates = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._in_model = self._closed = False

    @torch.no_grad()
    def update(self) -> None:
        """Add the parameters, as they are now, to the averages; the adding itself goes on after.

        Raises:
            RuntimeError: the update before failed or is not done in time, the averages are in the
                model, or the average is closed.
        """
        self.wait()
        if self._closed:
            raise RuntimeError("the moving average is closed; make a new one and load its state")
        if self._in_model:
            raise RuntimeError(
                "the averages are in the model (swapped) and would be averaged themselves; update "
                "after the evaluation"
            )
        self._stage()
        self.num_updates += 1
        # Of its own for each update: nothing to end where training dies between two.
        self._thread = threading.Thread(
            target=self._run, args=(self.num_updates,), name="counterflow-ema", daemon=True
        )
        self._thread.start()

    def before_change(self) -> None:
        """Make GPUs wait, before parameters change, for the last update's copies of them.

        On the CPU `update` has copied when it returns, and there is nothing to wait for.
        """
        if self._copied is not None:
            self._copied.wait()

    def wait(self) -> None:
        """Return when no update is under way.

        Raises:
            RuntimeError: the update failed, or is not done within the limit.
        """
        if self._thread is not None:
            self._thread.join(self._timeout_s)
            if self._thread.is_alive():
                raise RuntimeError(
                    f"update {self.num_updates} of the parameters' moving average is not done "
                    f"after {self._timeout_s:g} s; this machine's CPUs or memory are overloaded"
                )
            self._thread = None
        if self._error is not None:
            raise RuntimeError(
                f"the moving average of the parameters failed, {type(self._error).__name__}: "
                f"{self._error}; the averages are unusable"
            ) from self._error

    def state_dict(self) -> dict[str, Any]:
        """{"num_updates": int, "averages": {name: float32 tensor}}, when no update is under way.

        The tensors are the averages themselves, not copies: the next update changes them.
        """
        self.wait()
        return {"num_updates": self.num_updates, "averages": dict(self._averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over, by copy, what `state_dict` gave for parameters of the same names and shapes.

        Raises:
            ValueError: names or a shape differ.
        """
        self.wait()
        averages: Mapping[str, Tensor] = state["averages"]
        if averages.keys() != self._averages.keys():
            other = sorted(averages.keys() ^ self._averages.keys())
            raise ValueError(
                f"the moving average is of other parameters: {len(other)} names differ, such as "
                f"{other[0]}"
            )
        for name, average in averages.items():
            if average.shape != self._averages[name].shape:
                raise ValueError(
                    f"the moving average of {name} has shape {tuple(average.shape)}, the parameter "
                    f"{tuple(self._averages[name].shape)}"
                )
        for name, average in averages.items():
            self._averages[name].copy_(average)
        self.num_updates = int(state["num_updates"])

    def pieces(self, held: Mapping[str, Held]) -> Iterator[Piece]:
        """The averages as a checkpoint has them, "ema/NAME", when no update is under way.

        Args:
            held: how each parameter lies in the whole model's.
        """
        self.wait()
        for name, average in self._averages.items():
            start = 0 if self._shards is None else self._shards.shares[name].start
            yield from held[name].pieces(f"ema/{name}", average.view(-1), start)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within it the model's parameters are the averages; after it what they were, bit for bit.

        For an evaluation: parameters must not be changed within. Their values wait in CPU memory.
        With `shards` it is a collective, and the model is whole after their `finish_gather`.

        Raises:
            RuntimeError: as `wait`, or the averages are in the model already.
        """
        self.wait()
        if self._in_model:
            raise RuntimeError("the averages are in the model already")
        kept = {name: p.detach().to("cpu", copy=True) for name, p in self._parameters.items()}
        self._in_model = True
        try:
            self._fill_model(self._averages)
            yield
        finally:
            self._fill_model(kept)
            self._in_model = False

    def close(self) -> None:
        """Wait for the update under way and let the staging buffer go; the averages stay.

        Raises:
            RuntimeError: as `wait`.
        """
        self._closed = True
        self.wait()
        self._staging.clear()

    def __enter__(self) -> Self:
        """`close` at the end; with an error in flight at once, so that the error is told soon.

        The update under way then ends with the process, if not before.
        """
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        self._closed = True
        if self._error is not None:
            _log.error("the moving average failed as well", exc_info=self._error)

    def _stage(self) -> None:
        """Copy the parameters to the staging buffer; from a GPU, begin to."""
        if self._stream is None or self._copied is None:
            for name, source in self._sources.items():
                self._staging[name].copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for name, source in self._sources.items():
                self._staging[name].copy_(source, non_blocking=True)
            self._copied.record()

    @torch.no_grad()
    def _fill_model(self, values: Mapping[str, Tensor]) -> None:
        if self._shards is not None:
            self._shards.finish_gather()  # or it would undo what is filled in here
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])  # moves the version, by which FP8 weights learn of it
        if self._shards is not None:
            self._shards.start_gather()

    def _run(self, update: int) -> None:
        """The thread's work."""
        try:
            if self._copied is not None:
                self._copied.synchronize()
            self._add(update)
        except BaseException as error:  # whatever it is, the training thread has to learn of it
            self._error = error

    def _add(self, update: int) -> None:
        """Add what is staged to the averages, as the `update`th."""
        weight = np.float32((1 - self.decay) / (1 - self.decay**update))
        for name, average in self._averages.items():
            # By numpy, which lets go of Python's lock as torch does, but keeps to one core and
            # changes no setting that training uses.
            _add_to(average.view(-1).numpy(), self._staging[name].view(-1).numpy(), weight)


def _add_to(average: NDArray[np.float32], staged: NDArray[np.float32], weight: np.float32) -> None:
    """average += weight (staged - average); `staged` is used up."""
    for start in range(0, len(average), _PIECE):
        a, s = average[start : start + _PIECE], staged[start : start + _PIECE]
        if weight == 1:  # the first: a + (s - a) may be rounded, s is not
            a[:] = s
            continue
        np.subtract(s, a, out=s)
        np.multiply(s, weight, out=s)
        np.add(a, s, out=a)
