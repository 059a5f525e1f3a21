"""The study of FP8 against BF16 compares what it says it does."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import bench.fp8_training as study


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of which a step takes no time; it keeps the two outlier channels and more than one
    tile."""
    whole = study.model(1)
    sizes = {
        "hidden_size": 160,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_attention_heads": 2,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
    }
    monkeypatch.setattr(study, "model", lambda scale: replace(whole, **sizes))


def options(folder: Path, **others: object) -> argparse.Namespace:
    given = {"steps": 4, "control_steps": 3, "batch": 2, "scale": 1, "device": "cpu"}
    return argparse.Namespace(folder=folder, **{**given, **others})


def losses(variant: study.Variant, steps: int) -> list[float]:
    trained = study.Study(variant, scale=1, batch=2, device="cpu")
    return [trained.step(1e-3) for _ in range(steps)]


@pytest.mark.usefixtures("small")
def test_outlier_channels_leave_training_in_bf16_the_same_to_the_last_bit() -> None:
    plain = losses(study.Variant(), 4)
    assert losses(study.Variant(outliers=True), 4) == plain
    assert len(set(plain)) == 4


@pytest.mark.usefixtures("small")
def test_outlier_channels_are_seen_by_the_products() -> None:
    trained = study.Study(study.Variant(outliers=True), scale=1, batch=2, device="cpu")
    layer = next(iter(trained.engine.parts.values())).decoder_layers()[0]
    gain = layer.input_layernorm.weight
    assert gain[study.OUTLIERS].tolist() == [study.OUTLIER] * 2
    trained.step(1e-3)
    (master,) = (
        trained.engine.optimizer.masters[name]
        for name, p in trained.engine.parameters.items()
        if p is gain
    )
    assert (master[study.OUTLIERS] != study.OUTLIER).all(), "the outliers do not train"
    assert (master[study.OUTLIERS] > study.OUTLIER / 2).all()


@pytest.mark.usefixtures("small")
def test_runs_are_written_read_compared_and_not_taken_for_others(tmp_path: Path) -> None:
    given = options(tmp_path)
    for name in ("bf16", "tensor_outliers"):
        study.run(name, given)
    runs = {name: study.read(name, given) for name in ("bf16", "tensor_outliers")}
    found = study.summary(runs)
    assert [found[name]["steps"] for name in runs] == [4, 3]
    assert found["bf16"]["relative_difference_final"] == 0
    assert found["tensor_outliers"]["relative_difference_final"] != 0
    errors = study.gradient_errors(given, ["bf16", "fp8"])
    assert errors["bf16"] == 0 < errors["fp8"] < 1
    with pytest.raises(ValueError, match="other options"):
        study.read("bf16", options(tmp_path, batch=3))


def test_losses_are_smoothed_by_nine_tenths() -> None:
    assert np.allclose(study.smoothed([2.0, 1.0, 1.0]), [2.0, 1.9, 1.81])
