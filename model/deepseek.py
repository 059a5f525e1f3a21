"""The model, or one contiguous part of it, as a module that a pipeline can run as a stage.

Shapes: B sequences, L positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..comm.dispatch import Dispatcher
from ..comm.dispatch import dispatcher as make_dispatcher
from ..fp8.recipe import Recipe
from ..parallel.chunk import Chunk, WeightGradQueue
from ..parallel.deferred import linear
from ..parallel.mesh import Mesh, MeshShape
from ..parallel.phased import Layer
from .attention import Attention
from .build import Build, Recompute
from .config import ModelConfig
from .experts import MLP, Experts
from .initialise import initialise
from .layer import DecoderLayer
from .linear import Embedding, Linear, RMSNorm
from .moe import MoE
from .mtp import PredictionLayer, cross_entropy, prediction_loss
from .phases import phases_of
from .rope import RotaryTable, Rotation
from .stages import Part, needs_embedding


class Backbone(nn.Module):
    """What the published names have under `model.`; layers are keyed by their global index."""

    def __init__(
        self,
        config: ModelConfig,
        part: Part,
        dispatcher: Dispatcher[Any],
        build: Build,
    ) -> None:
        super().__init__()
        size = config.hidden_size
        self.embed_tokens = None
        if part.embed or (part.head and needs_embedding(config)):
            self.embed_tokens = Embedding(config.vocab_size, size, build)
        self.layers = nn.ModuleDict()
        for index in part.layers:
            self.layers[str(index)] = DecoderLayer(config, index, dispatcher, build)
        self.norm = None
        if part.head:
            self.norm = RMSNorm(size, config.rms_norm_eps, build)
            for depth in range(config.num_nextn_predict_layers):
                index = config.num_hidden_layers + depth
                self.layers[str(index)] = PredictionLayer(config, index, dispatcher, build)


class DeepSeekV3(nn.Module):
    """A DeepSeek-V3 (or V2) model, or one contiguous part of it.

    Parameter names are the published ones, the routed experts' apart (see `names`). Initial values
    depend on names and `config.init_seed` alone.

    Args:
        config: the model's dimensions.
        part: which part; None is the whole model.
        dispatcher: moves tokens to their experts and says which experts this rank has; None for all
            of them in this process.
        dtype: of the weights; routers have float32 at least.
        device: of the weights; "meta" leaves them without values.
        recipe: how linear layers are computed in FP8; None computes them in `dtype`. See `Build`.
        recompute: what the backward makes again rather than keeps; nothing by default.

    Attributes:
        config, part: as given.
        mtp_loss_weight: lambda of eq. 25; whoever trains sets it, on a schedule (V3: 0.3,
            then 0.1).

    Raises:
        ValueError: not a part of such a model, or a dispatcher for another number of experts.
    """

    def __init__(
        self,
        config: ModelConfig,
        part: Part | None = None,
        dispatcher: Dispatcher[Any] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        recipe: Recipe | None = None,
        recompute: Recompute | None = None,
    ) -> None:
        super().__init__()
        part = part or Part.whole(config)
        part.check(config)
        dispatcher = dispatcher or _local_dispatcher(config)
        if dispatcher.num_experts != config.n_routed_experts:
            raise ValueError(
                f"the dispatcher is for {dispatcher.num_experts} experts, the model has "
                f"n_routed_experts={config.n_routed_experts}; make it for these"
            )
        device = None if device is None else torch.device(device)
        self.config = config
        self.part = part
        self.mtp_loss_weight = 0.3
        build = Build(dtype, device, recipe, recompute or Recompute())
        self.model = Backbone(config, part, dispatcher, build)
        self.lm_head = None
        if part.head and not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, build, fp8=False)
        self._rotary = RotaryTable(config, dtype)
        for name, module in self.named_modules():
            if isinstance(module, Attention | Linear | MLP | Experts):
                module.set_name(name)
        initialise(self, std=config.initializer_range, seed=config.init_seed)

    def forward(self, x: Tensor, chunk: Chunk | None = None) -> Tensor:
        """Run this part's layers.

        Args:
            x: the part with the embedding takes tokens [B, L], int64; the others hidden [B, L, D].
            chunk: of this micro-batch; takes the weight gradients and the balance losses, and says
                whether loads are counted. Without one, gradients take the ordinary path and there
                are no auxiliary losses.

        Returns:
            [B, L, D], before the final norm.

        Raises:
            ValueError: x is not what this part takes.
        """
        hidden_BLD = self.enter(x)
        rotation = self.rotation(hidden_BLD.shape[1], hidden_BLD.device)
        for layer in self.decoder_layers():
            hidden_BLD = layer(hidden_BLD, rotation, chunk)
        return hidden_BLD

    def enter(self, x: Tensor) -> Tensor:
        """What the first layer takes, of what `forward` takes: [B, L, D]."""
        hidden_BLD = self.embed(self._checked_tokens(x, "x")) if self.part.embed else x
        self._check_hidden(hidden_BLD)
        return hidden_BLD

    def phases(self, chunk: Chunk) -> list[Layer]:
        """What `forward` does, cut at its communication (see `parallel.phased`)."""
        return phases_of(self, chunk)

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """The embedding of a part that has it (else ValueError): [B, L] int64 to [B, L, D]."""
        if self.model.embed_tokens is None:
            raise ValueError(f"the part with layers {self.part.layers} has no embedding")
        return self.model.embed_tokens(tokens_BL)

    def rotation(self, length: int, device: torch.device) -> Rotation:
        """What `forward` hands to its layers for sequences of `length` tokens."""
        return self._rotary.at(length, device)

    def decoder_layers(self) -> list[DecoderLayer]:
        """The layers that `forward` runs, in order; each one's phases can be run apart."""
        layers = [self.model.layers[str(index)] for index in self.part.layers]
        return [layer for layer in layers if isinstance(layer, DecoderLayer)]

    def logits(self, hidden_BLD: Tensor, chunk: Chunk | None = None) -> Tensor:
        """Final norm and head on what `forward` of the head's part returned: [B, L, V]."""
        return self._head(self._normed(hidden_BLD), None if chunk is None else chunk.weight_grads)

    def loss(self, hidden_BLD: Tensor, targets_BL: Tensor, chunk: Chunk | None = None) -> Tensor:
        """Mean cross-entropy of the next token, nats: 0-dim.

        With a chunk, `mtp_loss_weight` times the loss of multi-token prediction is added to it
        under "mtp". Without one there is nowhere to add it, so it is not computed.

        Args:
            hidden_BLD: what `forward` of this part returned.
            targets_BL: int64, position i the token after position i of the input.
            chunk: of this micro-batch.

        Raises:
            ValueError: this part has no head, or targets do not fit.
        """
        targets_BL = self._checked_tokens(targets_BL, "targets")
        if targets_BL.shape != hidden_BLD.shape[:2]:
            raise ValueError(
                f"targets are {list(targets_BL.shape)}, hidden states {list(hidden_BLD.shape)}"
            )
        queue = None if chunk is None else chunk.weight_grads
        normed_BLD = self._normed(hidden_BLD)
        loss = cross_entropy(self._head(normed_BLD, queue), targets_BL)
        layers = self.prediction_layers()
        if chunk is not None and layers:
            further = prediction_loss(
                layers,
                normed_BLD,
                targets_BL,
                embed=self.embed,
                head=lambda x: self._head(x, queue),
                rotation=self.rotation(targets_BL.shape[1], hidden_BLD.device),
                chunk=chunk,
            )
            chunk.add_loss("mtp", self.mtp_loss_weight * further)
        return loss

    def prediction_layers(self) -> list[PredictionLayer]:
        """The layers of multi-token prediction in this part, the first depth first."""
        return [m for m in self.model.layers.values() if isinstance(m, PredictionLayer)]

    def moe_layers(self) -> dict[str, MoE]:
        """The layers with experts in this part, by their published name (model.layers.N.mlp)."""
        return {name: m for name, m in self.named_modules() if isinstance(m, MoE)}

    def _normed(self, hidden_BLD: Tensor) -> Tensor:
        if self.model.norm is None:
            raise ValueError(
                f"the part with layers {self.part.layers} has no head; only the last has logits "
                "and a loss"
            )
        self._check_hidden(hidden_BLD)
        return self.model.norm(hidden_BLD)

    def _head(self, x: Tensor, queue: WeightGradQueue | None) -> Tensor:
        if self.lm_head is not None:
            return self.lm_head(x, queue)
        assert self.model.embed_tokens is not None
        return linear(x, self.model.embed_tokens.weight, None, queue)

    def _checked_tokens(self, tokens: Tensor, name: str) -> Tensor:
        vocab = self.config.vocab_size
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise ValueError(
                f"{name} must be tokens [B, L] of int64, got {list(tokens.shape)} of {tokens.dtype}"
            )
        # On a GPU this would stop the host; there the look-up itself fails.
        if tokens.is_cpu and tokens.numel():
            low, high = (int(end) for end in tokens.aminmax())
            if low < 0 or high >= vocab:
                raise ValueError(
                    f"{name} holds tokens {low}..{high}, but vocab_size is {vocab}: 0..{vocab - 1}"
                )
        return tokens

    def _check_hidden(self, hidden_BLD: Tensor) -> None:
        config = self.config
        if hidden_BLD.dim() != 3 or hidden_BLD.shape[2] != config.hidden_size:
            raise ValueError(
                f"layers {self.part.layers} take hidden states [B, L, {config.hidden_size}], got "
                f"{list(hidden_BLD.shape)}"
            )
        if hidden_BLD.shape[1] > config.max_position_embeddings:
            raise ValueError(
                f"sequences of {hidden_BLD.shape[1]} tokens are longer than "
                f"max_position_embeddings={config.max_position_embeddings}; shorten them or raise "
                "it"
            )


def build_parts(
    config: ModelConfig,
    parts: Sequence[Part],
    dispatcher: Dispatcher[Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    recipe: Recipe | None = None,
    recompute: Recompute | None = None,
) -> list[DeepSeekV3]:
    """The parts that one rank holds; a parameter that several of them have is one object.

    (DualPipe puts embedding and head on the same rank, so multi-token prediction there shares
    parameters and gradients physically; arXiv 2412.19437, section 3.2.3.)

    Args and errors: as of `DeepSeekV3`.
    """
    models = [
        DeepSeekV3(
            config,
            part,
            dispatcher,
            dtype=dtype,
            device=device,
            recipe=recipe,
            recompute=recompute,
        )
        for part in parts
    ]
    holders = [m.model.embed_tokens for m in models if m.model.embed_tokens is not None]
    for holder in holders[1:]:
        holder.weight = holders[0].weight
    return models


def _local_dispatcher(config: ModelConfig) -> Dispatcher[Any]:
    return make_dispatcher("flat", Mesh(MeshShape()), num_experts=config.n_routed_experts)
