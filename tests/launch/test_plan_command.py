"""`counterflow plan`: what it predicts, writes and refuses."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from counterflow.comm.profile.simulated import read_simulated
from counterflow.launch.cli import main
from counterflow.launch.config import Config, load
from counterflow.launch.plan_layout import layout_of
from counterflow.launch.plan_options import TOML_HEADER, add_arguments
from counterflow.launch.settings import to_toml
from counterflow.model import ModelConfig
from counterflow.parallel.mesh import MeshShape
from counterflow.predict.cluster import load_cluster
from counterflow.predict.cluster_file import KEYS
from tests.clocks import least_seconds
from tests.launch.commands import Command, processor_seconds

_COMMAND = Command("plan")
shown, printed, error_of = _COMMAND.shown, _COMMAND.printed, _COMMAND.error_of

SMALL = ModelConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_hidden_layers=6,
    first_k_dense_replace=1,
    num_attention_heads=4,
    q_lora_rank=64,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=16,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    max_position_embeddings=512,
)
LAYOUT = ("--gpus", "8", "--pp", "4", "--ep", "2", "--batch", "16", "--length", "512")
NOT_SEARCHED = (*LAYOUT, "--no-search")
# Few enough to be searched at once.
SEARCHED = ("--gpus", "8", "--batch", "16", "--length", "512", "--sequences", "1", "--top", "3")
SEARCHED = (*SEARCHED, "--schedule", "dualpipe", "--zero", "1", "--fp8", "on")
SEARCHED = (*SEARCHED, "--dispatcher", "two_hop", "--payload", "fp8", "--comm-sms", "20")


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, nothing is said on stderr."""
    monkeypatch.setattr("counterflow.launch.simulate_progress.AFTER_S", 3600.0)


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL.to_hf()), encoding="utf-8")
    return str(path)


def test_a_given_layout_is_predicted_as_it_is(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    told = printed(capsys, "--model", model, *NOT_SEARCHED)
    assert told["search"] is None
    assert told["model"] == model
    assert told["model_config"]["hidden_size"] == 256
    layout = told["layout"]
    assert [layout[key] for key in ("pp", "dp", "ep", "microbatches")] == [4, 2, 2, 8]
    assert sum(of["ms"] for of in told["waterfall"]) == pytest.approx(told["step_ms"])
    for of in told["ranks"]:
        assert of["step_ms"] == pytest.approx(told["step_ms"])
    assert len(told["memory"]) == 4
    assert told["fits"]
    assert told["calibration"] == "the data sheet of h800"


def test_what_is_not_named_is_deepseek_v3_and_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--gpus", "512", "--pp", "4", "--ep", "64", "--batch", "1024",
                 "--schedule", "1f1b", "--no-search")  # fmt: skip
    assert "DeepSeek-V3 on 512 x H800 (h800), speeds from the data sheet of h800" in text
    assert "from the ideal step to the predicted one" in text


