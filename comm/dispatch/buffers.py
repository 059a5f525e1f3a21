"""Memory for messages, kept from step to step.

Fresh memory of many megabytes costs more than what is copied into it: the system hands it out page
by page. Buffers are used only within moves of one lane, which run in order, so what one move has
given back the next may take, on a GPU's stream too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Buffers:
    """Byte buffers to take for a move."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Bytes kept while no move runs."""
        return sum(buffer.numel() for buffer in self._free)

    def clear(self) -> None:
        """Keep nothing."""
        self._free.clear()

    @contextmanager
    def hold(self, device: torch.device) -> Iterator[Hold]:
        """Within this context buffers may be taken; all of them go back at its end."""
        taken = Hold(self._free, device)
        try:
            yield taken
        finally:
            taken.give_all_back()


class Hold:
    """Buffers that one move has taken."""

    def __init__(self, free: list[Tensor], device: torch.device) -> None:
        self._free = free
        self._device = device
        self._taken: list[tuple[Tensor, Tensor]] = []  # (view handed out, its buffer)

    def __call__(self, num_rows: int, width: int) -> Tensor:
        """[num_rows, width] uint8, contiguous, its bytes undefined."""
        size = num_rows * width
        fitting = [b for b in self._free if b.numel() >= size and b.device == self._device]
        if fitting:
            buffer = min(fitting, key=Tensor.numel)
            index = next(i for i, b in enumerate(self._free) if b is buffer)
            self._free.pop(index)
        else:
            # The largest that is too small goes: the pool follows the sizes that are in use.
            small = [i for i, b in enumerate(self._free) if b.device == self._device]
            if small:
                self._free.pop(max(small, key=lambda i: self._free[i].numel()))
            buffer = torch.empty(_roomy(size), dtype=torch.uint8, device=self._device)
        view = buffer[:size].view(num_rows, width)
        self._taken.append((view, buffer))
        return view

    def give_back(self, view: Tensor) -> None:
        """Return what a call handed out before the move ends; it must not be used any more."""
        index = next(i for i, (taken, _) in enumerate(self._taken) if taken is view)
        self._free.append(self._taken.pop(index)[1])

    def give_all_back(self) -> None:
        """Return all that is still taken."""
        self._free.extend(buffer for _, buffer in self._taken)
        self._taken.clear()


def _roomy(size: int) -> int:
    """`size` and up to an eighth more, so that routings that vary a little need no new buffer."""
    step = max(1 << 12, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step
