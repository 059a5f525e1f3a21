"""The operations of a layer's phases, and what they read and write, added up.

Counted is what this project's model does on a GPU, where routing is even. Products are of M rows,
K in and N out: 2 M K N operations in the forward (F), as many for the input's gradient (B) and for
the weight's (W).

    phase  products                       in FP8   M, K, N
    attn   q_a and kv_a (or q and kv_a)   yes      T, D, r + c + R
           q_b, kv_b: made again in B     yes      T, r, H d;  T, c, H (n + v)
           o                              yes      T, H v, D
           router, of float32             no       T, D, E
           eh_proj of "mtp"               yes      T, 2 D, D
    mlp    gate and up, down of a dense   yes      T, D, 2 I;  T, I, D
           layer or of shared experts
           the same of routed experts     yes      T k, D, 2 I;  T k, I, D
           output head                    no       T, D, V

Attention's core takes T L H (d + v) operations in F: a query meets half of its sequence. In B it
takes T L H (3 d + 2 v), as flash attention makes the scores again; that is 2.5 times as many where
heads of queries and values are of one size, and 2.6 times for V3. Where FLOPs are counted for a
utilisation (`model.flops`), backwards are twice their forward: the scores made again are left out.

Bytes are of what is read and written once by each operation that stands alone, s an element, q an
element in FP8 with its share of a scale (without FP8 there is nothing to quantise), w one of
float32 at least, e of E5M6:

    operation                    F                    B                     W
    norm of C columns            2 T C s              3 T C s               2 T C s if made again
    input of a product           T K (s + q)          -                     2 T K q, and what makes
                                                                            it again: T K (s + q)
    gradient of its output       -                    T N (s + 2 q)         -
    a product                    T K q + T N s        T N q + T K s         T (K + N) q
      its weight                 K N q                K N q                 2 K N w
    heads put together, rotated  T s (2 H d +         the same + 2 T H v s  -
                                   H (n + d) + R)
      values, if they are kept   2 T H v s            -                     -
    attention's core             T H (2 d + 2 v) s    T H (4 d + 4 v) s     -
    its output in E5M6           T H v (s + e)        T H v (s + e)         T H v (s + e)
    SwiGLU                       M I (4 s + 3 q)      M I (s + 6 q)         3 M I q
      without FP8                5 M I s              8 M I s               -
    router's affinities          8 T E w              4 T E w               -
    its input in float32         T D (s + w)          T D (4 s + w)         T D (s + w)
    sums of hidden states        6 T D s, 7 with      6 T D s, 9 with       -
                                 shared experts       shared experts
    rows of experts, in and out  2 T k D (s + a)      the same              -
    cross-entropy                T V (s + 3 w)        T V (s + 3 w)         -
    rows of the embedding        2 T D s              -                     T D (s + 2 w)

a is q where rows travel in FP8, else s. What routed experts take of rows that arrive in FP8 is not
quantised again: of their input nothing is left in F, and of their gradient T N (s + q) in B. What B
makes again with q_b and kv_b takes what it took in F: norms, inputs, products and heads.

What is not counted: keys that the core reads more than once (from a cache), rows that share a
record of the dispatch, biases, losses' scalars. Of the embedding's gradient only its rows are
counted; torch fills a gradient of the whole table for each micro-batch.

Letters: T tokens, L of a sequence, D hidden, H heads of d (queries, keys) and v (values), n and R
their parts without and with rotation, r and c ranks of the latents, I inner, E experts, k a token,
V vocabulary.
"""

from __future__ import annotations

from typing import Literal

from ..model import ModelConfig
from .layout import Layout

_PHASES = ("attn(F)", "attn(B)", "attn(W)", "mlp(F)", "mlp(B)", "mlp(W)")

FLOAT = 4
_TILE = 128
_FP8 = 1 + FLOAT / _TILE
FP8_WEIGHT = 1 + FLOAT / _TILE**2
_E5M6 = 1.5 + FLOAT / _TILE

_Place = Literal["attn", "mlp"]


