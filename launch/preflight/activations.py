"""What a stage keeps of a micro-batch, in bytes: its layers by `model.memory`, and the last one's
head and multi-token prediction.

Shapes: T tokens of a micro-batch, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...fp8.formats import tiles_in
from ...model import ModelConfig, Part, partition
from ...model.build import Build
from ...model.memory import PADDING, Kept, Load, kept_between_halves, kept_for_backward
from ..config import Config
from ..fp8 import make_recipe, make_recompute

_INDEX = 8  # bytes of an int64


class StageActivations(NamedTuple):
    """Bytes that one chunk of a stage takes.

    Attributes:
        kept: from its forward to its backward.
        waiting: between the halves I and W of the backward.
        working: at most, for a moment, while one of its layers or the head computes: an estimate.
    """

    kept: int
    waiting: int
    working: int


def activations(config: Config, num_stages: int, *, padded_heads: bool) -> list[StageActivations]:
    """Of each stage; experts get their rows as evenly as can be.

    Args:
        config: the run.
        num_stages: into which the model is cut.
        padded_heads: count what only CPUs keep.
    """
    build = Build(
        getattr(torch, config.train.dtype),
        recipe=make_recipe(config),
        recompute=make_recompute(config),
    )
    sums = _Sums(config, build, padded_heads)
    return [sums.stage(part) for part in partition(config.model, num_stages)]


class _Sums:
    def __init__(self, config: Config, build: Build, padded_heads: bool) -> None:
        self.model: ModelConfig = config.model
        self.build = build
        self.padded_heads = padded_heads
        self.sequences = config.train.sequences
        self.length = config.data.sequence_length
        self.ep = config.mesh.ep
        self.size = build.dtype.itemsize
        self.wide = max(self.size, 4)

    def stage(self, part: Part) -> StageActivations:
        model = self.model
        found = [self.layer(self.length, moe=model.is_moe(layer)) for layer in part.layers]
        if part.head:
            found.append(self.head(self.length))
            found += map(self.prediction, range(1, model.num_nextn_predict_layers + 1))
        return StageActivations(
            kept=sum(one.kept for one in found),
            waiting=sum(one.waiting for one in found),
            working=max((one.working for one in found), default=0),
        )

    def layer(self, length: int, *, moe: bool) -> StageActivations:
        load = self.load(length)
        kept = kept_for_backward(self.model, self.build, load, moe=moe)
        waiting = kept_between_halves(self.model, self.build, load, moe=moe)
        # While a layer is differentiated, all that is made again and a gradient of each of it.
        plain = kept_for_backward(self.model, Build(self.build.dtype), load, moe=moe)
        return StageActivations(self.bytes(kept), self.bytes(waiting), self.bytes(plain))

    def load(self, length: int) -> Load:
        """A micro-batch's tokens, and the rows that this rank's experts get of its group's."""
        tokens = self.sequences * length
        experts = self.model.n_routed_experts
        each, more = divmod(tokens * self.model.num_experts_per_tok * self.ep, experts)
        local = experts // self.ep
        # Of E experts `more` have one row more; this rank's share of them, rounded up.
        more = min(local, -(-more // self.ep))
        return Load(tokens, self.sequences, (each + 1,) * more + (each,) * (local - more))

    def bytes(self, kept: Kept) -> int:
        return kept.total - (0 if self.padded_heads else kept.items.get(PADDING, 0))

    def head(self, length: int) -> StageActivations:
        """Norm, output head and cross-entropy, which is computed in float32."""
        tokens = self.sequences * length
        hidden = tokens * self.model.hidden_size * self.size
        logits = tokens * self.model.vocab_size
        normed = 0 if self.build.recompute.norms else hidden
        # The norm keeps its input, the head its own, cross-entropy the logarithms of the shares.
        kept = hidden + normed + logits * self.wide
        waiting = hidden + logits * self.size  # the head's input, or what it is made of again
        working = logits * (self.size + 2 * self.wide)
        return StageActivations(kept, waiting, working)

    def prediction(self, depth: int) -> StageActivations:
        """One depth of multi-token prediction, which sees `depth` tokens less of each sequence."""
        length = self.length - depth
        tokens, size = self.sequences * length, self.model.hidden_size
        layer = self.layer(length, moe=self.model.is_moe(self.model.num_hidden_layers + depth - 1))
        head = self.head(length)
        if self.build.recipe is None:
            joined = 2 * tokens * size * self.size
        else:
            joined = tokens * (2 * size + 4 * tiles_in(2 * size))
        # Of the norms before the projection one keeps the embedding, the other the hidden state,
        # which for the first depth is what the output head keeps; and the embedding its tokens.
        shared = depth == 1 and not self.build.recompute.norms
        inputs = (1 if shared else 2) * tokens * size * self.size + tokens * _INDEX
        gradient = tokens * size * (1 if self.build.recipe is not None else self.size)
        return StageActivations(
            layer.kept + head.kept + joined + inputs,
            layer.waiting + head.waiting + joined + gradient,
            max(layer.working, head.working),
        )
