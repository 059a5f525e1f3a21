"""Reading, overriding, checking and writing the configuration."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.fp8 import recipe
from counterflow.fp8.products import BACKENDS
from counterflow.launch.config import (
    Config,
    DataConfig,
    RunConfig,
    TrainConfig,
    load,
    rows,
    with_absolute_paths,
)
from counterflow.launch.fp8_config import (
    FP8Config,
    GradientFormat,
    ProductBackend,
    RecomputeConfig,
    Scales,
)
from counterflow.launch.settings import ConfigError, to_toml
from counterflow.model import ModelConfig, Yarn
from counterflow.parallel.mesh import MeshShape
from counterflow.parallel.schedule import build, save


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def refusal(*overrides: tuple[str, str], path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_without_a_file_the_defaults_are_the_configuration() -> None:
    assert load() == Config()


def test_a_flag_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, "[train]\nsteps = 50\nlr = 1e-2\n[mesh]\npp = 4\n")
    config = load(path, [("train.lr", "2e-2")])
    assert (config.train.steps, config.train.lr, config.mesh.pp) == (50, 2e-2, 4)
    assert config.mesh.dp == Config().mesh.dp


@pytest.mark.parametrize(
    ("key", "text", "section", "value"),
    [
        ("train.lr", "1", "train", 1.0),
        ("train.betas", "0.5,0.75", "train", (0.5, 0.75)),
        ("train.betas", "[0.5, 0.75]", "train", (0.5, 0.75)),
        ("train.cosine_steps", "7", "train", 7),
        ("train.cosine_steps", "none", "train", None),
        ("run.name", "123", "run", "123"),
        ("model.norm_topk_prob", "false", "model", False),
        ("model.q_lora_rank", "none", "model", None),
        ("data.validation_fraction", "2e-1", "data", 0.2),
    ],
)
def test_a_flag_and_the_same_value_in_a_file_give_the_same_configuration(
    tmp_path: Path, key: str, text: str, section: str, value: object
) -> None:
    name = key.partition(".")[2]
    by_flag = load(None, [(key, text)])
    assert getattr(getattr(by_flag, section), name) == value
    assert load(written(tmp_path, to_toml(by_flag))) == by_flag


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.lrr", "train.lr"),
        ("train.warmup", "train.warmup_steps"),
        ("lr", "train.lr"),
        ("sequence_length", "data.sequence_length"),
        ("trian.lr", "train.lr"),
        ("model.n_routed_expert", "model.n_routed_experts"),
        ("model.yarn.factr", "model.yarn.factor"),
        ("mesh.pp.x", "mesh.pp"),
    ],
)
def test_an_unknown_key_is_answered_by_the_nearest_known_one(key: str, nearest: str) -> None:
    assert refusal((key, "1")) == f"--{key}: unknown key {key}; did you mean {nearest}?"


def test_an_unknown_key_in_a_file_names_the_file_and_the_whole_key(tmp_path: Path) -> None:
    path = written(tmp_path, "[train]\nlearning_rate = 1\n")
    message = refusal(path=path)
    assert message.startswith(f"{path}: unknown key train.learning_rate; did you mean train.")


def test_an_empty_unknown_section_is_refused_too(tmp_path: Path) -> None:
    path = written(tmp_path, "[trian]\n")
    assert refusal(path=path) == f"{path}: unknown section [trian]; did you mean [train]?"
    assert load(written(tmp_path, "[train]\n")) == Config()


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("train.lr", "fast", "a number, got 'fast'"),
        ("train.lr", "true", "a number, got 'true'"),
        ("train.steps", "1.5", "a whole number, got '1.5'"),
        ("train.steps", "true", "a whole number, got 'true'"),
        ("train.betas", "0.9", "[a number, a number], got '0.9'"),
        ("model.norm_topk_prob", "1", "true or false, got '1'"),
        ("model.q_lora_rank", "no", "a whole number or \"none\", got 'no'"),
        ("train.dtype", "fp8", '"float32" or "float64" or "bfloat16", got \'fp8\''),
        ("train.steps", "1\nlr = 2", "a whole number, got '1\\nlr = 2'"),
    ],
)
def test_a_wrong_type_tells_what_is_expected_and_what_was_given(
    key: str, text: str, expected: str
) -> None:
    assert refusal((key, text)) == f"--{key}: {key} must be {expected}"


def test_a_wrong_type_in_a_file_shows_the_value_as_the_file_has_it(tmp_path: Path) -> None:
    path = written(tmp_path, '[train]\nsteps = "many"\n')
    assert refusal(path=path) == f'{path}: train.steps must be a whole number, got "many"'


def test_a_section_given_a_value_is_refused() -> None:
    assert "train is a section" in refusal(("train", "3"))


def test_a_value_that_a_section_refuses_names_its_source_and_key() -> None:
    assert (
        refusal(("train.lr", "-1")) == "--train.lr: train.lr must be 0 or more and finite, got -1.0"
    )
    assert refusal(("mesh.ep", "3")).startswith("--mesh.ep: mesh.ep=3 must divide mesh.dp=2")
    assert refusal(("model.n_group", "3")).startswith("--model.n_group: model: n_group=3 does not")
    assert refusal(("train.ema_decay", "1")) == (
        "--train.ema_decay: train.ema_decay must be above 0 and below 1, or none, got 1.0"
    )
    low = refusal(("train.moments", "bfloat16"), ("train.betas", "0.9,0.999"))
    assert "train.moments and train.betas: bfloat16 moments need betas from 0 to 0.996094" in low
    assert load(None, [("train.moments", "bfloat16")]).train.moments == "bfloat16"


def test_what_fp8_implies_follows_unless_it_is_given() -> None:
    plain, fp8 = load(), load(None, [("fp8.enabled", "true")])
    assert (plain.payload, plain.moments) == ("exact", "float32")
    assert (fp8.payload, fp8.moments) == ("fp8", "bfloat16")
    given = [("dispatch.payload", "bf16"), ("train.moments", "float32")]
    both = load(None, [("fp8.enabled", "true"), *given])
    assert (both.payload, both.moments) == ("bf16", "float32")
    # E4M3 on the way would round once more what E5M2 is to round.
    hybrid = load(None, [("fp8.enabled", "true"), ("fp8.gradient_format", "e5m2")])
    assert hybrid.payload == "bf16"
    assert load(None, [("fp8.gradient_format", "e5m2")]).payload == "exact"
    refused = refusal(("fp8.enabled", "true"), ("train.betas", "0.9,0.999"))
    assert "train.moments (auto, with fp8.enabled) and train.betas: bfloat16 moments" in refused
    load(None, [("fp8.enabled", "true"), ("train.betas", "0.9,0.999"), given[1]])


def test_fp8_and_recompute_are_written_and_read_as_they_were_given(tmp_path: Path) -> None:
    keys = {"fp8.enabled": "true", "fp8.scales": "float32", "fp8.gradient_format": "e5m2"}
    keys |= {"fp8.backend": "triton", "fp8.e5m6": "false", "fp8.check": "true"}
    keys |= {"recompute.norms": "false", "recompute.up_projections": "none"}
    config = load(None, keys.items())
    text = to_toml(config)
    assert load(written(tmp_path, text)) == config
    assert 'payload = "auto"' in text  # what was decided is in result.json
    assert (config.recompute.norms, config.recompute.up_projections) == (False, None)


@pytest.mark.parametrize("name", ["enabled", "e5m6", "check"])
def test_a_text_is_no_truth_value_of_fp8(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^fp8\.{name} must be True or False, got 'no'$"):
        FP8Config(**{name: "no"})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["norms", "up_projections"])
def test_a_text_is_no_truth_value_of_recompute(name: str) -> None:
    message = rf"^recompute\.{name} must be True, False or None, got 'none'$"
    with pytest.raises(ValueError, match=message):
        RecomputeConfig(**{name: "none"})  # pyright: ignore[reportArgumentType]
    assert RecomputeConfig(**{name: None}) == RecomputeConfig()


@pytest.mark.parametrize("payload", ["logfmt8", "logfmt10"])
def test_deep_ep_carries_no_logfmt(payload: str) -> None:
    given = ("dispatch.payload", payload)
    message = refusal(("dispatch.backend", "deep_ep"), given)
    assert "dispatch.backend=deep_ep carries BF16 and FP8" in message
    assert "or the backend to two_hop" in message
    load(None, [("dispatch.backend", "two_hop"), given])


def test_the_names_of_the_recipe_are_those_of_the_configuration() -> None:
    assert get_args(ProductBackend) == BACKENDS
    assert get_args(Scales) == get_args(recipe.Scales)
    assert get_args(GradientFormat) == get_args(recipe.Format)
    assert refusal(("fp8.backend", "cutlass")) == (
        '--fp8.backend: fp8.backend must be "auto" or "reference" or "emulation" or "cublas" or '
        '"deep_gemm" or "transformer_engine" or "triton", got \'cutlass\''
    )


def test_missing_and_broken_files_are_named_with_the_line(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    assert refusal(path=missing) == f"{missing}: no such configuration file"
    broken = written(tmp_path, "[train]\nsteps = = 3\n")
    assert refusal(path=broken).startswith(f"{broken}: is not valid TOML: ")
    assert "line 2" in refusal(path=broken)
    assert "cannot be read" in refusal(path=tmp_path)
    broken.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refusal(path=broken)


def test_an_optional_section_is_made_from_its_keys_and_unset_by_none(tmp_path: Path) -> None:
    size = ("model.yarn.original_max_position_embeddings", "64")
    config = load(None, [("model.yarn.factor", "4"), size])
    assert config.model.yarn == Yarn(factor=4.0, original_max_position_embeddings=64)
    path = written(tmp_path, to_toml(config))
    assert load(path) == config
    assert load(path, [("model.yarn.beta_fast", "16")]).model.yarn == Yarn(
        factor=4.0, original_max_position_embeddings=64, beta_fast=16.0
    )
    assert load(path, [("model.yarn", "none")]) == Config()
    assert size[0] in refusal(("model.yarn.factor", "4"))


def test_a_hugging_face_configuration_gives_the_model_and_other_keys_change_it(
    tmp_path: Path,
) -> None:
    import json

    model = replace(Config().model, hidden_size=96)
    hf = tmp_path / "config.json"
    hf.write_text(json.dumps(model.to_hf()))
    assert load(None, [("model.hf", str(hf))]).model == model
    both = load(written(tmp_path, f'[model]\nhf = "{hf}"\nvocab_size = 512\n'))
    assert both.model == replace(model, vocab_size=512)
    assert "no such file" in refusal(("model.hf", str(tmp_path / "nowhere.json")))


def test_every_key_has_a_line_of_help_and_is_accepted_with_its_own_default() -> None:
    for row in rows():
        assert row.doc, row.key
        assert "\n" not in row.doc
    given = [
        (row.key, row.default.strip('"'))
        for row in rows()
        if row.default and not row.key.startswith("model.yarn") and row.key != "model.hf"
    ]
    assert load(None, given) == Config()


def test_every_key_of_the_model_has_a_help_text_of_its_own() -> None:
    texts = [row.doc for row in rows() if row.key.startswith("model.")]
    assert len(set(texts)) == len(texts)
    assert all(len(text.split()) >= 4 for text in texts)


names = st.text(st.characters(blacklist_characters="/\0", codec="utf-8"), min_size=1).filter(
    lambda name: name not in (".", "..")
)
numbers = st.floats(0, 1e6)


@settings(deadline=None)  # other processes share the machine
@given(
    name=names,
    folder=names,
    lr=numbers,
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    cosine=st.none() | st.integers(0, 10**6),
    path=names,
    pp=st.integers(1, 64),
)
def test_toml_round_trips(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    folder: str,
    lr: float,
    betas: tuple[float, float],
    cosine: int | None,
    path: str,
    pp: int,
) -> None:
    config = Config(
        run=RunConfig(name=name, folder=folder),
        mesh=MeshShape(pp=pp),
        model=ModelConfig(),
        data=DataConfig(kind="text", path=path),
        train=TrainConfig(lr=lr, lr_min=lr / 2, betas=betas, cosine_steps=cosine),
    )
    file = tmp_path_factory.mktemp("toml") / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load(file) == config


def test_paths_are_saved_so_that_they_hold_in_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(build("1f1b", ranks=2, microbatches=4), tmp_path / "mine.csv")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dualpipe").touch()  # a name is a name even where a file is called so
    config = load(None, [("schedule.name", "mine.csv"), ("data.kind", "text"), ("data.path", "t")])
    saved = with_absolute_paths(config)
    assert saved.schedule.name == str(tmp_path / "mine.csv")
    assert saved.data.path == str(tmp_path / "t")
    assert with_absolute_paths(saved) == saved
    assert with_absolute_paths(Config()) == Config()


def test_orders_of_phases_are_lists_in_files_and_with_commas_behind_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('overlap.forward = ["attn(F)", "mlp(F)"]\n')
    given = load(None, [("overlap.forward", "attn(F), mlp(F)")])
    assert load(file).overlap == given.overlap
    assert given.overlap.forward == ("attn(F)", "mlp(F)")
    assert given.overlap.interleaving is not None
    assert given.overlap.interleaving.forward == ("attn(F)", "mlp(F)")
    assert load(None, [("overlap.forward", '["attn(F)", "mlp(F)"]')]) == given
    assert load(None, [("overlap.enabled", "false")]).overlap.interleaving is None


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("overlap.pair", "mlp(B), mlp(B)", "pair has mlp(B) twice"),
        ("overlap.pair", "mlp", "pair has 'mlp'; a phase is written like mlp(F)"),
        ("overlap.forward", "mlp(B)", "mlp(B) is no phase of forward"),
        ("overlap.backward", "mlp(W)", "backward has mlp(W) without mlp(B)"),
        ("profile.steps", "last", "'last' is no number or range of numbers"),
        ("profile.steps", "0-2", "profile.steps must be steps from 1 up, got 0-2"),
        ("profile.ranks", "some", "'some' is no number"),
        ("dispatch.num_sms", "0", "dispatch.num_sms must be 1 or more, or none, got 0"),
    ],
)
def test_values_of_overlap_and_profile_that_cannot_be_name_their_key(
    key: str, value: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, [(key, value)])
    assert str(caught.value).startswith(f"--{key}: {words}")
