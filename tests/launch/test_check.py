"""A whole configuration is checked before any process starts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from counterflow.fp8.products.cublas import Cublas
from counterflow.fp8.products.deep_gemm import DeepGemm
from counterflow.fp8.products.triton import Triton
from counterflow.launch.check import check, check_sizes, step_schedules
from counterflow.launch.config import Config, load
from counterflow.launch.fp8 import backends, introduction, require_backend
from counterflow.launch.fp8_config import FP8Config
from counterflow.launch.settings import ConfigError
from counterflow.launch.tokens import write_tokens
from counterflow.parallel.schedule import build, save

DEEP_EP = ("dispatch.backend", "deep_ep")
SMS = ("dispatch.num_sms", "20")
PAIR = "combine(B), attn(F), mlp(B), dispatch(F), dispatch(B), mlp(F), attn(B), combine(F)"


def refusal(*overrides: tuple[str, str]) -> str:
    config = load(None, overrides)
    with pytest.raises(ValueError, match=r".") as caught:
        check(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_default_run_passes() -> None:
    check(Config())


def test_layers_of_stages_are_numbers_from_one_up() -> None:
    assert load(None, [("schedule.layers", "1,3")]).schedule.layers == (1, 3)
    assert load(None, [("schedule.layers", "none")]).schedule.layers is None
    for text in ("4,0", "", "1,x"):
        with pytest.raises(ConfigError, match=r"schedule\.layers"):
            load(None, [("schedule.layers", text)])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([("run.nproc", "3")], ["needs 4 processes", "3 were started"]),
        ([("schedule.microbatches", "5")], ["dualpipe", "5"]),
        (
            [("schedule.name", "1f1b"), ("schedule.stages_per_rank", "2")],
            ["1f1b: ", "leave stages_per_rank out", "interleaved"],
        ),
        (
            [("schedule.name", "interleaved"), ("schedule.stages_per_rank", "1")],
            ["stages_per_rank=1", "use 2, or 1f1b"],
        ),
        (
            [("schedule.name", "interleaved"), ("schedule.stages_per_rank", "3")],
            ["schedule.name=interleaved", "mesh.pp=2", "4 layers", "6 stages"],
        ),
        ([("mesh.pp", "3"), ("schedule.microbatches", "6")], ["dualpipe", "3"]),
        (
            [("schedule.layers", "2,1,1")],
            ["mesh.pp=2", "layers=2,1,1", "3 stages, but there are 2"],
        ),
        ([("schedule.layers", "3,2")], ["layers=3,2", "5 layers in all", "num_hidden_layers=4"]),
        ([("schedule.name", "dualpip")], ["dualpip", "did you mean 'dualpipe'"]),
        ([("schedule.name", "mine.csv")], ["mine.csv: no such schedule file"]),
        ([("mesh.dp", "3"), ("mesh.ep", "3")], ["mesh.ep=3", "8 routed experts"]),
        (
            [("mesh.pp", "8"), ("schedule.microbatches", "16")],
            ["mesh.pp=8", "4 layers", "8 stages"],
        ),
        ([("data.sequence_length", "4096")], ["data.sequence_length=4096", "max_position"]),
        ([("data.sequence_length", "1")], ["num_nextn_predict_layers=1"]),
        ([("model.vocab_size", "100")], ["model.vocab_size=100", "at least 256"]),
        (
            [("train.ramp_start", "3"), ("train.ramp_steps", "9")],
            ["train.ramp_start=3", "step 1", "3 micro-batches"],
        ),
        (
            [("train.ramp_start", "8"), ("train.ramp_steps", "9")],
            ["train.ramp_start=8", "only rises"],
        ),
        ([("data.kind", "text"), ("data.path", "/nowhere/at/all")], ["/nowhere/at/all", "no such"]),
        ([DEEP_EP, ("mesh.ep", "1")], ["dispatch.backend=deep_ep with mesh.ep=1", "nobody"]),
        ([DEEP_EP, ("run.device", "cpu")], ["dispatch.backend=deep_ep with run.device=cpu"]),
        ([DEEP_EP], ["train.dtype=float32", "set the payload to bf16 or fp8"]),
        ([SMS, ("mesh.ep", "1")], ["dispatch.num_sms=20 with mesh.ep=1", "nobody"]),
        ([SMS, ("run.device", "cpu")], ["dispatch.num_sms=20 on the CPU", "DeepEP and NCCL"]),
        ([("profile.steps", "299-301")], ["profile.steps=299-301", "train.steps=300", "1 to 300"]),
        (
            [("profile.steps", "300"), ("profile.ranks", "0,4")],
            ["profile.ranks=0,4", "4 ranks", "0 to 3"],
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    overrides: list[tuple[str, str]], words: list[str]
) -> None:
    message = refusal(*overrides)
    for word in words:
        assert word in message


FP8 = ("fp8.enabled", "true")


def test_fp8_in_float64_is_refused_with_what_to_take_instead() -> None:
    message = refusal(FP8, ("train.dtype", "float64"))
    assert "fp8.enabled with train.dtype=float64" in message
    assert "set train.dtype to bfloat16" in message
    for dtype in ("float32", "bfloat16"):
        check_sizes(load(None, [FP8, ("train.dtype", dtype)]))


def test_a_backend_that_cannot_serve_is_refused_before_any_process_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = [FP8, ("run.device", "cpu")]
    for name in ("auto", "reference", "emulation"):
        check(load(None, [*cpu, ("fp8.backend", name)]))
    check(load(None, [("fp8.backend", "deep_gemm")]))  # without fp8.enabled it is not asked for
    # Installed, but for GPUs.
    for kind in (DeepGemm, Cublas, Triton):
        monkeypatch.setattr(kind, "missing", lambda _: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = refusal(*cpu, ("fp8.backend", "deep_gemm"), ("train.dtype", "bfloat16"))
    assert "fp8.backend=deep_gemm cannot compute the forward product of model.layers.0" in message
    assert " on cpu: " in message
    assert "fp8.backend=auto" in message
    # Not installed: which, and how to get it.
    monkeypatch.setattr(DeepGemm, "missing", lambda _: "DeepGEMM is not here; get it there")
    message = refusal(*cpu, ("fp8.backend", "deep_gemm"))
    assert "fp8.backend=deep_gemm: " in message
    assert "DeepGEMM is not here; get it there" in message


def test_a_backend_without_grouped_products_cannot_train_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a Hopper GPU that has it."""
    monkeypatch.setattr(Cublas, "missing", lambda _: None)
    monkeypatch.setattr("counterflow.fp8.products.cublas.why_not_hopper", lambda _: None)
    config = load(None, [FP8, ("fp8.backend", "cublas"), ("train.dtype", "bfloat16")])
    cuda = torch.device("cuda")
    with pytest.raises(
        ConfigError, match=r"layers\.1\.mlp\.experts\.gate_up_proj \(grouped,.*dense products alone"
    ):
        require_backend(config, cuda)
    dense = [("model.first_k_dense_replace", "4"), ("model.num_nextn_predict_layers", "0")]
    sizes = [("fp8.enabled", "true"), ("fp8.backend", "cublas"), *dense]
    require_backend(load(None, sizes), cuda)
    assert backends(load(None, sizes), cuda)[0] == {"dense": ["cublas"]}


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"model.q_lora_rank": "60"}, "forward product of layers.0.self_attn.q_a_proj and kv_a"),
        # Together a multiple of 16, but the gradients of the two are apart.
        (
            {"model.q_lora_rank": "60", "model.kv_lora_rank": "36"},
            "weight gradient of layers.0.self_attn.q_a_proj and kv_a_proj_with_mqa",
        ),
        ({"model.v_head_dim": "33"}, "forward product of layers.0.self_attn.kv_b_proj"),
        ({"model.intermediate_size": "360"}, "forward product of layers.0.mlp.down_proj"),
        # One position less is 254 rows of two sequences.
        ({"model.num_nextn_predict_layers": "1"}, "forward product of layers.4.eh_proj"),
        ({"data.sequence_length": "127"}, "forward product of layers.0.self_attn.q_a_proj"),
    ],
)
def test_a_layer_whose_sizes_a_backend_cannot_take_is_named(
    changed: dict[str, str], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuBLAS takes M divisible by 8, N and K by 16."""
    monkeypatch.setattr(Cublas, "missing", lambda _: None)
    monkeypatch.setattr("counterflow.fp8.products.cublas.why_not_hopper", lambda _: None)
    fitting = {
        "fp8.enabled": "true",
        "fp8.backend": "cublas",
        "model.first_k_dense_replace": "4",
        "model.num_nextn_predict_layers": "0",
    }
    cuda = torch.device("cuda")
    require_backend(load(None, fitting.items()), cuda)
    with pytest.raises(ConfigError, match="sizes must be multiples") as caught:
        require_backend(load(None, (fitting | changed).items()), cuda)
    assert f"cannot compute the {what}" in str(caught.value).replace("model.layers", "layers")


def test_all_backends_that_serve_a_kind_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepGEMM takes K divisible by 128; the Triton kernels take the rest."""
    monkeypatch.setattr(DeepGemm, "missing", lambda _: None)
    monkeypatch.setattr("counterflow.fp8.products.deep_gemm.why_not_hopper", lambda _: None)
    monkeypatch.setattr(Cublas, "missing", lambda _: "not here")
    monkeypatch.setattr(Triton, "missing", lambda _: None)
    monkeypatch.setattr(Triton, "why_not", lambda *_: None)
    config = load(None, [FP8, ("train.dtype", "bfloat16")])
    names, why = backends(config, torch.device("cuda"))
    assert names["dense"] == ["deep_gemm", "triton"]
    assert names["grouped"] == ["deep_gemm", "triton"]
    assert names["grouped_along_k"] == ["triton"]
    assert "not cublas: not here" in why


def test_stages_per_rank_are_those_of_the_configuration() -> None:
    named = [("schedule.name", "interleaved"), ("model.num_hidden_layers", "6")]
    for more, stages in ((), 4), ([("schedule.stages_per_rank", "3")], 6):
        config = load(None, [*named, *more])
        check_sizes(config)
        assert step_schedules(config)[4].num_stages == stages
    with pytest.raises(ValueError, match=r"schedule\.stages_per_rank must be 1 or more, got 0"):
        load(None, [*named, ("schedule.stages_per_rank", "0")])


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a line\n" * 30)
    message = refusal(("data.kind", "text"), ("data.path", str(text)))
    assert "too few for one sequence" in message
    check(
        load(None, [("data.kind", "text"), ("data.path", str(text)), ("data.sequence_length", "8")])
    )


def test_a_schedule_file_must_have_the_sizes_of_the_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    save(build("1f1b", ranks=2, microbatches=4), file)
    check_sizes(load(None, [("schedule.name", str(file))]))
    assert "has 4 micro-batches, not 6" in refusal(
        ("schedule.name", str(file)), ("schedule.microbatches", "6")
    )


def test_a_token_file_with_an_id_outside_its_vocabulary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.bin"
    write_tokens(path, [[d] * 300 for d in range(20)], vocab_size=256, separator=0)
    data = [("data.kind", "tokens"), ("data.path", str(path))]
    check(load(None, data))
    tokens = np.memmap(path, dtype="<u2", mode="r+")
    tokens[4321] = 256
    assert refusal(*data).startswith(f"{path}: token 4321 has the id 256, but ")


def test_a_ramp_has_a_schedule_for_every_size_of_its_steps() -> None:
    ramp = [("train.ramp_start", "4"), ("train.ramp_steps", "7"), ("schedule.microbatches", "12")]
    assert sorted(step_schedules(load(None, ramp))) == [4, 6, 8, 10, 12]
    one_way = [*ramp, ("schedule.name", "1f1b")]
    assert {5, 7, 9} & set(step_schedules(load(None, one_way)))


def test_fp8_keys_without_fp8_are_said_to_have_no_effect() -> None:
    cpu = torch.device("cpu")
    assert introduction(Config(), cpu) == ""
    given = replace(Config(), fp8=FP8Config(check=True))
    assert introduction(given, cpu) == "fp8.check has no effect without fp8.enabled"


@pytest.mark.parametrize(
    ("key", "order", "words"),
    [
        (
            "pair",
            PAIR.replace("dispatch(F), ", "").replace("mlp(F)", "mlp(F), dispatch(F)"),
            ["mlp(F) layer 3 comes before dispatch(F) layer 3", "move dispatch(F) layer 3 ahead"],
        ),
        ("pair", PAIR.replace(", combine(F)", ""), ["no place for combine(F)", "communicates"]),
        ("pair", f"{PAIR}, mpl(F)", ["no layer has a phase mpl(F)", "attn", "combine"]),
        (
            "forward",
            "dispatch(F), attn(F), mlp(F), combine(F)",
            ["dispatch(F) layer 1 comes before attn(F) layer 1"],
        ),
        (
            "backward",
            "combine(B), mlp(B), dispatch(B), attn(W), attn(B)",
            ["attn(W) layer", "comes before attn(B) layer"],
        ),
    ],
)
def test_an_order_that_this_models_layers_cannot_run_in_is_refused(
    key: str, order: str, words: list[str]
) -> None:
    message = refusal((f"overlap.{key}", order))
    assert message.startswith(f"overlap.{key}: ")
    for word in words:
        assert word in message


def test_other_orders_that_keep_all_dependencies_pass() -> None:
    check_sizes(load(None, [("overlap.pair", PAIR)]))  # without weight gradients of their own
    check_sizes(load(None, [("overlap.pair", "")]))  # one direction after the other
    late = "combine(B), mlp(B), shared(B), dispatch(B), attn(B), mlp(W), shared(W), attn(W)"
    check_sizes(load(None, [("overlap.backward", late), ("model.n_shared_experts", "2")]))
    check_sizes(load(None, [("overlap.pair", "mpl(F)"), ("overlap.enabled", "false")]))
