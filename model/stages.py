"""How a model is cut into contiguous parts, the stages of a pipeline. No torch needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from .config import ModelConfig
from .counts import layer_parameters, mtp_parameters

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Part:
    """A contiguous part of a model.

    Attributes:
        layers: which decoder layers, multi-token prediction not counted.
        embed: it starts with the embedding, so its input is tokens.
        head: it ends with the final norm, the output head and multi-token prediction, and has a
            loss.
    """

    layers: range
    embed: bool
    head: bool

    @classmethod
    def whole(cls, config: ModelConfig) -> Part:
        """The whole model as one part."""
        return cls(range(config.num_hidden_layers), embed=True, head=True)

    def check(self, config: ModelConfig) -> None:
        """Raise ValueError unless this is a part of such a model."""
        last = config.num_hidden_layers
        layers = self.layers
        if layers.step != 1 or not 0 <= layers.start <= layers.stop <= last:
            raise ValueError(
                f"{layers} is not a run of the model's {last} layers, range(0, {last})"
            )
        if self.embed and layers.start != 0:
            raise ValueError(f"a part with the embedding starts at layer 0, not {layers.start}")
        if self.head and layers.stop != last:
            raise ValueError(f"a part with the head ends at layer {last}, not {layers.stop}")


def needs_embedding(config: ModelConfig) -> bool:
    """Whether the head's part uses the embedding too, being tied to it or predicting further."""
    return config.tie_word_embeddings or config.num_nextn_predict_layers > 0


def partition(
    config: ModelConfig, num_stages: int, layers: Sequence[int] | None = None
) -> tuple[Part, ...]:
    """Cut a model into stages, by given numbers of layers or so that the slowest is fast.

    Cost is the weights that a token meets (of the routed experts only its own; the embedding is a
    look-up and costs nothing), so the last stage, with head and multi-token prediction, gets fewer
    layers. The first stage has the embedding; every stage has at least one layer.

    Args:
        config: of the model.
        num_stages: how many.
        layers: decoder layers of each stage; None: the cut whose slowest stage costs least.

    Raises:
        ValueError: there are more stages than layers, or `layers` are not those of this model.
    """
    total = config.num_hidden_layers
    if not 1 <= num_stages <= total:
        raise ValueError(
            f"{total} layers cannot make {num_stages} stages, each with at least one layer; set "
            f"num_hidden_layers to {max(num_stages, 1)} or more, or use fewer stages"
        )
    if layers is None:
        ends = _balanced(config, num_stages)
    else:
        _require_layers(layers, num_stages, total)
        ends = tuple(accumulate(layers))
    starts = (0, *ends[:-1])
    return tuple(
        Part(range(start, end), embed=start == 0, head=end == total)
        for start, end in zip(starts, ends, strict=True)
    )


def _require_layers(layers: Sequence[int], num_stages: int, total: int) -> None:
    """Raise ValueError unless these are the layers of each stage of a model with `total`."""
    shown = ",".join(map(str, layers))
    if len(layers) != num_stages:
        raise ValueError(
            f"layers={shown} are of {len(layers)} stages, but there are {num_stages}; give "
            "one number for each stage"
        )
    if min(layers) < 1:
        raise ValueError(
            f"layers={shown}: stage {min(range(num_stages), key=layers.__getitem__)} has "
            f"{min(layers)}; each stage has at least one layer"
        )
    if sum(layers) != total:
        raise ValueError(
            f"layers={shown} are {sum(layers)} layers in all, but the model has "
            f"num_hidden_layers={total}; change one of them"
        )


def _balanced(config: ModelConfig, num_stages: int) -> tuple[int, ...]:
    """Where each stage of the balanced cut ends."""
    costs = [_layer_cost(config, layer) for layer in range(config.num_hidden_layers)]
    slowest = _cut(costs, _head_cost(config), num_stages, None)[0]
    # Many cuts have that slowest stage; of these the most even one.
    return _cut(costs, _head_cost(config), num_stages, slowest)[1]


def _cut(
    costs: list[int], tail: int, num_stages: int, limit: int | None
) -> tuple[int, tuple[int, ...]]:
    """The best cut of a run of layers, by dynamic programming from its end.

    Args:
        costs: of the layers.
        tail: what the last stage costs beside its layers.
        num_stages: how many stages, at most the layers.
        limit: None minimises the greatest cost of a stage; otherwise the sum of their squares, no
            stage above the limit.

    Returns:
        What was minimised, and where each stage ends.
    """
    layers = len(costs)
    upto = [0, *accumulate(costs)]
    best: dict[int, tuple[int, tuple[int, ...]]] = {layers: (0, ())}
    for stages in range(1, num_stages + 1):
        rest, best = best, {}
        for start in range(layers - stages + 1):
            choices: list[tuple[int, tuple[int, ...]]] = []
            for end in range(start + 1, layers + 1):
                if end not in rest:
                    continue
                cost = upto[end] - upto[start] + (tail if end == layers else 0)
                after, ends = rest[end]
                if limit is None:
                    choices.append((max(cost, after), (end, *ends)))
                elif cost <= limit:
                    choices.append((cost * cost + after, (end, *ends)))
            if choices:
                best[start] = min(choices)
    return best[0]


def shared_parameters(
    config: ModelConfig, num_stages: int
) -> tuple[tuple[tuple[int, str], tuple[int, str]], ...]:
    """Parameters that two stages both hold, as ((stage, name), (stage, name)).

    Their gradients have to be summed and their updates be the same. On a rank that has both stages,
    `build_parts` makes them one parameter.
    """
    if num_stages == 1 or not needs_embedding(config):
        return ()
    return (((0, EMBEDDING), (num_stages - 1, EMBEDDING)),)


def _layer_cost(config: ModelConfig, layer: int) -> int:
    return layer_parameters(config, moe=config.is_moe(layer), experts=config.num_experts_per_tok)


def _head_cost(config: ModelConfig) -> int:
    depth = config.num_nextn_predict_layers
    idle = config.n_routed_experts - config.num_experts_per_tok
    one_depth = (
        mtp_parameters(config) - 3 * config.hidden_size * config.moe_intermediate_size * idle
    )
    return (1 + depth) * config.vocab_size * config.hidden_size + depth * one_depth
