"""Checkpoints by Hugging Face names: what is written, read back, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from counterflow.fp8 import Recipe
from counterflow.model import (
    CheckpointError,
    DeepSeekV3,
    ModelConfig,
    hf_tensors,
    load_hf,
    num_parameters,
    partition,
    save_hf,
    write_index,
    write_shard,
)
from tests.cases_model import SMALL, V2, batch, expert_parallel_checkpoint, set_biases
from tests.ranks import RankPool

MTP = replace(SMALL, num_nextn_predict_layers=1)


def equal(a: DeepSeekV3, b: DeepSeekV3) -> bool:
    return all(
        name == other and torch.equal(x, y)
        for (name, x), (other, y) in zip(hf_tensors(a), hf_tensors(b), strict=True)
    )


def other(config: ModelConfig) -> DeepSeekV3:
    """A model with other values."""
    return DeepSeekV3(replace(config, init_seed=9))


@pytest.mark.parametrize("config", [MTP, V2, replace(MTP, tie_word_embeddings=True)])
@pytest.mark.parametrize("max_file_bytes", [10**9, 20_000], ids=["one file", "several"])
def test_what_is_saved_loads(config: ModelConfig, max_file_bytes: int, tmp_path: Path) -> None:
    model = DeepSeekV3(config)
    if config.topk_method == "noaux_tc":
        set_biases(model)
    save_hf([model], tmp_path, max_file_bytes=max_file_bytes)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (max_file_bytes < 10**9)
    assert ModelConfig.from_hf(tmp_path) == config
    loaded = other(config)
    assert not equal(loaded, model)
    load_hf(loaded, tmp_path)
    assert equal(loaded, model)


def test_names_are_the_published_ones(tmp_path: Path) -> None:
    model = DeepSeekV3(MTP)
    save_hf([model], tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    layer = "model.layers.3"  # of multi-token prediction
    for name in (
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.mlp.shared_experts.up_proj.weight",
        f"{layer}.enorm.weight",
        f"{layer}.hnorm.weight",
        f"{layer}.eh_proj.weight",
        f"{layer}.shared_head.norm.weight",
        f"{layer}.mlp.experts.15.gate_proj.weight",
    ):
        assert name in stored
    assert torch.equal(stored[f"{layer}.embed_tokens.weight"], stored["model.embed_tokens.weight"])
    assert torch.equal(stored[f"{layer}.shared_head.head.weight"], stored["lm_head.weight"])
    experts = model.moe_layers()["model.layers.2.mlp"].experts
    prefix = "model.layers.2.mlp.experts.7"
    gate_up = torch.cat([stored[f"{prefix}.{half}_proj.weight"] for half in ("gate", "up")])
    assert torch.equal(gate_up, experts.gate_up_proj[7])
    assert torch.equal(stored[f"{prefix}.down_proj.weight"], experts.down_proj[7])


def test_a_part_loads_its_own_and_parts_save_the_whole(tmp_path: Path) -> None:
    whole = DeepSeekV3(MTP)
    save_hf([whole], tmp_path / "whole")
    parts = [DeepSeekV3(replace(MTP, init_seed=9), part) for part in partition(MTP, 3)]
    for part in parts:
        load_hf(part, tmp_path / "whole")
    save_hf(parts, tmp_path / "parts")
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("whole", "parts"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.* missing.*write_shard"):
        save_hf(parts[:2], tmp_path / "some")


def test_ranks_load_their_experts_and_write_theirs(ranks: RankPool, tmp_path: Path) -> None:
    model = DeepSeekV3(MTP)
    source, target = tmp_path / "source", tmp_path / "target"
    save_hf([model], source)
    sizes = ranks.run(
        expert_parallel_checkpoint, world=2, config=MTP, source=str(source), target=str(target)
    )
    assert max(sizes) < 0.7 * num_parameters(MTP, mtp=True)
    write_index(target, MTP)
    loaded = other(MTP)
    load_hf(loaded, target)
    assert equal(loaded, model)
    (target / "model-rank1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        write_index(target, MTP)


def edited(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_all_that_does_not_fit_is_named_and_nothing_written(tmp_path: Path) -> None:
    model = DeepSeekV3(SMALL)
    save_hf([model], tmp_path)

    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.extra"] = torch.zeros(1)
        tensors["lm_head.weight"] = torch.zeros(2, 3)

    loaded = other(SMALL)
    with pytest.raises(CheckpointError) as error:
        load_hf(loaded, edited(tmp_path, edit))
    text = str(error.value)
    assert "in 3 tensors" in text
    assert "model.norm.weight: missing" in text
    assert "model.extra: unexpected" in text
    assert "lm_head.weight: shape [2, 3], not [61, 32]" in text
    assert equal(loaded, other(SMALL))


def test_a_long_list_of_problems_is_shortened(tmp_path: Path) -> None:
    save_hf([DeepSeekV3(SMALL)], tmp_path)
    with pytest.raises(CheckpointError, match=r"and \d+ more.*num_nextn_predict_layers=0"):
        load_hf(DeepSeekV3(MTP), tmp_path)


def test_derived_tensors_and_a_stored_tied_head_are_passed_over(tmp_path: Path) -> None:
    config = replace(SMALL, tie_word_embeddings=True)
    model = DeepSeekV3(config)
    save_hf([model], tmp_path)

    def edit(tensors: dict[str, Tensor]) -> None:
        assert "lm_head.weight" not in tensors
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    loaded = other(config)
    load_hf(loaded, edited(tmp_path, edit))
    assert equal(loaded, model)


# Several blocks of 128 in either direction, the last ones smaller.
BLOCKS = replace(MTP, hidden_size=160, intermediate_size=300, moe_intermediate_size=130)
# What a model in FP8 multiplies at once are whole blocks of each weight here.
ALIGNED = replace(
    MTP, hidden_size=128, intermediate_size=256, moe_intermediate_size=128, q_lora_rank=128
)
FP8_DTYPES = {torch.float8_e4m3fn, torch.float8_e5m2}


def dequantised(values: Tensor, scales: Tensor) -> Tensor:
    """As the published description has it, block by block."""
    wide = values.float()
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            block = (
                slice(128 * row, 128 * (row + 1)),
                slice(128 * column, 128 * (column + 1)),
            )
            wide[block] *= scales[row, column]
    return wide


@pytest.mark.parametrize("max_file_bytes", [10**9, 30_000], ids=["one file", "several"])
def test_a_float8_checkpoint_is_of_the_published_form_and_loads(
    max_file_bytes: int, tmp_path: Path
) -> None:
    model = DeepSeekV3(BLOCKS)
    save_hf([model], tmp_path, fp8=True, max_file_bytes=max_file_bytes)
    stored = {n: t for file in tmp_path.glob("*.safetensors") for n, t in load_file(file).items()}
    in_fp8 = {name for name, tensor in stored.items() if tensor.dtype in FP8_DTYPES}
    assert {f"{name}_scale_inv" for name in in_fp8} == {n for n in stored if "_scale_inv" in n}
    layer = "model.layers.3"  # of multi-token prediction
    assert {
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        f"{layer}.self_attn.o_proj.weight",
        f"{layer}.mlp.experts.15.down_proj.weight",
        f"{layer}.mlp.shared_experts.up_proj.weight",
    } <= in_fp8
    for kept in ("embed_tokens", "lm_head", "norm", "mlp.gate.", "e_score", "eh_proj", "shared_h"):
        assert not any(kept in name for name in in_fp8), kept
    assert all(
        stored[f"{name}_scale_inv"].shape == tuple(-(-n // 128) for n in stored[name].shape)
        and stored[f"{name}_scale_inv"].dtype == torch.float32
        for name in in_fp8
    )
    hf = json.loads((tmp_path / "config.json").read_text())
    assert hf["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    assert ModelConfig.from_hf(tmp_path) == BLOCKS
    loaded = other(BLOCKS)
    load_hf(loaded, tmp_path)
    source = dict(hf_tensors(model))
    for name, tensor in hf_tensors(loaded):
        if name not in in_fp8:
            assert torch.equal(tensor, source[name]), name
            continue
        assert torch.equal(tensor, dequantised(stored[name], stored[f"{name}_scale_inv"])), name
        # E4M3 rounds to 2**-4 of a number or to 2**-10 of the scale, which is at most 1/224 of
        # the largest.
        error = (tensor - source[name]).abs()
        assert bool((error <= 2**-4 * source[name].abs() + 2**-17 * source[name].amax()).all())


def test_saving_what_was_loaded_from_float8_changes_nothing(tmp_path: Path) -> None:
    first, second = other(BLOCKS), other(replace(BLOCKS, init_seed=7))
    save_hf([DeepSeekV3(BLOCKS)], tmp_path / "a", fp8=True)
    load_hf(first, tmp_path / "a")
    save_hf([first], tmp_path / "b", fp8=True)
    load_hf(second, tmp_path / "b")
    assert equal(first, second)


def test_a_model_in_float8_computes_with_what_it_saves(tmp_path: Path) -> None:
    model = DeepSeekV3(ALIGNED, recipe=Recipe())
    save_hf([model], tmp_path, fp8=True)
    loaded = DeepSeekV3(replace(ALIGNED, init_seed=9), recipe=Recipe())
    tokens, _ = batch(ALIGNED)
    before = loaded.logits(loaded(tokens))
    load_hf(loaded, tmp_path)
    logits = model.logits(model(tokens))
    assert torch.equal(loaded.logits(loaded(tokens)), logits)
    assert not torch.equal(before, logits)


def test_shards_in_float8_have_one_index(tmp_path: Path) -> None:
    parts = [DeepSeekV3(MTP, part) for part in partition(MTP, 2)]
    for number, part in enumerate(parts):
        write_shard([part], tmp_path, str(number), fp8=True)
    write_index(tmp_path, MTP)
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    save_hf([DeepSeekV3(MTP)], tmp_path / "whole", fp8=True)
    first, second = other(MTP), other(MTP)
    load_hf(first, tmp_path)
    load_hf(second, tmp_path / "whole")
    assert equal(first, second)
    write_shard([DeepSeekV3(MTP)], tmp_path, "wide")
    with pytest.raises(CheckpointError, match=r"F8_E4M3 in model-0.*F32 in model-wide"):
        write_index(tmp_path, MTP)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, n: t.pop(f"{n}_scale_inv"), "in FP8, but there is no .*_scale_inv"),
        (lambda t, n: t.update({n: t[n].float()}), "scales, but .* is F32, not F8_E4M3"),
        (
            lambda t, n: t.update({f"{n}_scale_inv": t[f"{n}_scale_inv"].bfloat16()}),
            "_scale_inv: BF16, not F32",
        ),
        (
            lambda t, n: t.update({f"{n}_scale_inv": torch.ones(2, 3)}),
            r"_scale_inv: shape \[2, 3\], not \[2, 1\]",
        ),
        (
            lambda t, n: t.update({n: t[n].float().to(torch.float8_e5m2)}),
            "of FP8 only F8_E4M3 is read",
        ),
        (lambda t, n: t.pop(n), r"missing.*_scale_inv: unexpected"),
    ],
)
def test_float8_that_does_not_fit_is_named(
    edit: Callable[[dict[str, Tensor], str], object], message: str, tmp_path: Path
) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"  # [160, 48]
    save_hf([DeepSeekV3(BLOCKS)], tmp_path, fp8=True)
    loaded = other(BLOCKS)
    with pytest.raises(CheckpointError, match=message):
        load_hf(loaded, edited(tmp_path, lambda tensors: edit(tensors, name)))
    assert equal(loaded, other(BLOCKS)), "nothing was written"


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.gate.weight", "model.layers.3.eh_proj.weight"]
)
def test_float8_of_what_is_never_stored_so_is_refused(name: str, tmp_path: Path) -> None:
    save_hf([DeepSeekV3(BLOCKS)], tmp_path, fp8=True)

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        scales = torch.ones([-(-n // 128) for n in tensors[name].shape])
        tensors[f"{name}_scale_inv"] = scales

    loaded = other(BLOCKS)
    with pytest.raises(CheckpointError) as error:
        load_hf(loaded, edited(tmp_path, edit))
    assert f"{name}: F8_E4M3, but only projections are stored in FP8" in str(error.value)
    assert equal(loaded, other(BLOCKS)), "nothing was written"
    with pytest.raises(CheckpointError, match="only projections are stored in FP8"):
        write_index(tmp_path, BLOCKS)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method='awq'.*only the published FP8"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"weight_block_size=\[64, 64\]"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2'"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "activation_scheme='static'"),
        ({"bits": 8}, "does not name a quant_method"),
        ("fp8", "does not name a quant_method"),
    ],
)
def test_other_quantisations_are_refused(quantization: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(SMALL.to_hf() | {"quantization_config": quantization})


def test_what_a_float8_configuration_leaves_out_or_adds_does_not_matter() -> None:
    for more in ({}, {"scale_fmt": "ue8m0", "modules_to_not_convert": []}):
        quantization = {"quant_method": "fp8", **more}
        hf = SMALL.to_hf() | {"quantization_config": quantization}
        assert ModelConfig.from_hf(hf) == SMALL
    assert ModelConfig.from_hf(SMALL.to_hf() | {"quantization_config": None}) == SMALL


def test_values_are_converted_to_the_dtype_of_the_model(tmp_path: Path) -> None:
    model = DeepSeekV3(SMALL, dtype=torch.bfloat16)
    save_hf([model], tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    assert stored["model.layers.1.mlp.gate.weight"].dtype == torch.float32
    wide = DeepSeekV3(SMALL, dtype=torch.float64)
    load_hf(wide, tmp_path)
    for (name, value), (_, source) in zip(hf_tensors(wide), hf_tensors(model), strict=True):
        assert value.dtype == torch.float64
        assert torch.equal(value, source.double()), name


def test_folders_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    model = DeepSeekV3(SMALL)
    with pytest.raises(CheckpointError, match="neither"):
        load_hf(model, tmp_path)
    with pytest.raises(CheckpointError, match="no safetensors"):
        write_index(tmp_path, SMALL)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        load_hf(model, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="not an index"):
        load_hf(model, tmp_path)
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-gone.safetensors"}}))
    with pytest.raises(CheckpointError, match="model-gone"):
        load_hf(model, tmp_path)


def test_a_shard_needs_parts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no parts"):
        write_shard([], tmp_path / "unused", "0")
    assert not (tmp_path / "unused").exists()