class LayerSum:
    """The sum over a layer's operations.

    Attributes:
        found: by phase the fields of its `Work`, in their order. Operations are whole numbers.
    """

    def __init__(self, model: ModelConfig, layout: Layout) -> None:
        self.found: dict[str, list[float]] = {phase: [0] * 5 for phase in _PHASES}
        self._model, self._layout = model, layout
        self._tokens = layout.tokens
        self._fp8 = layout.fp8
        self._size = layout.itemsize
        self._wide = max(self._size, FLOAT)
        self._low = _FP8 if layout.fp8 else self._size

    # What stands in the table

    def _touch(self, place: _Place, *, F: float = 0, B: float = 0, W: float = 0) -> None:
        """Bytes that are read and written in phases of `place`."""
        for half, num_bytes in (("F", F), ("B", B), ("W", W)):
            self.found[f"{place}({half})"][3] += num_bytes

    def _product(
        self,
        place: _Place,
        rows: int,
        inner: int,
        outer: int,
        *,
        copies: int = 1,
        fp8: bool = True,
        wide: bool = False,
        remade: bool = False,
    ) -> None:
        """A product, with `copies` weights; `remade`: its forward runs in B once more."""
        fp8 = fp8 and self._fp8
        size = self._wide if wide else self._size
        low, of_weight = (self._low, FP8_WEIGHT) if fp8 else (size, size)
        flops = 2 * rows * inner * outer
        weights = copies * inner * outer
        forward = rows * (inner * low + outer * size) + weights * of_weight
        backward = rows * (outer * low + inner * size) + weights * of_weight
        weight = rows * (inner + outer) * low + 2 * weights * self._wide
        for half, times in (("F", 1), ("B", 1 + remade), ("W", 1)):
            self.found[f"{place}({half})"][0 if fp8 else 1] += flops * times
        for half, num_bytes in (
            ("F", forward),
            ("B", backward + (forward if remade else 0)),
            ("W", weight),
        ):
            self.found[f"{place}({half})"][3] += num_bytes
            self.found[f"{place}({half})"][4] += num_bytes

    def _norm(self, place: _Place, columns: int, *, remade: bool = False) -> None:
        each = self._tokens * columns * self._size
        again = 2 * each if self._layout.recompute_norms else 0
        self._touch(place, F=2 * each, B=3 * each + (2 * each if remade else 0), W=again)

    def _input(
        self, place: _Place, rows: int, columns: int, *, kept: bool = True, remade: bool = False
    ) -> None:
        """A product's input: in FP8, and turned; made again from what is not kept in FP8."""
        if not self._fp8:
            return
        quantised = rows * columns * (self._size + self._low)
        turned = 2 * rows * columns * self._low
        self._touch(
            place,
            F=quantised,
            B=quantised if remade else 0,
            W=turned + (0 if kept else quantised),
        )

    def _gradient(self, place: _Place, rows: int, columns: int) -> None:
        """The gradient of a product's output, in rows and in columns."""
        if self._fp8:
            self._touch(place, B=rows * columns * (self._size + 2 * self._low))

    # Parts of layers

    def attention(self) -> None:
        """From the layer's input to the residual sum after attention, and the norm after that."""
        model, tokens, size = self._model, self._tokens, self._size
        heads, rank, hidden = model.num_attention_heads, model.q_lora_rank, model.hidden_size
        queries, values = heads * model.qk_head_dim, heads * model.v_head_dim
        normed = self._layout.recompute_norms
        down = (queries if rank is None else rank) + model.kv_lora_rank + model.qk_rope_head_dim

        self._norm("attn", hidden)
        self._input("attn", tokens, hidden, kept=not normed)
        self._product("attn", tokens, hidden, down)
        self._gradient("attn", tokens, down)
        if rank is not None:
            self._expand(rank, queries)
        self._expand(model.kv_lora_rank, heads * (model.qk_nope_head_dim + model.v_head_dim))
        self._heads()

        core = tokens * self._layout.length
        self.found["attn(F)"][2] += core * (queries + values)
        self.found["attn(B)"][2] += core * (3 * queries + 2 * values)
        moved = tokens * (queries + values) * size
        self._touch("attn", F=2 * moved, B=4 * moved)
        packs = self._fp8 and self._layout.e5m6
        if packs:
            packed = tokens * values * (size + _E5M6)
            self._touch("attn", F=packed, B=packed, W=packed)
        self._input("attn", tokens, values, kept=not packs)
        self._product("attn", tokens, values, hidden)
        self._gradient("attn", tokens, hidden)
        self._norm("attn", hidden)

    def _expand(self, rank: int, columns: int) -> None:
        """A norm of latents and the product after it."""
        tokens, again = self._tokens, self._layout.recompute_up_projections
        self._norm("attn", rank, remade=again)
        kept = not self._layout.recompute_norms
        self._input("attn", tokens, rank, kept=kept, remade=again)
        self._product("attn", tokens, rank, columns, remade=again)
        self._gradient("attn", tokens, columns)

    def _heads(self) -> None:
        """Queries and keys rotated and put together; values where they lie among keys."""
        model, again = self._model, self._layout.recompute_up_projections
        heads, rotated = model.num_attention_heads, model.qk_rope_head_dim
        query = 2 * heads * model.qk_head_dim
        key = heads * (model.qk_nope_head_dim + model.qk_head_dim) + rotated
        value = 2 * heads * model.v_head_dim
        each = self._tokens * self._size
        forward = each * (query + key + (0 if again else value))
        backward = each * (query + key + value)
        self._touch("attn", F=forward, B=backward + (forward if again else 0))

    def sums(self, forward: int, backward: int) -> None:
        """Hidden states that sums of streams, or of their gradients, read and write.

        The sum after an MLP counts with attention, since that of the next layer makes it where
        there are experts.
        """
        each = self._tokens * self._model.hidden_size * self._size
        self._touch("attn", F=forward * each, B=backward * each)

    def feed_forward(self, inner: int) -> None:
        """A dense one, or the shared experts; its input's norm is counted with attention."""
        rows, hidden = self._tokens, self._model.hidden_size
        self._input("mlp", rows, hidden, kept=not self._layout.recompute_norms)
        self._product("mlp", rows, hidden, 2 * inner)
        self._swiglu(rows, inner)
        self._product("mlp", rows, inner, hidden)
        self._gradient("mlp", rows, hidden)

    def _swiglu(self, rows: int, inner: int) -> None:
        each, size, low = rows * inner, self._size, self._low
        if self._fp8:
            self._touch("mlp", F=each * (4 * size + 3 * low), B=each * (size + 6 * low))
            self._touch("mlp", W=3 * each * low)
        else:
            self._touch("mlp", F=5 * each * size, B=8 * each * size)

    def experts(self) -> None:
        """Router, shared and routed experts, and the sum of all streams after them."""
        model, tokens, size, wide = self._model, self._tokens, self._size, self._wide
        hidden, experts = model.hidden_size, model.n_routed_experts
        each = tokens * hidden
        self._product("attn", tokens, hidden, experts, fp8=False, wide=True)
        self._touch("attn", F=8 * tokens * experts * wide, B=4 * tokens * experts * wide)
        widened = each * (size + wide)
        self._touch("attn", F=widened, B=each * (4 * size + wide), W=widened)
        shared = model.n_shared_experts
        if shared:
            self.feed_forward(shared * model.moe_intermediate_size)
        self.sums(7 if shared else 6, 9 if shared else 6)
        self._routed()

    def _routed(self) -> None:
        model, layout, size = self._model, self._layout, self._size
        hidden, inner = model.hidden_size, model.moe_intermediate_size
        rows = self._tokens * model.num_experts_per_tok
        held = model.n_routed_experts // layout.ep
        in_fp8 = self._fp8 and layout.payload == "fp8"
        moved = 2 * rows * hidden * (size + (_FP8 if in_fp8 else size))
        self._touch("mlp", F=moved, B=moved)
        if in_fp8:  # as it came
            turned = rows * hidden
            self._touch("mlp", B=turned * (size + self._low), W=2 * turned * self._low)
        else:
            self._input("mlp", rows, hidden)
            self._gradient("mlp", rows, hidden)
        self._product("mlp", rows, hidden, 2 * inner, copies=held)
        self._swiglu(rows, inner)
        self._product("mlp", rows, inner, hidden, copies=held)

    def head(self) -> None:
        """A norm, the output head and cross-entropy."""
        model, size, wide = self._model, self._size, self._wide
        self._norm("mlp", model.hidden_size)
        self._product("mlp", self._tokens, model.hidden_size, model.vocab_size, fp8=False)
        cast = size + wide if size < wide else 0
        logits = self._tokens * model.vocab_size * (cast + 2 * wide)
        self._touch("mlp", F=logits, B=logits)

    def look_up(self, place: _Place) -> None:
        """Rows of the embedding."""
        each = self._tokens * self._model.hidden_size
        self._touch(place, F=2 * each * self._size, W=each * (self._size + 2 * self._wide))

    def join_with_embedding(self) -> None:
        """What a depth of multi-token prediction makes its layer's input of."""
        tokens, hidden = self._tokens, self._model.hidden_size
        self.look_up("attn")
        self._norm("attn", hidden)
        self._norm("attn", hidden)
        beside = 4 * tokens * hidden * self._size
        self._touch("attn", F=beside, B=beside)
        self._input("attn", tokens, 2 * hidden, kept=not self._layout.recompute_norms)
        self._product("attn", tokens, 2 * hidden, hidden)
        self._gradient("attn", tokens, hidden)
