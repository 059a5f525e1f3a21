"""What a layer keeps for its backward: as predicted, to the byte, and in FP8 little."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bench.activation_memory import MOST
from bench.layer_memory import Measured, make_layer, measure
from counterflow.comm.dispatch.names import PayloadName
from counterflow.fp8 import Recipe
from counterflow.model import ModelConfig
from counterflow.model.build import Build, Recompute
from counterflow.model.memory import PADDING, Load, kept_between_halves, kept_for_backward

NOTHING, BOTH = Recompute(), Recompute(norms=True, up_projections=True)
ALL = [Recompute(norms, up) for norms in (False, True) for up in (False, True)]

# V3's proportions, in sizes of which some are no multiples of 128.
CONFIG = ModelConfig(
    hidden_size=256,
    intermediate_size=320,
    moe_intermediate_size=80,
    num_attention_heads=2,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
)
V2 = replace(
    CONFIG,
    q_lora_rank=None,
    scoring_func="softmax",
    topk_method="group_limited_greedy",
    norm_topk_prob=False,
    n_shared_experts=2,
)
ODD = replace(
    CONFIG,
    n_shared_experts=0,
    num_experts_per_tok=1,
    n_group=1,
    topk_group=1,
    aux_loss_alpha=0.0,
    v_head_dim=48,  # as large as a query head
)
LONG_VALUES = replace(ODD, v_head_dim=72)
LOAD = Load(48, sequences=2)


def see(
    config: ModelConfig, build: Build, *, moe: bool, payload: PayloadName = "exact"
) -> tuple[Measured, Load]:
    layer = make_layer(config, build, moe=moe, payload=payload)
    seen = measure(layer, config, build, LOAD)
    return seen, replace(LOAD, counts=seen.counts) if moe else LOAD


def bf16(recipe: Recipe | None, recompute: Recompute) -> Build:
    return Build(torch.bfloat16, recipe=recipe, recompute=recompute)


@pytest.mark.parametrize(
    ("config", "recompute", "moe"),
    [
        *((CONFIG, recompute, True) for recompute in ALL),
        (CONFIG, NOTHING, False),
        (CONFIG, BOTH, False),
        (V2, NOTHING, True),
        (V2, BOTH, False),
        (ODD, NOTHING, False),
        (ODD, BOTH, True),
        (LONG_VALUES, NOTHING, True),
        (LONG_VALUES, BOTH, False),
    ],
)
def test_predicted_is_what_is_alive_to_the_byte(
    config: ModelConfig, recompute: Recompute, moe: bool
) -> None:
    for recipe in (None, Recipe(), Recipe(e5m6=False, scales="float32")):
        build = bf16(recipe, recompute)
        seen, load = see(config, build, moe=moe)
        assert seen.kept == kept_for_backward(config, build, load, moe=moe).total, recipe
        waiting = kept_between_halves(config, build, load, moe=moe)
        assert seen.waiting is not None
        assert seen.waiting == waiting.total, recipe


@pytest.mark.parametrize("recipe", [None, Recipe()], ids=["bf16", "fp8"])
def test_what_waits_of_two_layers_is_twice_what_waits_of_one(recipe: Recipe | None) -> None:
    """Nothing that waits holds the graph of the layer before it."""
    config = replace(CONFIG, num_experts_per_tok=4, n_group=1, topk_group=1)  # all, for equal rows
    build = bf16(recipe, NOTHING)
    layer = make_layer(config, build, moe=True)
    one, two = (measure(layer, config, build, LOAD, depth=depth) for depth in (1, 2))
    assert one.waiting is not None
    assert two.waiting == 2 * one.waiting


@pytest.mark.parametrize("recipe", [None, Recipe()], ids=["plain", "fp8"])
def test_float32_is_predicted_as_well(recipe: Recipe | None) -> None:
    build = Build(torch.float32, recipe=recipe)
    seen, load = see(CONFIG, build, moe=True)
    assert seen.kept == kept_for_backward(CONFIG, build, load, moe=True).total


@pytest.mark.parametrize("recompute", [NOTHING, BOTH], ids=str)
def test_rows_sent_in_fp8_are_kept_once(recompute: Recompute) -> None:
    build = bf16(Recipe(), recompute)
    sent, _ = see(CONFIG, build, moe=True, payload="fp8")
    exact, _ = see(CONFIG, build, moe=True)
    assert sent.kept == exact.kept


@pytest.mark.parametrize("recompute", [NOTHING, BOTH], ids=str)
def test_an_fp8_layer_with_experts_keeps_at_most_six_tenths(recompute: Recompute) -> None:
    """Both measured here; heads that only CPUs pad, most of all in BF16, are left out."""
    kept: list[int] = []
    for recipe in (Recipe(), None):
        build = bf16(recipe, recompute)
        seen, load = see(CONFIG, build, moe=True)
        padding = kept_for_backward(CONFIG, build, load, moe=True).items.get(PADDING, 0)
        kept.append(seen.kept - padding)
    assert kept[0] <= MOST * kept[1]


def test_at_v3s_size_fp8_and_recomputation_leave_a_quarter() -> None:
    config, load = ModelConfig(), Load(4096)
    plain = kept_for_backward(config, bf16(None, NOTHING), load, moe=True).per_token()
    fp8 = kept_for_backward(config, bf16(Recipe(), NOTHING), load, moe=True).per_token()
    least = kept_for_backward(config, bf16(Recipe(), BOTH), load, moe=True).per_token()
    assert fp8 < MOST * plain
    assert least < 0.3 * plain


def test_queries_that_are_not_compressed_are_kept_once() -> None:
    """They come from one product with the latents, which a norm keeps."""
    build = bf16(Recipe(), NOTHING)
    compressed = kept_for_backward(CONFIG, build, LOAD, moe=False).items
    seen, _ = see(V2, build, moe=False)
    plain = kept_for_backward(V2, build, LOAD, moe=False)
    assert seen.kept == plain.total
    names = "latents before their norms"
    assert compressed[names] - plain.items[names] == LOAD.tokens * 2 * 96


def test_predicting_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from counterflow.model.memory import Load; Load(3)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_load_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens cannot be 3 sequences"):
        Load(2, 3)


def test_rows_are_spread_evenly_unless_given() -> None:
    assert Load(3).rows(CONFIG) == (2, 2, 1, 1)
    assert Load(3, counts=(6, 0, 0, 0)).rows(CONFIG) == (6, 0, 0, 0)
