"""Published numbers of V3 follow from each other by the arithmetic of `predict.published`."""

from __future__ import annotations

import pytest

from counterflow.model import ModelConfig
from counterflow.model.counts import grouped_kv_cache_bytes, kv_cache_bytes
from counterflow.model.flops import mfu, token_flops
from counterflow.predict import published


def test_hours_of_pre_training_follow_from_hours_per_trillion() -> None:
    """arXiv 2412.19437, section 1 and table 1."""
    total = published.gpu_hours(published.V3_TOKENS, published.V3_HOURS_PER_TRILLION)
    assert total == published.V3_GPU_HOURS["pre-training"] == 2_664_000
    gpus = published.V3_RUN.num_gpus
    assert round(published.days(published.V3_HOURS_PER_TRILLION, gpus), 1) == 3.7


def test_tokens_of_a_day_tell_nearly_the_same_hours() -> None:
    hours = published.hours_per_trillion(published.V3_TOKENS_PER_DAY, published.V3_RUN.num_gpus)
    assert round(hours / 1e3, 1) == 180.2
    assert round(published.gpu_hours(published.V3_TOKENS, hours) / 1e3, 1) == 2666.6


def test_tokens_of_a_day_are_the_mfu_that_is_published_beside_them() -> None:
    """arXiv 2505.09343, table 4: 38.94 % causal, 43.73 % not."""
    rate = published.V3_TOKENS_PER_DAY / 86400 / published.V3_RUN.num_gpus
    cost = token_flops(ModelConfig(), published.V3_RUN.length)
    shares = [mfu(flops, rate, 989.0) for flops in (cost.published, cost.not_causal)]
    assert [round(100 * share, 2) for share in shares if share is not None] == [38.94, 43.73]


def test_the_published_hours_are_steps_of_19_9_seconds() -> None:
    run = published.V3_RUN
    assert (run.dp, run.dp // run.ep, run.tokens_per_step) == (128, 2, 62_914_560)
    assert round(published.step_seconds(published.V3_HOURS_PER_TRILLION, run), 1) == 19.9


def test_costs_add_up_to_what_is_published() -> None:
    """arXiv 2412.19437, table 1."""
    costs = published.dollars(published.V3_GPU_HOURS, published.V3_DOLLARS_PER_HOUR)
    assert costs == {
        "pre-training": 5_328_000,
        "context extension": 238_000,
        "post-training": 10_000,
    }
    assert sum(published.V3_GPU_HOURS.values()) == 2_788_000
    assert sum(costs.values()) == 5_576_000


@pytest.mark.parametrize(
    ("gbps", "exchange", "layer", "token", "rate"),
    [(50, 120.96, 241.92, 14.76, 67), (900, 6.72, 13.44, 0.82, 1219)],
)
def test_the_time_of_an_output_token_is_the_published_one(
    gbps: float, exchange: float, layer: float, token: float, rate: int
) -> None:
    """arXiv 2505.09343, section 2.3.2, which cuts off the rates and calls 1219 about 1200."""
    one = published.exchange_us(gbps)
    assert round(one, 9) == exchange
    assert round(published.layer_us(one), 9) == layer
    assert round(published.output_token_ms(one), 2) == token
    assert int(1e3 / published.output_token_ms(one)) == rate


def test_the_true_hidden_size_makes_the_exchange_somewhat_longer() -> None:
    assert round(published.exchange_us(50, hidden=7168), 2) == 123.86


def test_the_cache_of_a_token_has_the_published_bytes() -> None:
    """arXiv 2505.09343, table 1: V3, Qwen-2.5 72B, LLaMA-3.1 405B."""
    v3 = kv_cache_bytes(ModelConfig())
    qwen = grouped_kv_cache_bytes(layers=80, kv_heads=8, head_dim=128)
    llama = grouped_kv_cache_bytes(layers=126, kv_heads=8, head_dim=128)
    assert (v3, qwen, llama) == (70_272, 327_680, 516_096)
    assert round(qwen / v3, 2) == 4.66
    assert kv_cache_bytes(ModelConfig(), bytes_per_element=1) == v3 // 2
