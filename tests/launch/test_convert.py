"""`counterflow convert`: bits that stay the same on the way, and what is refused."""

from __future__ import annotations

import argparse
import json
import os
import resource
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Parameter

from counterflow.fp8 import Quantized, dequantize
from counterflow.launch import convert_command, convert_options
from counterflow.launch.checkpoint.pieces import Held, Piece, State
from counterflow.launch.checkpoint.read import open_checkpoint, verify
from counterflow.launch.checkpoint.store import Checkpoints
from counterflow.launch.config import Config
from counterflow.launch.settings import to_toml
from counterflow.launch.zero_deepspeed import DeepSpeedZero
from counterflow.model import DeepSeekV3, ModelConfig, Yarn, hf_tensors, load_hf, save_hf
from counterflow.model.hf import HfWeights
from counterflow.model.names import hf_places
from counterflow.parallel.zero import Share
from tests import cases_convert
from tests.cases_model import SMALL, V2, YARN, batch, set_biases
from tests.ranks import RankPool

MTP = replace(SMALL, num_nextn_predict_layers=1)
# Several blocks of 128 in either direction, the last ones smaller.
BLOCKS = replace(MTP, hidden_size=160, intermediate_size=300, moe_intermediate_size=130)


def convert(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    convert_options.add_arguments(parser)
    return convert_command.run(parser.parse_args([str(argument) for argument in arguments]))


def model_with_biases(config: ModelConfig, dtype: torch.dtype = torch.float32) -> DeepSeekV3:
    model = DeepSeekV3(config, dtype=dtype)
    if config.topk_method == "noaux_tc":
        set_biases(model)
    return model


def pieces(model: DeepSeekV3, extra: Mapping[str, Tensor]) -> Iterator[Piece]:
    parameters = dict(model.named_parameters())
    named = {f"parameters/{name}": tensor for name, tensor in parameters.items()}
    named |= {
        f"buffers/{name}": tensor
        for name, tensor in model.state_dict().items()
        if name.endswith("e_score_correction_bias")
    }
    for name, tensor in (named | dict(extra)).items():
        flat, middle = tensor.detach().reshape(-1), tensor.numel() // 2
        held = Held.entire(tensor)
        yield from held.pieces(name, flat[:middle])  # as ZeRO-1 or experts cut tensors
        yield from held.pieces(name, flat[middle:], middle)


def save(
    folder: Path, model: DeepSeekV3, step: int = 7, extra: Mapping[str, Tensor] | None = None
) -> Path:
    """A checkpoint as a run of one rank saves it; returns the run's folder."""
    config = tomllib.loads(to_toml(replace(Config(), model=model.config)))
    store = Checkpoints(folder / "checkpoints", keep=5, asynchronous=False, timeout_s=60)
    store.save(step, State(list(pieces(model, extra or {})), {"step": step, "config": config}))
    (saved,) = store.poll()
    assert saved.error == ""
    store.close()
    return folder


def equal(a: DeepSeekV3, b: DeepSeekV3) -> bool:
    return all(
        name == other and torch.equal(x, y)
        for (name, x), (other, y) in zip(hf_tensors(a), hf_tensors(b), strict=True)
    )


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> DeepSeekV3:
    model = DeepSeekV3(replace(ModelConfig.from_hf(folder), init_seed=9), dtype=dtype)
    load_hf(model, folder)
    return model


@pytest.mark.parametrize(
    "config",
    [MTP, V2, replace(MTP, tie_word_embeddings=True), replace(SMALL, yarn=YARN, q_lora_rank=None)],
    ids=["V3", "V2", "tied", "yarn"],
)
def test_out_and_back_in_are_the_same_bits(config: ModelConfig, tmp_path: Path) -> None:
    model = model_with_biases(config)
    run = save(tmp_path / "run", model)
    assert convert("to-hf", run, tmp_path / "hf", "--max-file-gb", "2e-5") == 0
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert ModelConfig.from_hf(tmp_path / "hf") == replace(config, init_seed=0)
    assert equal(loaded(tmp_path / "hf"), model)

    assert convert("from-hf", tmp_path / "hf", tmp_path / "back") == 0
    first, second = (
        open_checkpoint(run / "checkpoints/step-00000007"),
        open_checkpoint(tmp_path / "back/step-00000000"),
    )
    assert verify(second.path) == []
    assert first.tensors == second.tensors
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.tensors)
    assert convert("to-hf", tmp_path / "back", tmp_path / "again") == 0
    assert equal(loaded(tmp_path / "again"), model)


