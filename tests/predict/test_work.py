"""Work of phases: against what MFU counts, what the model executes, and its parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from counterflow.model import DeepSeekV3, ModelConfig
from counterflow.model.build import Recompute
from counterflow.model.flops import token_flops
from counterflow.model.inventory import inventory
from counterflow.model.stages import Part
from counterflow.parallel.chunk import Chunk
from counterflow.predict.layout import Kind, Layout
from counterflow.predict.work import Work, layer_work, optimizer_bytes, routed_share

V3 = ModelConfig()
V2 = ModelConfig(
    vocab_size=102400,
    hidden_size=5120,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    num_hidden_layers=60,
    first_k_dense_replace=1,
    n_routed_experts=160,
    n_shared_experts=2,
    num_experts_per_tok=6,
    topk_group=3,
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    num_nextn_predict_layers=0,
)
V2_LITE = replace(
    V2,
    hidden_size=2048,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    num_attention_heads=16,
    q_lora_rank=None,
    n_routed_experts=64,
    n_group=1,
    topk_group=1,
    topk_method="greedy",
)
SMALL = ModelConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=40,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=12,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=12,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    num_nextn_predict_layers=2,
    max_position_embeddings=64,
)


def keeping(layout: Layout) -> Layout:
    """The same without recomputation."""
    return replace(layout, recompute_norms=False, recompute_up_projections=False)


def whole_model(model: ModelConfig, layout: Layout) -> dict[str, Work]:
    """The work of all layers by phase."""
    works = [layer_work(model, layout, "embedding"), layer_work(model, layout, "head")]
    for layer in range(model.num_hidden_layers):
        works.append(layer_work(model, layout, "moe" if model.is_moe(layer) else "dense"))
    for depth in range(1, model.num_nextn_predict_layers + 1):
        works.append(layer_work(model, layout, "mtp", depth=depth))
    return {name: added(work[name] for work in works) for name in works[0]}


def added(works: Iterable[Work]) -> Work:
    return Work(*(sum(field) for field in zip(*works, strict=True)))


def made_again(model: ModelConfig, layout: Layout) -> float:
    """Operations of attention's scores, which flash attention's backward makes again."""
    lengths = [layout.length] * model.num_hidden_layers
    lengths += [layout.length - k for k in range(1, model.num_nextn_predict_layers + 1)]
    per_pair = model.num_attention_heads * model.qk_head_dim
    return sum(layout.sequences * length * length * per_pair for length in lengths)


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    size = st.integers(1, 60)
    layers = draw(st.integers(1, 6))
    return replace(
        SMALL,
        vocab_size=draw(size),
        hidden_size=draw(size),
        intermediate_size=draw(size),
        moe_intermediate_size=draw(size),
        num_hidden_layers=layers,
        first_k_dense_replace=draw(st.integers(0, layers)),
        num_attention_heads=draw(st.integers(1, 5)),
        q_lora_rank=draw(st.none() | size),
        kv_lora_rank=draw(size),
        v_head_dim=draw(size),
        n_shared_experts=draw(st.integers(0, 3)),
        num_experts_per_tok=draw(st.integers(1, 4)),
        num_nextn_predict_layers=draw(st.integers(0, 3)),
    )


def check_against_mfu(model: ModelConfig, layout: Layout) -> None:
    work = added(whole_model(model, layout).values())
    assert layout.length & (layout.length - 1) == 0  # so that the mean over tokens is exact
    counted = work.fp8_flops + work.flops + work.attention_flops - made_again(model, layout)
    assert counted == token_flops(model, layout.length).everything * layout.tokens


@settings(max_examples=100, deadline=None)
@given(
    model=models(),
    sequences=st.integers(1, 5),
    length=st.sampled_from([4, 16, 64]),
    ep=st.sampled_from([1, 2, 8]),
    fp8=st.booleans(),
)
def test_phases_without_recomputation_add_up_to_what_mfu_counts(
    model: ModelConfig, sequences: int, length: int, ep: int, fp8: bool
) -> None:
    layout = Layout(dp=ep, ep=ep, sequences=sequences, length=length, fp8=fp8)
    check_against_mfu(model, keeping(layout))


@pytest.mark.parametrize("model", [V3, V2, V2_LITE])
def test_published_models_add_up_to_what_mfu_counts(model: ModelConfig) -> None:
    check_against_mfu(model, keeping(Layout(dp=8, ep=8)))


@pytest.mark.parametrize("recompute", [False, True])
def test_products_are_those_that_the_model_executes(recompute: bool) -> None:
    batch, length = 2, 16
    network = DeepSeekV3(SMALL, recompute=Recompute(norms=recompute, up_projections=recompute))
    tokens, chunk = torch.randint(SMALL.vocab_size, (batch, length)), Chunk()
    with FlopCounterMode(display=False) as forward:
        loss = network.loss(network(tokens, chunk), tokens, chunk)
        for _, further in chunk.losses:
            loss = loss + further
    with FlopCounterMode(display=False) as backward:
        loss.backward()
        chunk.weight_grads.run()
    layout = Layout(
        sequences=batch,
        length=length,
        dtype="float32",
        fp8=False,
        recompute_norms=recompute,
        recompute_up_projections=recompute,
    )
    work = whole_model(SMALL, layout)
    by_half = {half: work[f"attn({half})"].flops + work[f"mlp({half})"].flops for half in "FBW"}
    # The counter does not know torch's attention for CPUs, so products are all that it counts.
    assert forward.get_total_flops() == by_half["F"]
    assert backward.get_total_flops() == by_half["B"] + by_half["W"]


def test_recomputed_up_projections_cost_their_forward_in_the_backward_of_attention() -> None:
    layout = Layout(dp=8, ep=8)
    kept = layer_work(V3, replace(layout, recompute_up_projections=False), "moe")
    again = layer_work(V3, layout, "moe")
    up = 1536 * 128 * (128 + 64) + 512 * 128 * (128 + 128)
    assert again["attn(B)"].fp8_flops - kept["attn(B)"].fp8_flops == 2 * layout.tokens * up
    assert again["attn(B)"].num_bytes > kept["attn(B)"].num_bytes
    for name in kept:
        if name != "attn(B)":
            assert again[name].fp8_flops == kept[name].fp8_flops


def test_norms_made_again_take_bytes_and_no_operations() -> None:
    layout = Layout(dp=8, ep=8, fp8=False)
    kept = layer_work(V3, replace(layout, recompute_norms=False), "dense")
    again = layer_work(V3, layout, "dense")
    columns = 2 * 7168 + 1536 + 512  # two of hidden states, two of latents
    for name in kept:
        more = 2 * layout.tokens * columns * 2 if name == "attn(W)" else 0
        assert again[name].num_bytes - kept[name].num_bytes == more
        assert again[name].flops == kept[name].flops


def test_head_router_and_embedding_are_never_in_fp8_and_nothing_is_without_it() -> None:
    layout = Layout(dp=8, ep=8)
    for work in layer_work(V3, layout, "head").values():
        assert work.fp8_flops == 0
    router = 2 * layout.tokens * 7168 * 256
    moe = layer_work(V3, layout, "moe")
    assert [moe[f"attn({half})"].flops for half in "FBW"] == [router] * 3
    assert [moe[f"mlp({half})"].flops for half in "FBW"] == [0] * 3
    plain = layer_work(V3, replace(layout, fp8=False), "moe")
    for name, work in moe.items():
        assert plain[name].fp8_flops == 0
        assert plain[name].flops == work.fp8_flops + work.flops


def test_backward_of_attention_is_two_and_a_half_forwards_where_heads_are_of_one_size() -> None:
    even = replace(V3, v_head_dim=V3.qk_head_dim)
    for model, ratio in ((even, 2.5), (V3, 2.6)):
        work = layer_work(model, Layout(dp=8, ep=8), "dense")
        assert work["attn(B)"].attention_flops == ratio * work["attn(F)"].attention_flops
        assert work["attn(W)"].attention_flops == 0


@pytest.mark.parametrize("ep", [1, 8, 64])
def test_bytes_that_do_not_grow_with_tokens_are_those_of_the_ranks_weights(ep: int) -> None:
    layout = Layout(dp=64, ep=ep, fp8=False)
    one, two = (
        added(
            work
            for name, work in layer_work(V3, replace(layout, sequences=n), "moe").items()
            if name.endswith("(W)")
        )
        for n in (1, 2)
    )
    every = inventory(V3, Part(range(3, 4), embed=False, head=False))
    held = sum(p.numel // (ep if p.routed else 1) for p in every if p.product or p.wide)
    # Gradients of float32 are read and written once a micro-batch, however many tokens it has.
    assert 2 * one.num_bytes - two.num_bytes == 8 * held
    assert 2 * one.product_bytes - two.product_bytes == 8 * held
    assert one.product_bytes < one.num_bytes


def documented_bytes(model: ModelConfig, tokens: int, held: int) -> dict[str, float]:
    """The table of `operations` for a layer with experts, all in FP8 and made again; BF16 else."""
    s, q, w, e, of_weight = 2, 1 + 4 / 128, 4, 1.5 + 4 / 128, 1 + 4 / 128**2
    hidden, heads = model.hidden_size, model.num_attention_heads
    ranks = (model.q_lora_rank or 0, model.kv_lora_rank)
    keys, values = heads * model.qk_head_dim, heads * model.v_head_dim
    content, turned = heads * model.qk_nope_head_dim, model.qk_rope_head_dim
    rows, inner = tokens * model.num_experts_per_tok, model.moe_intermediate_size
    shared, experts = model.n_shared_experts * inner, model.n_routed_experts
    found = {f"{place}({half})": 0.0 for place in ("attn", "mlp") for half in "FBW"}

    def add(place: str, forward: float, backward: float = 0, weight: float = 0) -> None:
        for half, size in (("F", forward), ("B", backward), ("W", weight)):
            found[f"{place}({half})"] += size

    def product(place: str, m: int, k: int, n: int, copies: int = 1, again: bool = False) -> None:
        weights = copies * k * n
        forward = m * (k * q + n * s) + weights * of_weight
        backward = m * (n * q + k * s) + weights * of_weight + again * forward
        add(place, forward, backward, m * (k + n) * q + 2 * weights * w)

    for columns in (hidden, hidden):
        add("attn", *(times * tokens * columns * s for times in (2, 3, 2)))
    for columns in ranks:  # once more in B
        add("attn", *(times * tokens * columns * s for times in (2, 5, 2)))
        add("attn", 0, tokens * columns * (s + q))
    for columns in (hidden, *ranks, values):  # inputs, none of which is kept in FP8
        quantised = tokens * columns * (s + q)
        add("attn", quantised, 0, quantised + 2 * tokens * columns * q)
    down = sum(ranks) + turned
    for columns in (down, keys, content + values, hidden):  # gradients of outputs
        add("attn", 0, tokens * columns * (s + 2 * q))
    product("attn", tokens, hidden, down)
    product("attn", tokens, ranks[0], keys, again=True)
    product("attn", tokens, ranks[1], content + values, again=True)
    product("attn", tokens, values, hidden)
    together = tokens * s * (2 * keys + content + keys + turned)
    add("attn", together, 2 * together + 2 * tokens * values * s)
    core = tokens * (keys + values) * s
    add("attn", 2 * core, 4 * core)
    add("attn", *[tokens * values * (s + e)] * 3)
    router = (tokens * (hidden + experts) + hidden * experts) * w
    add("attn", router, router, router + hidden * experts * w)
    add("attn", 8 * tokens * experts * w, 4 * tokens * experts * w)
    add("attn", *(tokens * hidden * size for size in (s + w, 4 * s + w, s + w)))
    add("attn", 7 * tokens * hidden * s, 9 * tokens * hidden * s)

    quantised = tokens * hidden * (s + q)  # the shared experts' input
    add("mlp", quantised, 0, quantised + 2 * tokens * hidden * q)
    add("mlp", 0, tokens * hidden * (s + 2 * q))
    add("mlp", 0, rows * hidden * (s + q), 2 * rows * hidden * q)
    add("mlp", *[2 * rows * hidden * (s + q)] * 2)
    for m, size, copies in ((tokens, shared, 1), (rows, inner, held)):
        product("mlp", m, hidden, 2 * size, copies)
        product("mlp", m, size, hidden, copies)
        add("mlp", *(m * size * each for each in (4 * s + 3 * q, s + 6 * q, 3 * q)))
    return found


@pytest.mark.parametrize(("model", "ep"), [(V3, 64), (SMALL, 2)])
def test_bytes_are_those_of_the_documented_table(model: ModelConfig, ep: int) -> None:
    layout = Layout(dp=ep, ep=ep, length=32, sequences=3)
    found = layer_work(model, layout, "moe")
    expected = documented_bytes(model, 96, model.n_routed_experts // ep)
    assert {n: work.num_bytes for n, work in found.items()} == pytest.approx(expected, rel=1e-12)


def test_rows_that_travel_in_fp8_move_fewer_bytes_within_a_rank_too() -> None:
    fp8 = layer_work(V3, Layout(dp=8, ep=8, payload="fp8"), "moe")
    bf16 = layer_work(V3, Layout(dp=8, ep=8, payload="bf16"), "moe")
    for name in fp8:
        if name in ("mlp(F)", "mlp(B)"):
            assert fp8[name].num_bytes < bf16[name].num_bytes
        else:
            assert fp8[name].num_bytes == bf16[name].num_bytes


def test_an_embedding_reads_and_writes_rows_only() -> None:
    work = layer_work(V3, Layout(), "embedding")
    rows = 4096 * 7168
    assert work["mlp(F)"] == Work(num_bytes=rows * (2 + 2))
    assert work["mlp(W)"] == Work(num_bytes=rows * (2 + 4 + 4))
    assert added(work.values()).num_bytes == rows * 14


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("kind", ["moe", "mtp"])
def test_the_routed_share_is_what_rows_add_to_the_time_of_products(kind: Kind, fp8: bool) -> None:
    layout = Layout(dp=8, ep=8, fp8=fp8)
    share = routed_share(V3, layout, kind)

    def time(model: ModelConfig) -> float:
        work = layer_work(model, layout, kind)["mlp(B)"]
        return work.fp8_flops / 2 + work.flops

    doubled = time(replace(V3, num_experts_per_tok=16))
    assert doubled / time(V3) == pytest.approx(1 + share, rel=1e-12)
    assert 0 < share < 1
    assert routed_share(V3, layout, "dense") == 0.0


def test_the_routed_share_of_v3_is_eight_ninths() -> None:
    assert routed_share(V3, Layout(dp=8, ep=8)) == 8 / 9


def test_optimizer_bytes_count_each_state_that_is_read_or_written() -> None:
    plain = Layout(dp=4, ep=2, fp8=False, zero=0)
    # Gradient twice, master and two bfloat16 moments each way, parameter once.
    assert optimizer_bytes(plain, routed=100, other=60) == 160 * (4 + 4 + 8 + 2 * 4 + 2)
    wide = replace(plain, moments="float32", dtype="float32")
    assert optimizer_bytes(wide, routed=100, other=60) == 160 * (4 + 4 + 8 + 2 * 8)
    shared = replace(plain, zero=1)
    assert optimizer_bytes(shared, routed=100, other=60) == (50 + 15) * 26
    fp8 = replace(plain, fp8=True)
    told = optimizer_bytes(fp8, routed=100, other=60, plain=20)
    quantised = 140 * (4 + 1 + 4 / 128**2)
    assert told == pytest.approx(160 * 24 + 20 * 2 + quantised, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"ep": 3, "dp": 3}, "moe", "ep=3 does not divide"),
        ({"length": 1}, "mtp", "too short"),
        ({}, "experts", "no layer of kind"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(
    changes: dict[str, int], kind: Kind, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        layer_work(V3, replace(Layout(), **changes), kind)


def test_a_depth_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="no depth 2"):
        layer_work(V3, Layout(), "mtp", depth=2)
    with pytest.raises(ValueError, match="no depth 1"):
        layer_work(V2, Layout(dp=8, ep=8), "mtp")
