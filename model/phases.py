"""A part of the model as phases, so that a pipeline can hide its communication (`parallel.phased`).

    embed                                         tokens to hidden states; where the part has it
    attn dispatch shared mlp combine  layer N     of a layer with experts
    attn mlp                          layer N     of a dense layer
    output                                        the last layer's sum

A part that holds the embedding and, with the head, uses it again is one phase.

What a layer with experts leaves are the residual stream, the shared experts' and the routed rows'
output; whoever comes next adds them up. So nothing computes between a combine and what needs it.
The loss, with head and multi-token prediction, is the pipeline's and runs with "output".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..comm.dispatch import Dispatched, Pending
from ..comm.dispatch.staged import StagedDispatch, waits_on_host
from ..fp8.carried import Carried, carried, carry
from ..parallel.chunk import Chunk
from ..parallel.phased import Communicate, Compute, Layer
from .layer import Attended, DecoderLayer, joined
from .moe import MoE
from .rope import Rotation
from .stages import needs_embedding

if TYPE_CHECKING:
    from .deepseek import DeepSeekV3

_Grads = tuple[Tensor | None, ...]
_LEFT = ("residual", "routed", "local")  # of a layer with experts, for whoever comes next


def phases_of(model: DeepSeekV3, chunk: Chunk) -> list[Layer]:
    """The layers of one chunk of a model's part."""

    def enter(x: Tensor) -> Tensor:
        return model.enter(x)

    def everything(x: Tensor) -> tuple[Tensor, ...]:
        return (model(x, chunk),)

    if model.part.embed and model.part.head and needs_embedding(model.config):
        # Gradients of the embedding from both its uses: autograd adds them up before it adds them
        # to what other micro-batches gave, and apart they would be added in another order.
        return [Layer((Compute("output", everything, ("input0",), ("output",)),))]

    def rotation(x_BLD: Tensor) -> Rotation:
        return model.rotation(x_BLD.shape[1], x_BLD.device)

    layers: list[Layer] = []
    before = _Before(("input0",), enter)
    if model.part.embed:
        layers.append(Layer((Compute("embed", lambda x: (enter(x),), ("input0",), ("hidden",)),)))
        before = _HIDDEN
    for index, layer in zip(model.part.layers, model.decoder_layers(), strict=True):
        if isinstance(layer.mlp, MoE):
            phases, before = _ExpertLayer(layer, layer.mlp, rotation, chunk).phases(before)
        else:
            phases, before = _dense_phases(layer, rotation, chunk, before)
        layers.append(Layer(phases, f"layer {index}"))
    join = before.join
    layers.append(Layer((Compute("output", lambda *x: (join(*x),), before.reads, ("output",)),)))
    return layers


@dataclass(frozen=True)
class _Before:
    """What the phases before a layer leave, and how that becomes its input."""

    reads: tuple[str, ...]
    join: Callable[..., Tensor]


_HIDDEN = _Before(("hidden",), lambda hidden: hidden)


def _dense_phases(
    layer: DecoderLayer, rotation: Callable[[Tensor], Rotation], chunk: Chunk, before: _Before
) -> tuple[tuple[Compute, ...], _Before]:
    notes = Carried()

    def attend(*tensors: Tensor) -> tuple[Tensor, ...]:
        nonlocal notes
        hidden_BLD = before.join(*tensors)
        attended = layer.attend(hidden_BLD, rotation(hidden_BLD), chunk)
        notes = carried(attended.x_BLD)
        return attended.residual_BLD, attended.x_BLD

    def feed_forward(residual_BLD: Tensor, x_BLD: Tensor) -> tuple[Tensor, ...]:
        _note(x_BLD, notes)
        attended = Attended(residual_BLD, x_BLD, None)
        computed = layer.feed_forward(attended, None, chunk)
        return (joined(residual_BLD, None, computed.local_BLD),)

    phases = (
        Compute("attn", attend, before.reads, ("residual", "x")),
        Compute("mlp", feed_forward, ("residual", "x"), ("hidden",)),
    )
    return phases, _HIDDEN