def test_the_folder_is_what_save_hf_writes(tmp_path: Path) -> None:
    model = model_with_biases(MTP)
    convert("to-hf", save(tmp_path / "run", model), tmp_path / "hf")
    save_hf([model], tmp_path / "direct")
    for name in ("config.json", "model.safetensors"):
        mine, direct = ((tmp_path / of / name).read_bytes() for of in ("hf", "direct"))
        assert mine == direct


def test_transformers_computes_the_same_from_it(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    model = model_with_biases(SMALL)
    convert("to-hf", save(tmp_path / "run", model), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens, _ = batch(SMALL)
    with torch.no_grad():
        torch.testing.assert_close(
            model.logits(model(tokens)),
            theirs(tokens).logits,
            rtol=1e-5,  # float32, some hundred additions in another order
            atol=1e-5,
        )


def test_every_hugging_face_tensor_lies_where_places_say() -> None:
    model = model_with_biases(MTP)
    ours = model.state_dict()
    places = hf_places(MTP)
    named = dict(hf_tensors(model))
    assert places.keys() == named.keys()
    for name, place in places.items():
        flat = ours[place.name].reshape(-1)
        there = flat[place.offset : place.offset + named[name].numel()].view(place.shape)
        assert torch.equal(there, named[name]), name
        assert place.whole == tuple(ours[place.name].shape)
        assert place.is_buffer == place.name.endswith("e_score_correction_bias")


def test_in_float8_it_is_what_save_hf_writes(tmp_path: Path) -> None:
    model = model_with_biases(BLOCKS)
    convert("to-hf", save(tmp_path / "run", model), tmp_path / "hf", "--fp8")
    save_hf([model], tmp_path / "direct", fp8=True)
    assert equal(loaded(tmp_path / "hf"), loaded(tmp_path / "direct"))
    assert "quantization_config" in json.loads((tmp_path / "hf/config.json").read_text())


def test_float8_comes_in_as_the_float32_that_it_stands_for(tmp_path: Path) -> None:
    save_hf([model_with_biases(BLOCKS)], tmp_path / "hf", fp8=True, max_file_bytes=30_000)
    convert("from-hf", tmp_path / "hf", tmp_path / "in")
    manifest = open_checkpoint(tmp_path / "in/step-00000000")
    name = "model.layers.0.self_attn.o_proj.weight"
    files = (load_file(path) for path in (tmp_path / "hf").glob("*.safetensors"))
    stored = {name: tensor for file in files for name, tensor in file.items()}
    wide = dequantize(Quantized(stored[name], stored[f"{name}_scale_inv"]))
    assert torch.equal(manifest.read(f"parameters/{name}"), wide)
    convert("to-hf", tmp_path / "in", tmp_path / "out")
    assert equal(loaded(tmp_path / "out"), loaded(tmp_path / "hf"))


def test_the_average_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    model, average = model_with_biases(SMALL), DeepSeekV3(replace(SMALL, init_seed=3))
    extra = {f"ema/{name}": p.detach() for name, p in average.named_parameters()}
    run = save(tmp_path / "run", model, extra=extra)
    convert("to-hf", run, tmp_path / "hf", "--ema")
    set_biases(average)
    assert equal(loaded(tmp_path / "hf"), average)
    with pytest.raises(ValueError, match=r"holds no moving average.*train\.ema_decay"):
        convert("to-hf", save(tmp_path / "without", model), tmp_path / "other", "--ema")
    assert not (tmp_path / "other").exists()


def test_float32_is_taken_from_the_optimizers_masters(tmp_path: Path) -> None:
    wide = model_with_biases(SMALL)
    model = model_with_biases(SMALL, torch.bfloat16)
    masters = {
        f"optimizer/master/{name}": p.detach()
        for name, p in wide.named_parameters()
        if not name.endswith("mlp.gate.weight")  # float32 in either
    }
    run = save(tmp_path / "run", model, extra=masters)
    convert("to-hf", run, tmp_path / "wide", "--dtype", "float32")
    assert equal(loaded(tmp_path / "wide"), wide)
    convert("to-hf", run, tmp_path / "low")
    stored = load_file(tmp_path / "low" / "model.safetensors")
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    assert equal(loaded(tmp_path / "low", torch.bfloat16), model)


def test_bfloat16_leaves_routers_in_float32(tmp_path: Path) -> None:
    convert(
        *("to-hf", save(tmp_path / "run", model_with_biases(SMALL)), tmp_path / "hf"),
        *("--dtype", "bfloat16"),
    )
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    wide = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert wide == {name for name in stored if ".mlp.gate." in name}
    assert {t.dtype for t in stored.values()} == {torch.float32, torch.bfloat16}


def damage(run: Path, step: int) -> None:
    file = run / f"checkpoints/step-{step:08}/rank00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_refused_and_an_older_good_one_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = model_with_biases(SMALL), model_with_biases(replace(SMALL, init_seed=4))
    run = save(save(tmp_path / "run", older, step=7), newer, step=8)
    damage(run, 8)
    with pytest.raises(ValueError, match=r"no undamaged checkpoint.*is damaged"):
        convert("to-hf", run / "checkpoints/step-00000008", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    convert("to-hf", run, tmp_path / "hf")
    assert equal(loaded(tmp_path / "hf"), older)
    assert "passed over" in caplog.text


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint there; give runs/NAME"):
        convert("to-hf", tmp_path / "nowhere", tmp_path / "hf")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="file: no checkpoint there"):
        convert("to-hf", file, tmp_path / "hf")
    with pytest.raises(ValueError, match="no checkpoint there"):
        convert("info", tmp_path)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    run = save(tmp_path / "run", model_with_biases(SMALL))
    convert("to-hf", run, out)  # an empty one is taken
    before = sorted(out.iterdir())
    for arguments in (("to-hf", run), ("from-hf", out)):
        with pytest.raises(ValueError, match="is there already; give a folder that is new"):
            convert(*arguments, out)
    assert sorted(out.iterdir()) == before


@pytest.mark.parametrize("form", ["to-hf", "from-hf"])
def test_where_the_disk_is_full_nothing_is_left(form: str, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the full disk: the same failure of a write."""
    run = save(tmp_path / "run", model_with_biases(SMALL))
    source = run
    if form == "from-hf":
        source = tmp_path / "hf"
        convert("to-hf", run, source)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot be written: .*File too large"):
            convert(form, source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not any("out" in name for name in os.listdir(tmp_path))


def test_a_checkpoint_of_another_model_than_it_says_is_refused(tmp_path: Path) -> None:
    model = model_with_biases(SMALL)
    store = Checkpoints(tmp_path / "c", keep=2, asynchronous=False, timeout_s=60)
    other = tomllib.loads(to_toml(replace(Config(), model=replace(SMALL, vocab_size=62))))
    store.save(1, State(list(pieces(model, {})), {"config": other}))
    store.save(2, State(list(pieces(model, {})), {}))
    store.close()
    with pytest.raises(ValueError, match="2 tensors are not as its model has them"):
        convert("to-hf", tmp_path / "c/step-00000001", tmp_path / "hf")
    with pytest.raises(ValueError, match="does not tell which model"):
        convert("to-hf", tmp_path / "c/step-00000002", tmp_path / "hf")


def test_a_hugging_face_folder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_hf([model_with_biases(SMALL)], tmp_path / "hf")
    hf = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(hf | {"vocab_size": 62}))
    with pytest.raises(ValueError, match=r"shape \[61, 32\], not \[62, 32\]"):
        convert("from-hf", tmp_path / "hf", tmp_path / "in")
    with pytest.raises((ValueError, OSError), match=r"config\.json"):
        convert("from-hf", tmp_path, tmp_path / "in")
    assert not (tmp_path / "in").exists()


def test_weights_are_read_one_by_one(tmp_path: Path) -> None:
    model = model_with_biases(MTP)
    save_hf([model], tmp_path, max_file_bytes=20_000)
    weights = HfWeights(tmp_path, MTP)
    for name, tensor in hf_tensors(model):
        assert weights.tensors[name] == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(weights.read(name), tensor)


def test_info_tells_what_a_checkpoint_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_with_biases(SMALL)
    run = save(tmp_path / "run", model)
    assert convert("info", run, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["step"], facts["verified"], facts["problems"]) == (7, True, [])
    assert facts["mesh"] == {"pp": 2, "dp": 2, "ep": 2}  # of the default configuration
    head = facts["tensors"]["parameters/lm_head.weight"]
    assert head == {"dtype": "float32", "shape": [61, 32], "bytes": 4 * 61 * 32}
    assert convert("info", run) == 0
    assert "verified" in capsys.readouterr().out
    damage(run, 7)
    assert convert("info", run) == 1
    assert "is damaged" in capsys.readouterr().out
    assert convert("info", run, "--json") == 1
    facts = json.loads(capsys.readouterr().out)
    assert not facts["verified"]
    assert "rank00000.safetensors" in facts["problems"][0]


def test_info_of_a_damaged_manifest_tells_that_and_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save(tmp_path / "run", model_with_biases(SMALL))
    file = run / "checkpoints/step-00000007/checkpoint.json"
    file.write_bytes(file.read_bytes()[:-9])
    assert convert("info", run, "--json") == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["verified"] is False
    assert facts["path"] == str(file.parent)
    [problem] = facts["problems"]
    assert problem.startswith(f"{file}: is damaged")
    assert convert("info", run) == 1
    assert problem in capsys.readouterr().out


@pytest.mark.parametrize("source", ["checkpoint", "hf"])
@pytest.mark.parametrize("zero", [0, 1])
def test_training_begins_with_the_weights_of_another_layout(
    source: str, zero: int, ranks: RankPool, tmp_path: Path
) -> None:
    """bfloat16 over two ranks that share the experts out: masters follow the weights."""
    config = replace(SMALL, init_seed=5)
    model = model_with_biases(config)
    run = save(tmp_path / "run", model)
    path = run
    if source == "hf":
        path = tmp_path / "hf"
        convert("to-hf", run, path)
    for differing in ranks.run(
        cases_convert.begin_with_weights,
        world=2,
        config=SMALL,
        path=str(path),
        zero=zero,
        reference=str(save_reference(model, tmp_path)),
    ):
        assert differing == []


def save_reference(model: DeepSeekV3, folder: Path) -> Path:
    """The model's weights by Hugging Face name, for other processes."""
    save_hf([model], folder / "reference")
    return folder / "reference"


def test_weights_of_another_model_are_refused_at_the_start(ranks: RankPool, tmp_path: Path) -> None:
    run = save(tmp_path / "run", model_with_biases(replace(SMALL, moe_intermediate_size=24)))
    (text,) = ranks.run(cases_convert.refused, world=1, config=SMALL, path=str(run))
    assert "does not fit this model in" in text
    assert "parameters/model.layers.1.mlp.experts.gate_up_proj is [16, 48, 32], not" in text


def test_all_ranks_begin_with_an_older_checkpoint_where_the_newest_is_damaged(
    ranks: RankPool, tmp_path: Path
) -> None:
    older, newer = model_with_biases(SMALL), model_with_biases(replace(SMALL, init_seed=4))
    run = save(save(tmp_path / "run", older, step=7), newer, step=8)
    damage(run, 8)
    for differing in ranks.run(
        cases_convert.begin_with_weights,
        world=2,
        config=replace(SMALL, init_seed=6),
        path=str(run),
        zero=0,
        reference=str(save_reference(older, tmp_path)),
    ):
        assert differing == []


def test_weights_that_are_not_there_or_all_damaged_are_told_on_all_ranks(
    ranks: RankPool, tmp_path: Path
) -> None:
    run = save(tmp_path / "run", model_with_biases(SMALL))
    damage(run, 7)
    for path, said in (
        (tmp_path / "nowhere", "no checkpoint there; give runs/NAME"),
        (run, "no checkpoint is undamaged"),
    ):
        texts = ranks.run(cases_convert.refused, world=2, config=SMALL, path=str(path))
        assert texts[0] == texts[1]
        assert said in texts[0]


def test_deepspeeds_masters_follow_weights_that_are_loaded() -> None:
    """Of an optimizer without its library: masters [first, last) of two bfloat16 parameters."""
    optimizer = DeepSpeedZero.__new__(DeepSpeedZero)
    whole = {"a": torch.arange(6.0), "b": torch.arange(10.0, 14.0)}
    optimizer._whole = {name: Parameter(of.view(2, -1).bfloat16()) for name, of in whole.items()}
    optimizer.shares = {
        "a": Share(Parameter(torch.zeros(4)), 2),
        "b": Share(Parameter(torch.zeros(1)), 0),
    }
    optimizer.take_wholes()
    assert torch.equal(optimizer.masters["a"], whole["a"][2:])
    assert torch.equal(optimizer.masters["b"], whole["b"][:1])


def test_the_model_of_a_checkpoint_keeps_its_nested_settings(tmp_path: Path) -> None:
    config = replace(SMALL, yarn=Yarn(factor=40.0, original_max_position_embeddings=16))
    run = save(tmp_path / "run", DeepSeekV3(config))
    convert("to-hf", run, tmp_path / "hf")
    assert ModelConfig.from_hf(tmp_path / "hf").yarn == config.yarn