def test_what_is_drawn_is_decided_by_the_seed(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    def step(*more: str) -> float:
        drawn = ("--jitter", "0.1", "--routing", "skewed=0.5")
        return printed(capsys, "--model", model, *NOT_SEARCHED, *drawn, *more)["step_ms"]

    assert step("--seed", "1") == step("--seed", "1") != step("--seed", "2")
    calm = printed(capsys, "--model", model, *NOT_SEARCHED, "--routing", "balanced")["step_ms"]
    assert calm < step()
    assert step("--stragglers", "3:2") > 1.2 * step()


def test_a_search_keeps_to_what_is_given_and_shows_the_best_first(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    told = printed(capsys, "--model", model, *SEARCHED)
    found = told["search"]
    times = [of["step_ms"] for of in found["best"]]
    assert times == sorted(times)
    assert len(times) == 3
    assert told["layout"] == found["best"][0]["layout"]
    for of in found["best"]:
        layout = of["layout"]
        assert layout["pp"] * layout["dp"] == 8
        assert layout["dp"] * layout["microbatches"] * layout["sequences"] == 16
        given = ("schedule", "zero", "fp8", "dispatcher", "payload")
        if layout["ep"] > 1:
            assert [layout[key] for key in given] == ["dualpipe", 1, True, "two_hop", "fp8"]
    refused = sum(of["count"] for of in found["infeasible"])
    assert found["timed"] + found["pruned"] + refused == found["layouts"]
    assert all(of["example"] for of in found["infeasible"])


def test_the_toml_is_what_train_runs(
    capsys: pytest.CaptureFixture[str],
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # a longer path would be cut at the edge of the terminal
    path = Path("best.toml")
    text = shown(capsys, "--model", model, *SEARCHED, "--toml", str(path))
    assert f"wrote {path}" in text
    assert path.read_text(encoding="utf-8").startswith(TOML_HEADER)
    config = load(path)
    assert config.run.name == "best"
    assert config.model == SMALL
    told = printed(capsys, "--config", str(path))
    assert told["layout"] == json.loads(json.dumps(asdict(layout_of(config))))
    assert told["layout_from"] == str(path)


def test_a_layout_that_does_not_fit_is_written_with_a_warning(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("large.toml")
    large = ("--gpus", "8", "--pp", "2", "--ep", "4", "--batch", "16", "--length", "512")
    large = (*large, "--schedule", "1f1b", "--dispatcher", "two_hop", "--no-search")
    last = shown(capsys, *large, "--toml", str(path)).partition("wrote ")[2]
    second = path.read_text(encoding="utf-8").splitlines()[1]
    for text in (second, " ".join(last.split())):
        assert "this layout does not fit in memory: rank 0 needs" in text or "rank 1 needs" in text
    assert load(path).mesh == MeshShape(pp=2, dp=4, ep=4)


def test_an_interrupt_is_told_in_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("counterflow.launch.plan_command.read_options", interrupted)
    assert main(["plan"]) == 130
    assert capsys.readouterr() == ("", "counterflow: interrupted\n")


def test_a_run_s_own_file_is_predicted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = replace(Config(), mesh=MeshShape(pp=2, dp=2, ep=2))
    path = tmp_path / "run.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    told = printed(capsys, "--config", str(path))
    assert told["model"] == f"the model of {path}"
    assert (told["world_size"], told["layout"]["microbatches"]) == (4, 4)
    assert told["tokens_per_step"] == 2 * 4 * 2 * 128


def test_the_files_are_the_page_and_the_simulation(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path
) -> None:
    page, simulated = tmp_path / "plan.html", tmp_path / "step.json"
    files = ("--html", str(page), "--simulated", str(simulated))
    told = printed(capsys, "--model", model, *NOT_SEARCHED, *files)
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert json.loads(simulated.read_text(encoding="utf-8")) == told["simulation"]
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(told), encoding="utf-8")
    assert read_simulated(plan).rows == read_simulated(simulated).rows
    assert read_simulated(plan).has_phases


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in SMALL.to_hf().items() if name != key}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--cluster", "h80"), "h800"),
        (("--cluster", "{bad}"), "bad.toml"),
        (("--model", "{lacking}"), "hidden_size"),
        (("--model", "{bad}"), "bad.toml"),
        ((*NOT_SEARCHED, "--routing", "skewd=1"), "did you mean skewed?"),
        ((*NOT_SEARCHED, "--routing", "skewed=x"), "--routing skewed=x"),
        ((*NOT_SEARCHED, "--stragglers", "99:2"), "--stragglers 99:2: there is no rank 99 of 8"),
        ((*NOT_SEARCHED, "--routing", "gone.json"), "--routing gone.json: there is no such file"),
        (("--gpus", "9999992", "--pp", "1"), "--gpus: 9999992 GPUs are more than the"),
        ((*NOT_SEARCHED, "--trace", "{bad}"), "bad.toml"),
        ((*NOT_SEARCHED, "--trace", "{phaseless}"), "missing: attn(F), dispatch(F)"),
        ((*NOT_SEARCHED, "--measured", "{lacking}"), "doctor --measure"),
        ((*NOT_SEARCHED, "--length", "1024"), "this layout cannot be: length"),
        ((*NOT_SEARCHED, "--schedule", "dualpipe", "--batch", "6"), "cannot be: schedule"),
        ((*SEARCHED, "--length", "4096"), "no layout of 8 GPUs and 16 sequences can run"),
        ((*SEARCHED, "--microbatches", "4"), "--microbatches needs --pp or --dp"),
        (("--config", "{bad}"), "bad.toml"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str],
    model: str,
    tmp_path: Path,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    (tmp_path / "bad.toml").write_text("no = such key [", encoding="utf-8")
    (tmp_path / "lacking.json").write_text(json.dumps(without("hidden_size")), encoding="utf-8")
    (tmp_path / "phaseless.json").write_text(
        json.dumps(
            {
                "traceEvents": [
                    {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 1, "dur": 2,
                     "pid": 0, "tid": 7, "args": {"device": 0, "stream": 7}}
                ]
            }
        ),
        encoding="utf-8",
    )  # fmt: skip
    places = {f"{{{path.stem}}}": str(path) for path in tmp_path.iterdir()}
    told = [places.get(argument, argument) for argument in arguments]
    if "--model" not in told and "--config" not in told:
        told = ["--model", model, *told]
    assert words in error_of(capsys, *told)


def test_nothing_is_written_where_one_file_cannot_be(
    capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path
) -> None:
    page = tmp_path / "plan.html"
    files = ("--html", str(page), "--simulated", str(tmp_path / "no" / "step.json"))
    assert "there is no directory" in error_of(capsys, "--model", model, *NOT_SEARCHED, *files)
    assert not page.exists()


@pytest.mark.alone
def test_it_plans_without_torch_and_its_help_takes_half_a_second_of_processor_time(
    model: str,
) -> None:
    def seconds(*arguments: str) -> float:
        return processor_seconds(["plan", *arguments], without=["torch"])

    seconds("--model", model, *NOT_SEARCHED, "--json")
    assert least_seconds(lambda: seconds("--help"), enough_s=0.5, tries=3) < 0.5


# What docs/predict.md says

_DOCS = (Path(__file__).parents[2] / "docs" / "predict.md").read_text(encoding="utf-8")


def documented(section: str) -> list[str]:
    """What the first cells of a section's table name."""
    table = _DOCS.partition(f"## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"`(.*?)`", " ".join(re.findall(r"^\| (`.*?`) \|", table, re.M)))


def test_the_documented_options_are_those_of_the_command() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}  # pyright: ignore[reportPrivateUsage]
    assert sorted(documented("Options")) == sorted(flags)


def test_the_documented_keys_are_those_of_the_json(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    told = printed(capsys, "--model", model, *NOT_SEARCHED)
    assert sorted(documented("JSON")) == sorted(told)


def test_the_documented_keys_of_a_cluster_are_those_it_may_have() -> None:
    named = {name for name in documented("Clusters") if "RANKS" not in name}
    assert named == {*KEYS, "base", "sources"}


def test_the_documented_cluster_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```toml\n(.*?)^```", _DOCS, re.M | re.S)
    path = tmp_path / "ours.toml"
    path.write_text(text, encoding="utf-8")
    found = load_cluster(path)
    assert (found.name, found.links.across_gbps, found.num_gpus) == ("ours", 22, 128)


def test_the_documented_python_predicts(capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = re.findall(r"^```python\n(.*?)^```", _DOCS, re.M | re.S)
    exec(text, {})
    assert "model FLOPs at the BF16 peak" in capsys.readouterr().out