class _ExpertLayer:
    """One layer with experts, for one chunk: what its phases tell each other besides tensors.

    Attributes:
        dispatcher: moves the rows.
        experts_TK: where the tokens go, from the end of attention to the dispatch.
        on_gpu: the host has to wait for the device before rows can be sent.
        shape: of the hidden states, [B, L, D].
        dispatched: what arrived at this rank, but for the rows and weights themselves, until its
            backward.
    """

    def __init__(
        self,
        layer: DecoderLayer,
        moe: MoE,
        rotation: Callable[[Tensor], Rotation],
        chunk: Chunk,
    ) -> None:
        self.dispatcher = moe.dispatcher
        self.experts_TK: Tensor | None = None
        self.on_gpu = False
        self.shape: torch.Size | None = None
        self.dispatched: Dispatched | None = None
        self._layer, self._moe, self._rotation, self._chunk = layer, moe, rotation, chunk
        self._notes = Carried()
        self._join_before = _HIDDEN.join

    def phases(self, before: _Before) -> tuple[tuple[Compute | Communicate, ...], _Before]:
        """The layer's phases after `before`, and what they leave."""
        self._join_before = before.join
        sent, rows = ("x", "weights"), ("rows", "row_weights")
        attn = Compute("attn", self._attend, before.reads, ("residual", *sent))
        dispatch = Communicate("dispatch", _Dispatch(self), sent, rows)
        mlp = Compute("mlp", self._compute_routed, rows, ("out",))
        combine = Communicate("combine", _Combine(self), ("out",), ("routed",))
        if self._moe.shared_experts is None:
            left = _Before(_LEFT[:2], lambda residual, routed: joined(residual, routed, None))
            return (attn, dispatch, mlp, combine), left
        shared = Compute("shared", self._compute_shared, ("x",), ("local",))
        return (attn, dispatch, shared, mlp, combine), _Before(_LEFT, joined)

    def _attend(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        hidden_BLD = self._join_before(*tensors)
        attended = self._layer.attend(hidden_BLD, self._rotation(hidden_BLD), self._chunk)
        assert attended.routing is not None
        self.shape, self.experts_TK = hidden_BLD.shape, attended.routing.experts_TK
        self.on_gpu = waits_on_host(self.experts_TK)
        self._notes = carried(attended.x_BLD)
        return attended.residual_BLD, attended.x_BLD, attended.routing.weights_TK

    def _compute_shared(self, x_BLD: Tensor) -> tuple[Tensor, ...]:
        _note(x_BLD, self._notes)
        self._notes = Carried()
        local_BLD = self._moe.compute_shared(x_BLD, self._chunk.weight_grads)
        assert local_BLD is not None
        return (local_BLD,)

    def _compute_routed(self, rows_ND: Tensor, weights_N: Tensor) -> tuple[Tensor, ...]:
        assert self.dispatched is not None
        _note(rows_ND, Carried(tiles=self.dispatched.tiles))
        arrived = replace(self.dispatched, rows_ND=rows_ND, weights_N=weights_N)
        self.dispatched = replace(self.dispatched, tiles=None)
        return (self._moe.compute_routed(arrived, self._chunk.weight_grads),)


class _Dispatch:
    """A layer's dispatch, as the pipeline knows it."""

    def __init__(self, layer: _ExpertLayer) -> None:
        self._layer = layer
        self._staged: StagedDispatch | None = None

    @property
    def waits_on_host(self) -> bool:
        return self._layer.on_gpu

    def prepare(self, tensors: tuple[Tensor, ...], needs: tuple[bool, ...]) -> None:
        layer, (x_BLD, weights_TK), (one, other) = self._layer, tensors, needs
        experts_TK, layer.experts_TK = layer.experts_TK, None
        assert experts_TK is not None
        self._staged = StagedDispatch(
            layer.dispatcher, x_BLD.flatten(0, 1), experts_TK, weights_TK, (one, other)
        )

    def start(self) -> Pending[tuple[Tensor, ...]]:
        assert self._staged is not None
        staged, self._staged = self._staged, None
        return staged.start().then(self._arrived)

    def _arrived(self, dispatched: Dispatched) -> tuple[Tensor, ...]:
        rows_ND, weights_N = dispatched.rows_ND, dispatched.weights_N
        # The pipeline keeps rows and weights, or lets them go.
        nothing = rows_ND.new_empty(0)
        self._layer.dispatched = replace(dispatched, rows_ND=nothing, weights_N=nothing)
        return rows_ND, weights_N

    def start_backward(self, grads: tuple[Tensor, ...], needs: tuple[bool, ...]) -> Pending[_Grads]:
        layer = self._layer
        assert layer.dispatched is not None
        assert layer.shape is not None
        shape = layer.shape
        handle, layer.dispatched = layer.dispatched.handle, None
        rows, weights = (g if need else None for g, need in zip(grads, needs, strict=True))
        pending = layer.dispatcher.start_dispatch_backward(rows, weights, handle)

        def shaped(found: tuple[Tensor | None, Tensor | None]) -> _Grads:
            return None if found[0] is None else found[0].view(shape), found[1]

        return pending.then(shaped)


class _Combine:
    """A layer's combine, as the pipeline knows it."""

    waits_on_host = False

    def __init__(self, layer: _ExpertLayer) -> None:
        self._layer = layer
        self._rows_ND: Tensor | None = None

    def prepare(self, tensors: tuple[Tensor, ...], needs: tuple[bool, ...]) -> None:
        del needs  # those of the dispatch, on which ranks agreed
        (self._rows_ND,) = tensors

    def start(self) -> Pending[tuple[Tensor, ...]]:
        layer = self._layer
        rows_ND, self._rows_ND = self._rows_ND, None
        assert rows_ND is not None
        assert layer.dispatched is not None
        assert layer.shape is not None
        shape = layer.shape
        pending = layer.dispatcher.start_combine(rows_ND, layer.dispatched.handle)
        return pending.then(lambda y_TD: (y_TD.view(shape),))

    def start_backward(self, grads: tuple[Tensor, ...], needs: tuple[bool, ...]) -> Pending[_Grads]:
        layer = self._layer
        assert layer.dispatched is not None
        assert all(needs)  # or nobody would have asked
        (grad_BLD,) = grads
        handle = layer.dispatched.handle
        pending = layer.dispatcher.start_combine_backward(grad_BLD.flatten(0, 1), handle)
        return pending.then(lambda rows_ND: (rows_ND,))


def _note(x: Tensor, notes: Carried) -> None:
    """Put on `x`, which was cut from autograd, what the tensor that it stands for carried."""
    carry(x, tiles=notes.tiles, remake=notes.remake)
