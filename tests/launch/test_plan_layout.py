"""A layout becomes a configuration that the trainer takes, and a configuration a layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.launch.check import check, check_sizes
from counterflow.launch.config import Config, load, small_model
from counterflow.launch.plan_layout import config_of, layout_of
from counterflow.launch.settings import ConfigError, to_toml
from counterflow.model import ModelConfig
from counterflow.predict.layout import Layout

V3 = Layout(pp=16, dp=128, ep=64, microbatches=120, layers=(4,) * 15 + (1,))
SMALL = Layout(pp=2, dp=2, ep=2, microbatches=4, sequences=2, length=128, dispatcher="two_hop")
CPU = replace(SMALL, comm_sms=None, dtype="float32", fp8=False, payload="exact")


def written(config: Config, folder: Path) -> Config:
    """The configuration that is read back from the file that was written of it."""
    path = folder / "plan.toml"
    path.write_text(to_toml(config))
    return load(path)


def test_v3s_layout_survives_its_file(tmp_path: Path) -> None:
    config = written(config_of(V3, ModelConfig()), tmp_path)
    check_sizes(config)
    assert layout_of(config) == V3
    assert config.model == ModelConfig()
    assert config.global_batch == 15360
    assert config.schedule.layers == V3.layers
    assert config.run.device == "cuda", "SMs are kept on GPUs alone"


def test_a_plan_for_processors_passes_every_check(tmp_path: Path) -> None:
    config = written(config_of(replace(CPU, layers=(1, 3)), small_model()), tmp_path)
    check(config)
    assert layout_of(config) == replace(CPU, layers=(1, 3))


@settings(max_examples=60, deadline=None)
@given(
    layout=st.builds(
        Layout,
        pp=st.sampled_from((1, 2, 4)),
        dp=st.just(4),
        ep=st.sampled_from((2, 4)),
        schedule=st.sampled_from(("1f1b", "zb-h1", "dualpipev")),
        microbatches=st.sampled_from((8, 16)),
        sequences=st.integers(1, 4),
        length=st.sampled_from((16, 128)),
        layers=st.none(),
        dtype=st.sampled_from(("bfloat16", "float32")),
        fp8=st.booleans(),
        e5m6=st.booleans(),
        dispatcher=st.sampled_from(("flat", "dedup", "two_hop")),
        payload=st.sampled_from(("exact", "bf16", "fp8", "logfmt8", "logfmt10")),
        comm_sms=st.sampled_from((None, 20)),
        recompute_norms=st.booleans(),
        recompute_up_projections=st.booleans(),
        moments=st.sampled_from(("bfloat16", "float32")),
        zero=st.integers(0, 1),
        ema=st.booleans(),
        overlap=st.booleans(),
    )
)
def test_every_layout_comes_back_from_its_configuration(layout: Layout) -> None:
    model = replace(small_model(), num_hidden_layers=8)
    config = config_of(layout, model)
    check_sizes(config)
    assert layout_of(config) == layout


def test_one_expert_rank_exchanges_nothing() -> None:
    config = config_of(replace(V3, ep=1), ModelConfig())
    check_sizes(config)
    assert layout_of(config) == replace(V3, ep=1, dispatcher="flat", comm_sms=None)


def test_what_a_layout_does_not_say_is_the_bases() -> None:
    base = load(None, [("train.lr", "0.001"), ("train.ema_decay", "0.5"), ("run.name", "mine")])
    averaged = config_of(replace(CPU, ema=True), small_model(), base)
    assert averaged.train.ema_decay == 0.5
    assert (averaged.train.lr, averaged.run.name) == (0.001, "mine")
    assert config_of(CPU, small_model(), base).train.ema_decay is None


def test_the_default_run_has_a_layout() -> None:
    layout = layout_of(Config())
    assert layout == replace(
        CPU,
        moments="float32",
        recompute_norms=False,
        recompute_up_projections=False,
        zero=0,
    )


def test_a_layout_that_no_run_can_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot be trained.*logfmt10"):
        config_of(replace(V3, payload="logfmt10"), ModelConfig())
    with pytest.raises(ConfigError, match=r"must divide mesh\.dp=128"):
        config_of(replace(V3, ep=48), ModelConfig())
