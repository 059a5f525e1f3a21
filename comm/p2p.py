"""Stage-to-stage transfers: ordered messages between two ranks, received ahead of their use.

A *message* is a tuple of tensors (or None) of any shapes and dtypes. Each directed pair of ranks is
a channel; its messages are received in the order in which they are sent, which both sides know from
the schedule. A small header goes with each and says what it is.

Shapes may change at any time and yet tensors are received ahead: the receiver posts buffers for
what the last message of that name looked like. Where a message turns out to differ, the sender,
which knows what was posted, fills those buffers with anything and sends the tensors themselves as
*late* ones, for which buffers are posted when the header has been read. So a steady stream costs no
round trip, and a change costs one wasted transfer. Late tensors keep an order of their own: by the
time that one is posted, buffers for the messages after it have been.

Sends never block. A sent tensor is let go when its transfer has completed (CUDA), or when a header
from the peer acknowledges it (CPU; at the end of the step where nothing comes back from the peer,
as in an evaluation with a one-way schedule).
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
from .messages import (
    Frame,
    Message,
    Payload,
    Specs,
    as_bytes,
    decode_header,
    empty_payload,
    encode_header,
    specs_of,
)
from .waiting import WaitBoard, name_ranks

_HEADER_TAG, _AHEAD_TAG, _LATE_TAG = 1, 2, 3


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
    frame: Frame
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
            rank.
        device: where payloads live.
        timeout_s: limit of each wait, seconds.
        lookahead: messages received ahead on each channel, at least 1.
        board: where waits are announced.
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
            left_over = [*channel.to_post, *channel.posted, *channel.arrived]
            assert not left_over, "the step before did not end"
            channel.to_post.extend(messages)
            while channel.to_post and len(channel.posted) < self._lookahead:
                self._post(source, channel)

    def send(self, destination: int, message: Message, payload: Payload) -> None:
        """Start sending; returns at once. The tensors must not be changed afterwards.

        `requires_grad` of each tensor travels with it.
        """
        channel = self._outgoing[destination]
        back = self._incoming.get(destination)
        expected = channel.memory.expected(channel.num_sent, message.name)
        specs = specs_of(payload)
        frame = Frame(expected, self._device)
        frame.header.copy_(encode_header(back.num_received if back else 0, payload))
        late: list[Tensor] = []
        if specs == expected:
            frame.fill(payload)
        else:
            late = [t.detach().contiguous() for t in payload if t is not None]
        groups = channel.groups
        try:
            works = [
                dist.isend(as_bytes(t), destination, groups.ahead, _AHEAD_TAG if i else _HEADER_TAG)
                for i, t in enumerate(frame.transfers)
            ]
            works += [dist.isend(as_bytes(t), destination, groups.late, _LATE_TAG) for t in late]
        except RuntimeError as error:
            raise self._error(f"sending {message}", destination, error) from error
        channel.memory.record(channel.num_sent, message.name, specs)
        self._let_go_completed(channel)
        channel.in_flight.append((channel.num_sent, works, [*frame.transfers, *late]))
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

    def _post(self, source: int, channel: _Incoming) -> None:
        message = channel.to_post.popleft()
        frame = Frame(channel.memory.expected(channel.num_posted, message.name), self._device)
        works = [
            self._irecv(t, source, channel.groups.ahead, _AHEAD_TAG if i else _HEADER_TAG, message)
            for i, t in enumerate(frame.transfers)
        ]
        channel.posted.append(_Posted(channel.num_posted, message, frame, works))
        channel.num_posted += 1

    def _complete(self, source: int, channel: _Incoming, posted: _Posted) -> Payload:
        message, frame = posted.message, posted.frame
        self._wait(posted.works[0], str(message), source)
        acknowledged, specs, requires_grad = decode_header(frame.header)
        self._release_acknowledged(source, acknowledged)
        for work in posted.works[1:]:
            self._wait(work, str(message), source, payload=True)
        tensors = frame.tensors
        if specs_of(tensors) != specs:
            tensors = empty_payload(specs, self._device)
            group = channel.groups.late
            works = [
                self._irecv(t, source, group, _LATE_TAG, message) for t in tensors if t is not None
            ]
            for work in works:
                self._wait(work, str(message), source, payload=True)
        channel.memory.record(posted.index, message.name, specs)
        channel.num_received += 1
        for tensor, needs_grad in zip(tensors, requires_grad, strict=True):
            if tensor is not None:
                tensor.requires_grad_(needs_grad)
        return tensors

    def _irecv(
        self, buffer: Tensor, source: int, group: dist.ProcessGroup, tag: int, message: Message
    ) -> Any:
        try:
            return dist.irecv(as_bytes(buffer), source, group, tag)
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

    def _let_go_completed(self, channel: _Outgoing) -> None:
        """On CUDA, drop tensors whose transfer has completed; their headers wait for the peer's.

        gloo tells completion only to who waits for it, so CPU tensors stay until acknowledged.
        """
        if self._device.type != "cuda":
            return
        for _, works, tensors in channel.in_flight:
            if len(tensors) > 1 and all(work.is_completed() for work in works[1:]):
                del tensors[1:]

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
