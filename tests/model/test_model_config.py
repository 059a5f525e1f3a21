"""Reading, checking and counting of configurations."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from counterflow.model import (
    ModelConfig,
    Yarn,
    hf_shapes,
    num_active_parameters,
    num_parameters,
)
from counterflow.model.counts import attention_parameters, mtp_parameters
from tests.cases_model import SMALL, V2, YARN

PUBLISHED = Path(__file__).parent / "data"


def published(name: str) -> ModelConfig:
    return ModelConfig.from_hf(PUBLISHED / f"{name}.json")


def test_v3_as_published() -> None:
    config = published("deepseek-v3")
    expected = replace(
        ModelConfig(),  # the defaults, but for the extended context
        initializer_range=0.02,
        max_position_embeddings=163840,
        yarn=Yarn(factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0),
    )
    assert config == expected


def test_v2_as_published() -> None:
    config = published("deepseek-v2")
    assert (config.scoring_func, config.topk_method) == ("softmax", "group_limited_greedy")
    assert (config.norm_topk_prob, config.routed_scaling_factor) == (False, 16.0)
    assert (config.n_group, config.topk_group, config.num_nextn_predict_layers) == (8, 3, 0)
    assert (config.first_k_dense_replace, config.aux_loss_alpha) == (1, 0.001)
    assert config.yarn is not None
    assert config.yarn.mscale == 0.707


def test_v2_lite_as_published() -> None:
    config = published("deepseek-v2-lite")
    assert config.q_lora_rank is None
    assert (config.topk_method, config.n_group, config.topk_group) == ("greedy", 1, 1)


def test_v3_has_671_billion_parameters_and_37_at_work() -> None:
    config = published("deepseek-v3")
    assert round(num_parameters(config) / 1e9, 2) == 671.03
    assert round(num_active_parameters(config) / 1e9, 2) == 36.63
    assert round(num_active_parameters(config, embedding=True) / 1e9, 2) == 37.55
    assert attention_parameters(config) == 187_105_280 + 1536 + 512  # the norms of the latents
    assert round(mtp_parameters(config) / 1e9, 2) == 11.61
    assert num_parameters(config, mtp=True) - num_parameters(config) == mtp_parameters(config)


def test_v2_has_236_billion_parameters() -> None:
    assert round(num_parameters(published("deepseek-v2")) / 1e9, 2) == 235.74


@pytest.mark.parametrize(
    "config",
    [
        published("deepseek-v3"),
        published("deepseek-v2-lite"),
        replace(SMALL, num_nextn_predict_layers=2),
        replace(SMALL, tie_word_embeddings=True, n_shared_experts=0),
    ],
    ids=["v3", "v2-lite", "mtp", "tied"],
)
def test_counts_are_those_of_the_checkpoint(config: ModelConfig) -> None:
    shapes = hf_shapes(config)
    weights = [s for name, s in shapes.items() if not name.endswith("e_score_correction_bias")]
    assert sum(math.prod(shape) for shape in weights) == num_parameters(config, mtp=True)


@pytest.mark.parametrize(
    "config",
    [
        published("deepseek-v3"),
        published("deepseek-v2"),
        published("deepseek-v2-lite"),
        SMALL,
        replace(V2, yarn=YARN, tie_word_embeddings=True),
    ],
    ids=["v3", "v2", "v2-lite", "small", "small-v2"],
)
def test_written_configuration_reads_back(config: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(tmp_path) == config


def test_v2_that_normalises_does_not_scale() -> None:
    hf = {**V2.to_hf(), "norm_topk_prob": True}
    assert ModelConfig.from_hf(hf).routed_scaling_factor == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "original_max_position_embeddings"),
        ({"scoring_func": "tanh"}, "scoring_func must be one of"),
    ],
)
def test_what_the_architecture_lacks_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**SMALL.to_hf(), **change})


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: there is no such file"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        ModelConfig.from_hf(tmp_path)
    hf = SMALL.to_hf()
    del hf["hidden_size"]
    with pytest.raises(ValueError, match="hidden_size missing"):
        ModelConfig.from_hf(hf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be a whole number from 1 up, got 0"),
        ({"hidden_size": 32.0}, "hidden_size must be a whole number"),
        ({"q_lora_rank": 0}, "q_lora_rank"),
        ({"qk_rope_head_dim": 5}, "must be even"),
        ({"first_k_dense_replace": 4}, "more than num_hidden_layers=3"),
        ({"n_group": 3}, "n_group=3 does not divide n_routed_experts=16"),
        ({"topk_group": 5}, "topk_group=5 is more than n_group=4"),
        ({"n_group": 16, "topk_group": 8}, "best 2"),
        ({"num_experts_per_tok": 9}, "2 groups of 4 experts have 8"),
        ({"topk_method": "greedy"}, "set n_group and topk_group to 1"),
        ({"topk_method": "best"}, "noaux_tc, group_limited_greedy, greedy"),
        ({"initializer_range": 0.0}, "initializer_range must be positive"),
        ({"aux_loss_alpha": -1.0}, "aux_loss_alpha"),
        ({"init_seed": 2**31}, "init_seed"),
    ],
)
def test_impossible_dimensions_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    "change",
    [{"factor": 0.5}, {"original_max_position_embeddings": 0}, {"beta_fast": 1.0}],
    ids=str,
)
def test_impossible_yarn_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(YARN, **change)
