"""A copy of pieces in CPU memory, which training cannot change while it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .pieces import Piece

_ALIGNMENT = 64  # bytes, of each piece's copy


class HostCopies:
    """Memory for copies of pieces, kept from one save to the next.

    Where pieces are on a GPU it is registered with CUDA, so that copies run beside the CPU: they
    are queued on the current stream, behind the update and before what changes the pieces next.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._registered = False
        self._copied: torch.cuda.Event | None = None

    def copies(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The same pieces with their values in this memory; `finish` says when they are there."""
        begins: list[int] = []
        size = 0
        for piece in pieces:
            begins.append(size)
            size += -(-piece.data.nbytes // _ALIGNMENT) * _ALIGNMENT
        on_gpu = any(piece.data.is_cuda for piece in pieces)
        self._require(size, on_gpu)
        copies: list[Piece] = []
        for piece, begin in zip(pieces, begins, strict=True):
            there = self._memory[begin : begin + piece.data.nbytes].view(piece.data.dtype)
            there.copy_(piece.data.detach(), non_blocking=True)
            copies.append(replace(piece, data=there))
        if on_gpu:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return copies

    def finish(self) -> None:
        """Wait until the copies are made; may be called by another thread."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None

    def release(self) -> None:
        """Give the memory back."""
        self.finish()
        if self._registered:
            _cudart().cudaHostUnregister(self._memory.data_ptr())
            self._registered = False
        self._memory = torch.empty(0, dtype=torch.uint8)

    def _require(self, size: int, on_gpu: bool) -> None:
        if size <= self._memory.numel() and (self._registered or not on_gpu):
            return
        self.release()
        self._memory = torch.empty(size, dtype=torch.uint8)
        if on_gpu and size:
            # Not pin_memory=True, which takes the next power of two. What cannot be registered
            # serves as well, with copies that the CPU waits for.
            status = _cudart().cudaHostRegister(self._memory.data_ptr(), size, 0)
            self._registered = int(status) == 0


def _cudart() -> Any:
    return torch.cuda.cudart()  # a module without types
