"""The recipe of FLOPs: DeepSeek's published figures, and the model's own products counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from counterflow.model import DeepSeekV3, ModelConfig
from counterflow.model.flops import mfu, peak_tflops, token_flops
from counterflow.parallel.chunk import Chunk
from tests.cases_model import SMALL, V2, batch, total_loss

V3 = ModelConfig()
PUBLISHED = Path(__file__).parent / "data"


def test_a_token_of_v3_costs_what_its_authors_publish() -> None:
    """arXiv 2505.09343: 250 GFLOPs at 4096 tokens, of V2 155; full attention costs 30.7 more."""
    cost = token_flops(V3, 4096)
    assert cost.published == 6 * 36_518_166_528 + 61 * 6 * 128 * (192 + 128) * 2048
    assert round(cost.published / 1e9, 2) == 249.81
    assert round(cost.not_causal / 1e9, 2) == 280.51
    v2 = ModelConfig.from_hf(PUBLISHED / "deepseek-v2.json")
    assert round(token_flops(v2, 4096).published / 1e9, 2) == 155.01


def test_v3s_gpu_hours_are_an_mfu_of_39_percent() -> None:
    """180,000 H800 hours for 10^12 tokens (arXiv 2412.19437, table 1), and 989 TFLOP/s."""
    rate = 1e12 / (180e3 * 3600)
    share = mfu(token_flops(V3, 4096).published, rate, peak_tflops("NVIDIA H800"))
    assert share is not None
    assert round(share, 3) == 0.390


def test_what_is_left_out_of_mfu_is_told_apart() -> None:
    cost = token_flops(V3, 4096)
    assert cost.router == 6 * 58 * 7168 * 256
    assert cost.everything == cost.published + cost.router + cost.mtp
    assert cost.mtp > cost.head  # the further token's logits cost as much as the next one's
    assert token_flops(replace(V3, num_nextn_predict_layers=0), 4096).mtp == 0


# Heads of one size: where they differ, the CPU's attention fills the smaller ones up with zeros.
EVEN = replace(SMALL, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12)


@pytest.mark.parametrize(
    "config",
    [
        EVEN,
        replace(EVEN, q_lora_rank=None, n_shared_experts=0, tie_word_embeddings=True),
        replace(EVEN, num_nextn_predict_layers=2, first_k_dense_replace=0, n_shared_experts=2),
        replace(V2, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12),
    ],
    ids=["V3", "no q_lora, tied", "mtp", "V2"],
)
def test_the_recipe_counts_the_products_that_the_model_makes(config: ModelConfig) -> None:
    model = DeepSeekV3(config)
    tokens, targets = batch(config)
    length = tokens.shape[1]
    # The unfused attention multiplies the masked half too.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        total_loss(model, tokens, targets, Chunk()).backward()
    cost = token_flops(config, length)
    masked = cost.scores
    for depth in range(1, config.num_nextn_predict_layers + 1):
        seen = length - depth
        of_layer = token_flops(config, seen).scores / config.num_hidden_layers
        masked += of_layer * seen / length
    assert counter.get_total_flops() == tokens.numel() * (cost.everything + masked)


def test_peaks_are_told_by_the_names_that_drivers_give() -> None:
    assert [
        peak_tflops(name)
        for name in (
            *("NVIDIA H100 80GB HBM3", "NVIDIA H800", "NVIDIA H200", "NVIDIA A100-SXM4-80GB"),
            *("NVIDIA B200", "NVIDIA H100 PCIe", "NVIDIA H20", "NVIDIA GeForce GTX 1080", "H1000"),
        )
    ] == [989, 989, 989, 312, 2250, 756.5, 148, None, None]
    assert mfu(1e9, 1e3, None) is None
    assert mfu(1e9, 1e3, 100) == 0.01
