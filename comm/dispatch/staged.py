"""Dispatch in two steps, without autograd, for whoever overlaps it with other work.

How much comes from where is known only when all ranks have told each other. On the CPU the lane's
thread does it all, counts and rows, while the caller computes. On a GPU the host has to wait for
the counts, so they are exchanged as early as can be, and the wait comes when the rows are to be
sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Arrived, Dispatched, Dispatcher, Handle
from .exchange import Pending


@dataclass
class StagedDispatch:
    """A dispatch that has been prepared.

    Args and errors are those of `Dispatcher.dispatch`, but errors may come from `start` or from its
    `finish`, and `needs` says whether x and the weights need a gradient, in which ranks must agree.
    """

    dispatcher: Dispatcher[Any]
    x_TD: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    needs: tuple[bool, bool]

    def __post_init__(self) -> None:
        self._counts: Pending[Handle] | None = None
        self._ready: torch.cuda.Event | None = None
        if waits_on_host(self.x_TD):
            self._counts = self._preprocess()
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(self.x_TD.device))

    def start(self) -> Pending[Dispatched]:
        """Start sending rows; on a GPU, wait on the host for the counts first."""
        if self._counts is not None:
            handle = self._counts.finish()
            # Beside what the caller has enqueued since the rows were there.
            with self.dispatcher.lane.after(self._ready):
                pending = self.dispatcher.start_dispatch(self.x_TD, self.weights_TK, handle)
            return pending.then(lambda arrived: _dispatched(arrived, handle))
        limit_s = self.dispatcher.options.timeout_s
        lane, device = self.dispatcher.lane, self.x_TD.device
        return lane.start(self._whole, device, "dispatch(F)", timeout_s=limit_s)

    def _preprocess(self) -> Pending[Handle]:
        given = self.x_TD, self.experts_TK, self.weights_TK
        return self.dispatcher.start_checked_preprocess(*given, self.needs)

    def _whole(self) -> Dispatched:
        handle = self._preprocess().finish()
        arrived = self.dispatcher.start_dispatch(self.x_TD, self.weights_TK, handle).finish()
        return _dispatched(arrived, handle)


def waits_on_host(x: Tensor) -> bool:
    """Whether a dispatch of `x` makes the host wait for the device."""
    return x.is_cuda


def _dispatched(arrived: Arrived, handle: Handle) -> Dispatched:
    assert arrived.weights_N is not None
    return Dispatched(arrived.rows_ND, arrived.weights_N, handle.counts, handle, arrived.tiles)
