"""Messages between two ranks: what they are called, how they are described, how they lie in memory.

A message is a tuple of tensors, or None in the place of one, of any shapes and dtypes.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

MAX_TENSORS = 16
MAX_DIMS = 8

_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
)
_FIELDS = 4 + MAX_DIMS  # present, requires_grad, dtype, number of dims, dims
_HEADER_SIZE = 2 + MAX_TENSORS * _FIELDS  # acknowledged messages, number of tensors, tensors
_ALIGNMENT = 64  # bytes; every dtype's vector loads are aligned then


class Message(NamedTuple):
    """Identity of a message: `name` says what it is every time, `microbatch` which one this is."""

    name: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.name} of micro-batch {self.microbatch}"


class TensorSpec(NamedTuple):
    """What a receiver must know to post a buffer."""

    dtype: torch.dtype
    shape: tuple[int, ...]


Specs = tuple[TensorSpec | None, ...]
Payload = tuple[Tensor | None, ...]


def specs_of(payload: Payload) -> Specs:
    """The spec of each tensor of a message."""
    return tuple(None if t is None else TensorSpec(t.dtype, tuple(t.shape)) for t in payload)


def encode_header(acknowledged: int, payload: Payload) -> Tensor:
    """What a receiver must know of `payload`, as int64 [_HEADER_SIZE] on the CPU.

    Args:
        acknowledged: messages received so far from the rank that this header goes to.
        payload: the message; `requires_grad` of its tensors is told too.

    Raises:
        ValueError: more tensors or dimensions than a header holds, or an unknown dtype.
    """
    if len(payload) > MAX_TENSORS:
        raise ValueError(f"a message holds at most {MAX_TENSORS} tensors, got {len(payload)}")
    values = [acknowledged, len(payload)]
    for tensor in payload:
        if tensor is None:
            values += [0] * _FIELDS
            continue
        if tensor.dim() > MAX_DIMS:
            raise ValueError(
                f"a message's tensors have at most {MAX_DIMS} dims, got {tensor.dim()}"
            )
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"tensors of {tensor.dtype} cannot be sent between stages")
        dims = [*tensor.shape, *([0] * (MAX_DIMS - tensor.dim()))]
        dtype = _DTYPES.index(tensor.dtype)
        values += [1, int(tensor.requires_grad), dtype, tensor.dim(), *dims]
    values += [0] * (_HEADER_SIZE - len(values))
    return torch.tensor(values, dtype=torch.int64)


def decode_header(header: Tensor) -> tuple[int, Specs, tuple[bool, ...]]:
    """(acknowledged messages, specs, which tensors require grad) of an encoded header."""
    values: list[int] = header.tolist()
    specs: list[TensorSpec | None] = []
    requires_grad: list[bool] = []
    for i in range(values[1]):
        present, needs_grad, dtype, dims, *shape = values[2 + i * _FIELDS : 2 + (i + 1) * _FIELDS]
        specs.append(TensorSpec(_DTYPES[dtype], tuple(shape[:dims])) if present else None)
        requires_grad.append(bool(needs_grad))
    return values[0], tuple(specs), tuple(requires_grad)


class Frame:
    """A header and room for tensors of the expected specs, as they travel.

    CPU tensors and their header lie in one buffer and are one transfer. CUDA tensors travel by
    themselves, their header beside them on the CPU.

    Attributes:
        header: int64 [_HEADER_SIZE], CPU.
        tensors: of the expected specs, uninitialised until received or filled.
        transfers: what to send or receive, in order; the first holds the header.
    """

    def __init__(self, expected: Specs, device: torch.device) -> None:
        if device.type != "cpu":
            self._packed = False
            self.header = torch.empty(_HEADER_SIZE, dtype=torch.int64)
            self.tensors = empty_payload(expected, device)
            self.transfers = [self.header, *(t for t in self.tensors if t is not None)]
            return
        self._packed = True
        specs = (TensorSpec(torch.int64, (_HEADER_SIZE,)), *expected)
        starts: list[int] = []
        size = 0
        for spec in specs:
            starts.append(size)
            size += 0 if spec is None else -(-_num_bytes(spec) // _ALIGNMENT) * _ALIGNMENT
        buffer = torch.empty(size, dtype=torch.uint8)
        header, *tensors = (
            None if spec is None else _placed(buffer, start, spec)
            for spec, start in zip(specs, starts, strict=True)
        )
        assert header is not None
        self.header = header
        self.tensors = tuple(tensors)
        self.transfers = [buffer]

    def fill(self, payload: Payload) -> None:
        """Put in tensors of the expected specs, to be sent."""
        if not self._packed:
            present = [t.detach().contiguous() for t in payload if t is not None]
            self.transfers = [self.header, *present]
            return
        for room, tensor in zip(self.tensors, payload, strict=True):
            if room is not None and tensor is not None:
                room.copy_(tensor.detach())


def empty_payload(specs: Specs, device: torch.device) -> Payload:
    """Uninitialised tensors of these specs."""
    return tuple(
        None if s is None else torch.empty(s.shape, dtype=s.dtype, device=device) for s in specs
    )


def as_bytes(tensor: Tensor) -> Tensor:
    """The contiguous tensor's own memory as uint8 [n]: no backend knows every dtype."""
    return tensor.detach().view(-1).view(torch.uint8)


def _num_bytes(spec: TensorSpec) -> int:
    return prod(spec.shape) * spec.dtype.itemsize


def _placed(buffer: Tensor, start: int, spec: TensorSpec) -> Tensor:
    """A contiguous tensor in `buffer` from byte `start` on; no view, so that it is a plain leaf."""
    strides = [prod(spec.shape[i + 1 :]) for i in range(len(spec.shape))]
    storage = buffer.untyped_storage()
    tensor = torch.empty(0, dtype=spec.dtype)
    return tensor.set_(storage, start // spec.dtype.itemsize, spec.shape, strides)  # pyright: ignore[reportArgumentType, reportCallIssue]
