"""Stage-to-stage transfers: ordered messages between two ranks, received ahead of their use.

A *message* is a tuple of tensors (or None) of any shapes and dtypes. Each directed pair of ranks is
a channel; its messages are received in the order in which they are sent, which both sides know from
the schedule. Two things travel for each message: a small header (on the CPU) that says what the
message is, and the tensors.

Shapes may change at any time and yet tensors are received ahead: the receiver posts buffers for
what the last message of that name looked like. Where a message turns out to differ, the sender,
which knows what was posted, fills those buffers with zeros and sends the tensors themselves as
*late* ones, for which buffers are posted when the header has been read. So a steady stream costs no
round trip, and a change costs one wasted transfer. Late tensors keep an order of their own: by the
time that one is posted, buffers for the messages after it have been.

Sends never block. A sent tensor is let go when a header from the peer acknowledges it, or at the
end of the step where nothing comes back from the peer (evaluation with a one-way schedule).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import CommError, backend_reason
from .waiting import WaitBoard, name_ranks

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
_HEADER_TAG, _AHEAD_TAG, _LATE_TAG = 1, 2, 3
_FIELDS = 4 + MAX_DIMS  # present, requires_grad, dtype, number of dims, dims
_HEADER_SIZE = 2 + MAX_TENSORS * _FIELDS  # acknowledged messages, number of tensors, tensors


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


def encode_header(acknowledged: int, payload: Payload) -> Tensor:
    """The header of `payload`: int64 [_HEADER_SIZE].

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


def _specs(payload: Payload) -> Specs:
    return tuple(None if t is None else TensorSpec(t.dtype, tuple(t.shape)) for t in payload)


class _SpecMemory:
    """What messages of each name looked like, as both ends of a channel know it.

    Message j is posted when message j - lookahead has been consumed, so its buffers follow messages
    up to j - lookahead and no later; the sender keeps the same delay.
    """

    def __init__(self, lookahead: int) -> None:
        self._lookahead = lookahead
        self._known: dict[str, Specs] = {}
        self._recent: deque[tuple[int, str, Specs]] = deque()

    def record(self, index: int, name: str, specs: Specs) -> None:
        self._recent.append((index, name, specs))

    def expected(self, index: int, name: str) -> Specs:
        while self._recent and self._recent[0][0] <= index - self._lookahead:
            _, seen, specs = self._recent.popleft()
            self._known[seen] = specs
        return self._known.get(name, ())


@dataclass
class _Posted:
    """A message whose buffers have been posted."""

    index: int
    message: Message
    header: Tensor
    header_work: Any
    buffers: Payload
    works: list[Any]


class ChannelGroups(NamedTuple):
    """Process groups of one directed channel: for headers and posted tensors, and for late ones.

    For CPU tensors they may be one and the same, and shared by all channels: tags keep things
    apart. CUDA tensors need separate ones for each channel, because NCCL knows no tags and runs a
    group's operations in one order: a posted receive would hold up the sends behind it.
    """

    ahead: dist.ProcessGroup
    late: dist.ProcessGroup


@dataclass
class _Incoming:
    memory: _SpecMemory
    groups: ChannelGroups
    to_post: deque[Message] = field(default_factory=deque)
    posted: deque[_Posted] = field(default_factory=deque)
    arrived: dict[Message, Payload] = field(default_factory=dict)
    num_posted: int = 0
    num_received: int = 0


@dataclass
class _Outgoing:
    memory: _SpecMemory
    groups: ChannelGroups
    in_flight: deque[tuple[int, list[Any], list[Tensor]]] = field(default_factory=deque)
    num_sent: int = 0


