"""What may travel with a tensor besides its numbers, so that nobody has to work it out twice.

A tensor that came over the network in FP8 carries its tiles to the product that takes it; one that
is cheap to make again carries how. These are notes on the very tensor object: an operation's result
does not have them, nor a copy, a tensor that was changed in place has lost them, and whoever finds
none quantises or keeps the tensor itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from .formats import Quantized

_NAME = "_counterflow_carried"


@dataclass(frozen=True)
class Carried:
    """Notes on a tensor.

    Attributes:
        tiles: the tensor in tiles of 1x128, to the last bit: it is these, dequantised.
        remake: makes the tensor again, the same bits; what it needs for that is kept anyway. A
            product that takes the tensor has this function in its node of autograd's graph, and it
            lives as long as that: an output that is held after its backward holds what this
            captures, unlike saved tensors, which the backward frees.
    """

    tiles: Quantized | None = None
    remake: Callable[[], Tensor] | None = None


_NOTHING = Carried()


class _Note:
    """Notes as they hang on a tensor, with the version of it that they are about."""

    def __init__(self, version: int = -1, notes: Carried = _NOTHING) -> None:
        self.version = version
        self.notes = notes

    def __reduce__(self) -> tuple[type[_Note], tuple[()]]:
        # A copy counts its versions anew; and how to make a tensor cannot be written to a file.
        return _Note, ()


def carry(
    x: Tensor, *, tiles: Quantized | None = None, remake: Callable[[], Tensor] | None = None
) -> Tensor:
    """Note on `x` what is given, beside what it carries already; returns `x` itself.

    A tensor of `torch.inference_mode`, whose changes nobody counts, takes no notes.
    """
    if x.is_inference():
        return x
    notes = carried(x)
    notes = replace(
        notes,
        tiles=notes.tiles if tiles is None else tiles,
        remake=notes.remake if remake is None else remake,
    )
    setattr(x, _NAME, _Note(x._version, notes))
    return x


def carried(x: Tensor) -> Carried:
    """The notes on `x`; empty ones if there are none or `x` has been changed since."""
    note: _Note | None = getattr(x, _NAME, None)
    return note.notes if note is not None and note.version == x._version else _NOTHING
