"""Logits and gradients equal those of transformers on the same checkpoint, written either way.

Where transformers' DeepseekV2 differs from the published V2 nothing is compared: it never
normalises weights (norm_topk_prob, false in all published V2 models).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from counterflow.model import DeepSeekV3, ModelConfig, load_hf, save_hf
from tests.cases_model import SMALL, V2, YARN, batch, set_biases

transformers = pytest.importorskip("transformers")

# float32, some hundred additions in another order
CLOSE = 1e-5

CONFIGS = {
    "q_lora": SMALL,
    "no q_lora, one group": replace(SMALL, q_lora_rank=None, n_group=1, topk_group=1),
    "two groups, all allowed": replace(SMALL, n_group=2, topk_group=2),
    "yarn": replace(SMALL, yarn=YARN),
    "yarn with two mscales, no q_lora": replace(
        SMALL, q_lora_rank=None, yarn=replace(YARN, mscale=1.5, mscale_all_dim=0.5)
    ),
    "no dense layer, not normalised": replace(
        SMALL, first_k_dense_replace=0, num_hidden_layers=2, norm_topk_prob=False
    ),
    "two shared, tied": replace(SMALL, n_shared_experts=2, tie_word_embeddings=True),
    "v2": replace(V2, yarn=replace(YARN, mscale=0.707, mscale_all_dim=0.707)),
    "v2-lite": replace(
        V2,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        q_lora_rank=None,
        routed_scaling_factor=1.0,
        n_shared_experts=2,
    ),
}


def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach() - b.detach()).norm() / b.detach().norm())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_and_gradients_are_those_of_transformers(
    config: ModelConfig, tmp_path: Path
) -> None:
    model = DeepSeekV3(config)
    if config.topk_method == "noaux_tc":
        set_biases(model)
    save_hf([model], tmp_path)
    reference = theirs(tmp_path)
    tokens, targets = batch(config)

    logits = model.logits(model(tokens))
    expected = reference(tokens).logits
    assert relative(logits, expected) < CLOSE

    model.loss(model(tokens), targets).backward()
    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    ours = dict(model.named_parameters())
    named = dict(reference.named_parameters())
    assert ours.keys() == named.keys()
    for name, parameter in named.items():
        grad = ours[name].grad
        assert grad is not None, name
        assert relative(grad, parameter.grad) < CLOSE, name


@pytest.mark.parametrize("config", [SMALL, V2], ids=["v3", "v2"])
def test_checkpoint_that_transformers_wrote_loads(config: ModelConfig, tmp_path: Path) -> None:
    start = DeepSeekV3(config)
    save_hf([start], tmp_path / "ours")
    reference = theirs(tmp_path / "ours")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    reference.save_pretrained(tmp_path / "theirs")

    read = ModelConfig.from_hf(tmp_path / "theirs")
    assert replace(read, aux_loss_alpha=config.aux_loss_alpha) == config
    model = DeepSeekV3(read)
    load_hf(model, tmp_path / "theirs")
    tokens, _ = batch(config)
    assert relative(model.logits(model(tokens)), reference(tokens).logits) < CLOSE
    assert relative(start.logits(start(tokens)), reference(tokens).logits) > CLOSE


def test_prediction_layer_is_that_of_transformers() -> None:
    """One depth of multi-token prediction, whose weights transformers reads by the same names."""
    from transformers.modeling_layers import MtpLayer
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as reference

    config = replace(SMALL, num_nextn_predict_layers=1)
    model = DeepSeekV3(config)
    set_biases(model)
    (layer,) = model.prediction_layers()
    hf_config = transformers.DeepseekV3Config(**config.to_hf(), attn_implementation="eager")
    hf_config.first_k_dense_replace = 0
    other = MtpLayer(hf_config, reference.DeepseekV3DecoderLayer, reference.DeepseekV3RMSNorm, 0)
    renamed: dict[str, torch.Tensor] = {}
    for name, value in layer.state_dict().items():
        first = name.split(".")[0]
        own = first in ("enorm", "hnorm", "eh_proj")
        shared = name == "shared_head.norm.weight"
        renamed["post_norm.weight" if shared else name if own else f"mtp_block.{name}"] = value
    other.load_state_dict(renamed)

    generator = torch.Generator().manual_seed(3)
    hidden, embedded = torch.randn(2, 2, 10, config.hidden_size, generator=generator)
    positions = torch.arange(10).unsqueeze(0)
    mask = torch.full((10, 10), -torch.inf).triu(1)[None, None]
    angles = reference.DeepseekV3RotaryEmbedding(hf_config)(hidden, positions)
    expected = other(embedded, hidden, angles, mask, positions, None)
    rotation = model.rotation(10, hidden.device)
    actual = layer.shared_head.norm(layer.predict(hidden, embedded, rotation))
    assert relative(actual, expected) < CLOSE