class Transport:
    """Messages between this rank and its pipeline neighbours.

    Args:
        rank: this process's global rank.
        groups: of each directed channel (source, destination) of global ranks that touches this
        rank. device: where payloads live. timeout_s: limit of each wait, seconds. lookahead:
        messages received ahead on each channel, at least 1. board: where waits are announced.
    """

    def __init__(
        self,
        rank: int,
        groups: Mapping[tuple[int, int], ChannelGroups],
        device: torch.device,
        *,
        timeout_s: float = 300.0,
        lookahead: int = 2,
        board: WaitBoard | None = None,
    ) -> None:
        if lookahead < 1:
            raise ValueError(f"lookahead must be at least 1, got {lookahead}")
        self._rank = rank
        self._device = device
        self._limit = timedelta(seconds=timeout_s)
        self._lookahead = lookahead
        self._board = board or WaitBoard()
        self._incoming = {
            source: _Incoming(_SpecMemory(lookahead), of_channel)
            for (source, destination), of_channel in groups.items()
            if destination == rank
        }
        self._outgoing = {
            destination: _Outgoing(_SpecMemory(lookahead), of_channel)
            for (source, destination), of_channel in groups.items()
            if source == rank
        }

    def begin(self, incoming: Mapping[int, Sequence[Message]]) -> None:
        """Start a step: what will come from each source rank, in the order of its sending."""
        for source, messages in incoming.items():
            channel = self._incoming[source]
            if channel.to_post or channel.posted or channel.arrived:
                raise RuntimeError(
                    "an earlier step ended with an error and its messages are lost; make a new one"
                )
            channel.to_post.extend(messages)
            while channel.to_post and len(channel.posted) < self._lookahead:
                self._post(source, channel)

    def send(self, destination: int, message: Message, payload: Payload) -> None:
        """Start sending; returns at once. The tensors must not be changed afterwards.

        `requires_grad` of each tensor travels with it.
        """
        channel = self._outgoing[destination]
        back = self._incoming.get(destination)
        header = encode_header(back.num_received if back else 0, payload)
        tensors = [t.detach().contiguous() for t in payload if t is not None]
        expected = channel.memory.expected(channel.num_sent, message.name)
        specs = _specs(payload)
        ahead, late = tensors, []
        if expected != specs:
            late = tensors
            ahead = [
                torch.zeros(s.shape, dtype=s.dtype, device=self._device) for s in expected if s
            ]
        groups = channel.groups
        try:
            works = [dist.isend(header, destination, groups.ahead, _HEADER_TAG)]
            works += [dist.isend(t, destination, groups.ahead, _AHEAD_TAG) for t in ahead]
            works += [dist.isend(t, destination, groups.late, _LATE_TAG) for t in late]
        except RuntimeError as error:
            raise self._error(f"sending {message}", destination, error) from error
        channel.memory.record(channel.num_sent, message.name, specs)
        channel.in_flight.append((channel.num_sent, works, [header, *ahead, *late]))
        channel.num_sent += 1

    def receive(self, source: int, message: Message) -> Payload:
        """The message, waited for if it is not there yet, and its successor posted.

        Raises:
            CommError: it did not come within the limit, or the peer is gone.
        """
        channel = self._incoming[source]
        while message not in channel.arrived:
            assert channel.posted, f"{message} is not among the messages that rank {source} sends"
            posted = channel.posted.popleft()
            channel.arrived[posted.message] = self._complete(source, channel, posted)
            if channel.to_post:
                self._post(source, channel)
        return channel.arrived.pop(message)

    def flush(self) -> None:
        """End a step: wait until everything sent has been taken."""
        for destination, channel in self._outgoing.items():
            while channel.in_flight:
                _, works, _ = channel.in_flight.popleft()
                for work in works:
                    self._wait(
                        work, "the end of a transfer", destination, payload=work is not works[0]
                    )

    @property
    def num_in_flight(self) -> int:
        """Messages sent and not yet known to have been taken."""
        return sum(len(channel.in_flight) for channel in self._outgoing.values())

    def _post(self, source: int, channel: _Incoming) -> None:
        message = channel.to_post.popleft()
        header = torch.empty(_HEADER_SIZE, dtype=torch.int64)
        header_work = self._irecv(header, source, channel.groups.ahead, _HEADER_TAG, message)
        expected = channel.memory.expected(channel.num_posted, message.name)
        buffers, works = self._receive_into(
            expected, source, channel.groups.ahead, _AHEAD_TAG, message
        )
        channel.posted.append(
            _Posted(channel.num_posted, message, header, header_work, buffers, works)
        )
        channel.num_posted += 1

    def _complete(self, source: int, channel: _Incoming, posted: _Posted) -> Payload:
        self._wait(posted.header_work, str(posted.message), source)
        acknowledged, specs, requires_grad = decode_header(posted.header)
        self._release_acknowledged(source, acknowledged)
        for work in posted.works:
            self._wait(work, str(posted.message), source, payload=True)
        buffers = posted.buffers
        if _specs(buffers) != specs:
            buffers, works = self._receive_into(
                specs, source, channel.groups.late, _LATE_TAG, posted.message
            )
            for work in works:
                self._wait(work, str(posted.message), source, payload=True)
        channel.memory.record(posted.index, posted.message.name, specs)
        channel.num_received += 1
        for buffer, needs_grad in zip(buffers, requires_grad, strict=True):
            if buffer is not None:
                buffer.requires_grad_(needs_grad)
        return buffers

    def _receive_into(
        self, specs: Specs, source: int, group: dist.ProcessGroup, tag: int, message: Message
    ) -> tuple[Payload, list[Any]]:
        buffers = tuple(
            None if s is None else torch.empty(s.shape, dtype=s.dtype, device=self._device)
            for s in specs
        )
        works = [self._irecv(b, source, group, tag, message) for b in buffers if b is not None]
        return buffers, works

    def _irecv(
        self, buffer: Tensor, source: int, group: dist.ProcessGroup, tag: int, message: Message
    ) -> Any:
        try:
            return dist.irecv(buffer, source, group, tag)
        except RuntimeError as error:
            raise self._error(f"waiting for {message}", source, error) from error

    def _release_acknowledged(self, destination: int, acknowledged: int) -> None:
        if destination not in self._outgoing:
            return
        in_flight = self._outgoing[destination].in_flight
        while in_flight and in_flight[0][0] < acknowledged:
            _, works, _ = in_flight[0]
            if self._device.type == "cuda" and not all(w.is_completed() for w in works[1:]):
                return  # taken by the peer's program, but not yet by its GPU
            in_flight.popleft()
            for work in works:
                self._wait(work, "the end of a transfer", destination, payload=work is not works[0])

    def _wait(self, work: Any, what: str, peer: int, *, payload: bool = False) -> None:
        try:
            if payload and self._device.type == "cuda":
                work.wait()  # orders the compute stream; NCCL's own limit is the group's timeout
            else:
                with self._board.waiting(what, (peer,)):
                    work.wait(self._limit)
        except RuntimeError as error:
            raise self._error(f"waiting for {what}", peer, error) from error

    def _error(self, doing: str, peer: int, error: RuntimeError) -> CommError:
        reason = backend_reason(error, self._limit.total_seconds())
        text = f"rank {self._rank}: {doing} (peer: {name_ranks((peer,))}): {reason}"
        return CommError(text, peers=(peer,))
