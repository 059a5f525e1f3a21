"""How many bytes a layer keeps for its backward, item by item. No torch needed.

These are the savings of arXiv 2412.19437: inputs of products in FP8, the input of the one after
attention in E5M6, SwiGLU's inputs in FP8 and its output made again (section 3.3.3), outputs of
RMSNorms and of MLA's up-projections made again (section 3.2.3). What the attention operator keeps
stays in high precision (section 3.3.1) where it is kept at all.

The numbers are those of the code in this room, to the byte, for a forward with a chunk on a CPU and
a dispatch within one rank without alignment. A GPU's operators keep a little besides (the scales of
RMSNorms, four bytes a token each) and do not pad heads; a dispatch over several ranks keeps more
indices. Weights and what is quantised of them are no activations and not counted.

Shapes: T tokens, R rows of experts, D hidden, I inner, E experts, K experts a token, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import ModelConfig
from .storage import Storage

if TYPE_CHECKING:
    from .build import Build

PADDING = "heads padded to one size (CPUs)"

_TILE = 128
_INDEX = 8  # bytes of an int64
_FLOAT = 4  # of a float32


@dataclass(frozen=True)
class Load:
    """What a layer is given.

    Attributes:
        tokens: T, over all sequences.
        sequences: of how many.
        counts: rows of each expert; None: K rows a token, as evenly over all experts as can be.
    """

    tokens: int
    sequences: int = 1
    counts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.sequences <= self.tokens:
            raise ValueError(
                f"{self.tokens} tokens cannot be {self.sequences} sequences; each has at least one"
            )

    def rows(self, config: ModelConfig) -> tuple[int, ...]:
        """Rows of each expert."""
        if self.counts is not None:
            return self.counts
        experts = config.n_routed_experts
        each, more = divmod(self.tokens * config.num_experts_per_tok, experts)
        return (each + 1,) * more + (each,) * (experts - more)


@dataclass(frozen=True)
class Kept:
    """Bytes by what they are; nothing that takes none.

    Attributes:
        items: bytes by name.
        tokens: for how many tokens.
        attention: bytes of those items that are attention's, with the input of the norm before it.
    """

    items: Mapping[str, int]
    tokens: int
    attention: int

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.items.values())

    def per_token(self, *, padding: bool = False) -> float:
        """Bytes a token, with or without what only CPUs keep: values that fill heads up."""
        left_out = 0 if padding else self.items.get(PADDING, 0)
        return (self.total - left_out) / self.tokens


def kept_for_backward(
    config: ModelConfig, build: Build | Storage, load: Load, *, moe: bool
) -> Kept:
    """What a layer keeps from its forward to its backward, its own input included.

    Its output is left out: if someone needs that, it is the next layer, whose input it is.

    Args:
        config: dimensions.
        build: dtype, recipe, and what is made again, or what that means for memory.
        load: tokens and rows.
        moe: a layer with experts, or a dense one.
    """
    layer = _Layer(config, build, load)
    attention = {
        "layer's input": layer.plain(load.tokens, config.hidden_size),
        **layer.attention(),
    }
    feed_forward = {
        "residual stream": layer.plain(load.tokens, config.hidden_size),
        **(layer.experts() if moe else layer.feed_forward(config.intermediate_size, "MLP")),
    }
    return _kept(attention, feed_forward, load)


def kept_between_halves(
    config: ModelConfig, build: Build | Storage, load: Load, *, moe: bool
) -> Kept:
    """What waits in the queue between the I half of a layer's backward and its W half.

    Each product with a weight keeps its input, as from the forward on, and the gradient of its
    output: in FP8 in tiles of 128x1, for each expert filled up to a multiple of 128 rows.

    Args: as of `kept_for_backward`.
    """
    layer = _Layer(config, build, load)
    attention = layer.waiting_in_attention()
    feed_forward = (
        layer.waiting_in_experts()
        if moe
        else layer.waiting_in_feed_forward(config.intermediate_size, "MLP")
    )
    if layer.norms:  # made again from these
        remade_from = layer.plain(load.tokens, config.hidden_size)
        attention["layer's input"] = feed_forward["residual stream"] = remade_from
    return _kept(attention, feed_forward, load)


def tiled_bytes(rows: int, columns: int) -> int:
    """FP8 in tiles of 1x128: a byte a number, and a float32 scale for each tile."""
    return rows * (columns + _FLOAT * _tiles_in(columns))


def _kept(attention: Mapping[str, int], feed_forward: Mapping[str, int], load: Load) -> Kept:
    items = {name: size for name, size in {**attention, **feed_forward}.items() if size}
    return Kept(items, load.tokens, attention=sum(attention.values()))


class _Layer:
    """Both sums over the same layer."""

    def __init__(self, config: ModelConfig, build: Build | Storage, load: Load) -> None:
        self.config = config
        storage = build if isinstance(build, Storage) else Storage.of(build)
        self.size, self.wide = storage.itemsize, storage.wide
        self.fp8, self.e5m6 = storage.fp8, storage.e5m6
        self.norms, self.up_projections = storage.norms, storage.up_projections
        self.tokens, self.sequences = load.tokens, load.sequences
        self.counts = load.rows(config)
        self.rows = sum(self.counts)

    def plain(self, rows: int, columns: int) -> int:
        return rows * columns * self.size

    def input(self, rows: int, columns: int) -> int:
        """Of a product: in FP8 tiles of 1x128."""
        return tiled_bytes(rows, columns) if self.fp8 else self.plain(rows, columns)

    def normed(self, columns: int) -> int:
        """Of a product with a norm's output, if that is not made again."""
        return 0 if self.norms else self.input(self.tokens, columns)

    def gradient(self, columns: int, counts: tuple[int, ...]) -> int:
        """Of an output: in FP8 tiles of 128x1."""
        if not self.fp8:
            return self.plain(sum(counts), columns)
        return columns * sum(_tiles_in(n) for n in counts) * (_TILE + _FLOAT)

    # From the forward to the backward

    def attention(self) -> dict[str, int]:
        config, tokens, heads = self.config, self.tokens, self.config.num_attention_heads
        query = heads * config.qk_head_dim
        kept = 0 if self.up_projections else 1
        return {
            "input of q_a_proj and kv_a_proj": self.normed(config.hidden_size),
            "latents before their norms": self.latents(),
            "inputs of q_b_proj and kv_b_proj": self.normed_latents(),
            "queries": kept * self.plain(tokens, query),
            "keys": kept * self.plain(tokens, query),
            "values": kept * self.plain(tokens, heads * config.v_head_dim),
            PADDING: self.padding(),
            **self.attention_output(),
            "softmax statistics": tokens * heads * self.wide,
        }

    def latents(self, *, queries: bool = True) -> int:
        """Norms keep these, and queries, keys and values are made again from them.

        Uncompressed `queries` are among them then, and in FP8 come from one product with the rest.
        """
        config = self.config
        columns = config.kv_lora_rank + config.qk_rope_head_dim
        if config.q_lora_rank is not None:
            columns += config.q_lora_rank
        elif self.up_projections and queries:
            columns += config.num_attention_heads * config.qk_head_dim
        return self.plain(self.tokens, columns)

    def normed_latents(self) -> int:
        ranks = (self.config.q_lora_rank, self.config.kv_lora_rank)
        return sum(self.normed(rank) for rank in ranks if rank is not None)

    def padding(self) -> int:
        """What fills queries, keys, values and the operator's output up to heads of one size."""
        config, kept = self.config, 0 if self.up_projections else 1
        longer = config.qk_head_dim - config.v_head_dim
        if longer <= 0:
            columns = 2 * kept * -longer
        else:
            columns = kept * longer
            if not self.fp8:
                columns += (
                    config.qk_head_dim
                )  # the output is one tensor, the product's input another
            elif not self.e5m6:
                columns += longer
        return self.plain(self.tokens, config.num_attention_heads * columns)

    def attention_output(self) -> dict[str, int]:
        tokens, columns = self.tokens, self.config.num_attention_heads * self.config.v_head_dim
        if self.e5m6:
            packed = tokens * (3 * -(-columns // 2) + _FLOAT * _tiles_in(columns))
            return {"output of attention, E5M6": packed}
        return {
            "output of attention": self.plain(tokens, columns),
            "input of o_proj": self.input(tokens, columns) if self.fp8 else 0,
        }

    def feed_forward(self, inner: int, name: str) -> dict[str, int]:
        """A dense feed-forward, or the shared experts."""
        tokens = self.tokens
        items = {
            f"input of {name}": self.normed(self.config.hidden_size),
            f"gate and up of {name}": self.input(tokens, 2 * inner),
        }
        if not self.fp8:
            items[f"silu and product of {name}"] = self.plain(tokens, 2 * inner)
        return items

    def experts(self) -> dict[str, int]:
        config, rows, hidden = self.config, self.rows, self.config.hidden_size
        inner = config.moe_intermediate_size
        items = self.shared_experts() | self.routing()
        items |= {
            "dispatch's indices": self.handle(),
            "router's weight of each row": rows * self.wide,
            "input of experts": self.input(rows, hidden),
            "gate and up of experts": self.input(rows, 2 * inner),
        }
        if not self.fp8:
            items["silu and product of experts"] = self.plain(rows, 2 * inner)
            items["output of experts"] = self.plain(rows, hidden)
        return items

    def shared_experts(self) -> dict[str, int]:
        config = self.config
        items: dict[str, int] = {}
        if config.n_shared_experts:
            inner = config.n_shared_experts * config.moe_intermediate_size
            items = self.feed_forward(inner, "shared experts")
        if not self.norms:
            if not self.fp8:
                items.pop("input of shared experts", None)  # they share the router's
            items["input of the router"] = self.plain(self.tokens, config.hidden_size)
        return items

    def routing(self) -> dict[str, int]:
        config, tokens, wide = self.config, self.tokens, self.wide
        experts, top = config.n_routed_experts, config.num_experts_per_tok
        normalised = config.norm_topk_prob and top > 1
        items = {
            "affinities": tokens * experts * wide,
            "chosen experts": tokens * top * _INDEX,
            "their affinities and sum": tokens * (top + 1) * wide * normalised,
        }
        if config.aux_loss_alpha:
            items["balance loss"] = (tokens + self.sequences * experts) * wide
        return items

    def handle(self) -> int:
        """Each choice's slot, four numbers a row, and where each token's rows begin."""
        slots = self.tokens * self.config.num_experts_per_tok
        return (slots + 4 * self.rows + self.tokens) * _INDEX

    # From I to W

    def waiting_in_attention(self) -> dict[str, int]:
        config, heads = self.config, self.config.num_attention_heads
        query, tokens = heads * config.qk_head_dim, (self.tokens,)
        down = config.kv_lora_rank + config.qk_rope_head_dim
        up = heads * (config.qk_nope_head_dim + config.v_head_dim)
        items = {
            "input of q_a_proj and kv_a_proj": self.normed(config.hidden_size),
            "inputs of q_b_proj and kv_b_proj": self.normed_latents(),
            "gradient of kv_b_proj": self.gradient(up, tokens),
            "gradient of o_proj": self.gradient(config.hidden_size, tokens),
        }
        if config.q_lora_rank is None:
            items["gradient of q_proj and kv_a_proj"] = self.gradient(query + down, tokens)
        else:
            columns = config.q_lora_rank + down
            items["gradient of q_a_proj and kv_a_proj"] = self.gradient(columns, tokens)
            items["gradient of q_b_proj"] = self.gradient(query, tokens)
        if self.norms:
            items["latents before their norms"] = self.latents(queries=self.fp8)
        output = self.attention_output()
        if self.fp8 and not self.e5m6:
            del output["output of attention"]
        return items | output

    def waiting_in_feed_forward(self, inner: int, name: str) -> dict[str, int]:
        tokens = (self.tokens,)
        items = {
            f"input of {name}": self.normed(self.config.hidden_size),
            f"gradient of gate and up of {name}": self.gradient(2 * inner, tokens),
            f"gradient of {name}": self.gradient(self.config.hidden_size, tokens),
        }
        return items | self._down_input(self.tokens, inner, name)

    def _down_input(self, rows: int, inner: int, name: str) -> dict[str, int]:
        if self.fp8:  # from which it is made again
            return {f"gate and up of {name}": self.input(rows, 2 * inner)}
        return {f"product of {name}": self.plain(rows, inner)}

    def waiting_in_experts(self) -> dict[str, int]:
        config, hidden = self.config, self.config.hidden_size
        inner = config.moe_intermediate_size
        items: dict[str, int] = {}
        if config.n_shared_experts:
            items = self.waiting_in_feed_forward(config.n_shared_experts * inner, "shared experts")
        if not self.norms:
            if not self.fp8:
                items.pop("input of shared experts", None)
            items["input of the router"] = self.plain(self.tokens, hidden)
        return items | {
            "gradient of the router": self.tokens * config.n_routed_experts * self.wide,
            "input of experts": self.input(self.rows, hidden),
            "gradient of gate and up of experts": self.gradient(2 * inner, self.counts),
            "gradient of experts": self.gradient(hidden, self.counts),
            "router's weight of each row": self.rows * self.wide if self.fp8 else 0,
            **self._down_input(self.rows, inner, "experts"),
        }


def _tiles_in(size: int) -> int:
    return -(-size // _TILE)
