"""The parameters of a part of a model, told without making it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from counterflow.fp8 import Recipe
from counterflow.model import DeepSeekV3, ModelConfig, Part, num_parameters
from counterflow.model.build import Build, Recompute
from counterflow.model.experts import Experts
from counterflow.model.inventory import inventory
from counterflow.model.storage import Storage
from tests.cases_model import SMALL, V2

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    layers = draw(st.integers(1, 4))
    base = draw(st.sampled_from([SMALL, V2]))
    return replace(
        base,
        num_hidden_layers=layers,
        first_k_dense_replace=draw(st.integers(0, layers)),
        q_lora_rank=draw(st.none() | st.integers(1, 9)),
        num_nextn_predict_layers=draw(st.integers(0, 2)),
        tie_word_embeddings=draw(st.booleans()),
        n_shared_experts=draw(st.integers(0, 2)),
        v_head_dim=draw(st.integers(1, 9)),
    )


def hold_against_the_model(
    config: ModelConfig, part: Part, dtype: torch.dtype, recipe: Recipe | None
) -> None:
    module = DeepSeekV3(config, part, dtype=dtype, device="meta", recipe=recipe)
    routed = {id(p) for m in module.modules() if isinstance(m, Experts) for p in m.parameters()}
    storage = Storage.of(Build(dtype, recipe=recipe))
    assert [
        (p.name, p.shape, p.numel, p.itemsize(storage), p.routed) for p in inventory(config, part)
    ] == [
        (name, tuple(p.shape), p.numel(), p.dtype.itemsize, id(p) in routed)
        for name, p in module.named_parameters()
    ]


@settings(max_examples=60, deadline=None)
@given(models(), st.data(), st.sampled_from(DTYPES), st.sampled_from([None, Recipe()]))
def test_a_parts_parameters_are_those_of_the_model(
    config: ModelConfig, data: st.DataObject, dtype: torch.dtype, recipe: Recipe | None
) -> None:
    last = config.num_hidden_layers
    start = data.draw(st.integers(0, last))
    stop = data.draw(st.integers(start, last))
    embed = start == 0 and data.draw(st.booleans())
    head = stop == last and data.draw(st.booleans())
    hold_against_the_model(config, Part(range(start, stop), embed, head), dtype, recipe)


@pytest.mark.parametrize("recipe", [None, Recipe()], ids=["plain", "fp8"])
def test_deepseek_v3s_parameters_are_those_of_the_model(recipe: Recipe | None) -> None:
    config = ModelConfig()
    hold_against_the_model(config, Part.whole(config), torch.bfloat16, recipe)


@example(SMALL)
@settings(max_examples=30, deadline=None)
@given(models())
def test_they_are_as_many_as_are_counted(config: ModelConfig) -> None:
    found = inventory(config, Part.whole(config))
    assert sum(p.numel for p in found) == num_parameters(config, mtp=True)
    assert len({p.name for p in found}) == len(found)


def test_experts_are_as_many_matrices_and_all_else_is_one() -> None:
    for parameter in inventory(SMALL, Part.whole(SMALL)):
        assert parameter.matrices == (SMALL.n_routed_experts if parameter.routed else 1)


def test_what_is_no_part_of_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="is not a run of the model's"):
        inventory(SMALL, Part(range(99), embed=True, head=False))


def test_storage_is_what_a_build_says() -> None:
    both = Recompute(norms=True, up_projections=True)
    build = Build(torch.bfloat16, recipe=Recipe(e5m6=False), recompute=both)
    assert Storage.of(build) == Storage(2, fp8=True, norms=True, up_projections=True)
    assert Storage.of(Build(torch.float64)) == Storage(8)
    assert (Storage(2).wide, Storage(8).wide) == (4, 8)
    with pytest.raises(ValueError, match="compute in FP8, or turn it off"):
        Storage(2, e5m6=True)


def test_the_inventory_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from counterflow.model.inventory import inventory\n"
        "from counterflow.model import ModelConfig, Part\n"
        "c = ModelConfig(); inventory(c, Part.whole(c))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
