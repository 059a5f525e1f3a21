"""What each phase of a layer has to do for one micro-batch on one rank: operations and bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, get_args

from ..model import ModelConfig
from .layout import Kind, Layout
from .operations import FLOAT, FP8_WEIGHT, LayerSum


class Work(NamedTuple):
    """What one phase computes.

    Attributes:
        fp8_flops: of products in FP8.
        flops: of other products.
        attention_flops: of attention's core, its masked half left out.
        num_bytes: read and written in memory by what is no product, and of weights and rows by
            products.
        product_bytes: those of them that products read and write, while they compute.
    """

    fp8_flops: float = 0.0
    flops: float = 0.0
    attention_flops: float = 0.0
    num_bytes: float = 0.0
    product_bytes: float = 0.0


def layer_work(
    model: ModelConfig, layout: Layout, kind: Kind, *, depth: int = 1
) -> dict[str, Work]:
    """The work of each phase that computes, of one layer for one micro-batch on one rank.

    Linear layers of attention, feed-forwards and experts are in FP8 where the layout says so;
    embedding, head, router and attention's core never are (arXiv 2412.19437, section 3.3.1).

    Args:
        model, layout: of what.
        kind: of layer. "mtp" is a whole depth: projection and embedding count as attention, its
            head and loss as mlp. "head" and "embedding" are mlp.
        depth: of "mtp", from 1: depth k sees all tokens of a sequence but the last k.

    Raises:
        ValueError: the model has no layer of this kind, or experts that the ranks cannot share.
    """
    _check(model, layout, kind, depth)
    if kind == "mtp":
        seen = layout.length - depth
        layout = replace(layout, length=seen)
    layer = LayerSum(model, layout)
    if kind == "embedding":
        layer.look_up("mlp")
    elif kind == "head":
        layer.head()
    else:
        if kind == "mtp":
            layer.join_with_embedding()
        layer.attention()
        if kind == "dense":
            layer.feed_forward(model.intermediate_size)
            layer.sums(6, 6)
        else:
            layer.experts()
        if kind == "mtp":
            layer.head()
    return {phase: Work(*found) for phase, found in layer.found.items()}


def routed_share(model: ModelConfig, layout: Layout, kind: Kind = "moe") -> float:
    """The share of a layer's mlp phases that grows with the rows that a rank's experts get.

    That of the routed experts in the operations of all products there, twice as fast in FP8: 8/9
    for V3's layers, far less for "mtp", whose phases have the head too. In F, B and W it is the
    same.

    Raises:
        ValueError: the model has no layer of this kind.
    """
    _check(model, layout, kind, 1)
    if kind not in ("moe", "mtp"):
        return 0.0
    work = layer_work(model, layout, kind)["mlp(F)"]
    tokens = layout.tokens - (layout.sequences if kind == "mtp" else 0)
    inner = model.num_experts_per_tok * model.moe_intermediate_size
    routed = 6 * tokens * model.hidden_size * inner
    return routed / (work.fp8_flops + work.flops * (2 if layout.fp8 else 1))


def optimizer_bytes(layout: Layout, *, routed: float, other: float, plain: float = 0) -> float:
    """What a rank's update reads and writes, gradient norm and weights' FP8 forms included.

        for each parameter that this rank updates            bytes
        gradient: read for the norm, read for the update     8
        what AdamW updates: read and written                 8   (the float32 master, or itself)
        two moments: read and written                        8 in bfloat16, 16 in float32
        a bfloat16 parameter with a master: written          2
        for each that it holds, of a product in FP8
        read as float32, written in FP8                      5

    With ZeRO-1 a rank updates 1 / dp of what all data-parallel ranks hold, and ep / dp of its
    experts. Without FP8 all parameters are of the layout's dtype.

    Args:
        layout: of the run.
        routed: parameters of the routed experts that the rank holds.
        other: its other parameters.
        plain: those of them that no product in FP8 takes: embedding, head, norms.
    """
    size = layout.itemsize
    wide = max(size, FLOAT)
    moment = 2 if layout.moments == "bfloat16" else wide
    held = routed + other
    ranks = layout.dp if layout.zero else 1
    of_experts = layout.dp // layout.ep if layout.zero else 1
    updated = routed / of_experts + other / ranks
    with_masters = plain / ranks if layout.fp8 else updated
    num_bytes = updated * (4 * wide + 4 * moment)
    if size < FLOAT:
        num_bytes += with_masters * size
    if layout.fp8:
        num_bytes += (held - plain) * (wide + FP8_WEIGHT)
    return num_bytes


def _check(model: ModelConfig, layout: Layout, kind: Kind, depth: int) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"there is no layer of kind {kind!r}; use one of {get_args(Kind)}")
    if model.n_routed_experts % layout.ep:
        raise ValueError(
            f"ep={layout.ep} does not divide the model's {model.n_routed_experts} routed experts; "
            "take one that does"
        )
    if kind == "mtp" and not 1 <= depth <= model.num_nextn_predict_layers:
        raise ValueError(
            f"there is no depth {depth} of multi-token prediction: num_nextn_predict_layers is "
            f"{model.num_nextn_predict_layers}"
        )
    if kind == "mtp" and layout.length <= depth:
        raise ValueError(
            f"sequences of {layout.length} tokens are too short for depth {depth} of multi-token "
            "prediction; use longer ones"
        )
