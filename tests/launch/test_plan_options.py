"""What `counterflow plan` can be asked for, and what it refuses before any work."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import get_args

import pytest

from counterflow.launch import plan_options
from counterflow.launch.plan_options import TOML_HEADER, PlanOptions, add_arguments, read_options
from counterflow.predict.layout import Dispatcher, DTypeName, Layout, Payload


def read(*arguments: str) -> PlanOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_options(parser.parse_args(arguments))


def test_the_defaults_are_those_of_deepseek_v3_s_run() -> None:
    found = read()
    assert (found.gpus, found.batch, found.length, found.cluster) == (2048, 15360, 4096, None)
    assert found.search
    assert not found.fixed
    assert read("--gpus", "2").batch == 16  # 7.5 a GPU are 15, which no two directions share


def test_what_is_given_fixes_fields_of_a_layout() -> None:
    found = read(
        *("--gpus", "64", "--pp", "8", "--ep", "4", "--batch", "32", "--comm-sms", "0"),
        *("--fp8", "off", "--layers", "4/4/3", "--dispatcher", "two_hop", "--no-search"),
    )
    assert found.given_layout() == Layout(
        pp=8, dp=8, ep=4, microbatches=4, comm_sms=None, fp8=False, layers=(4, 4, 3),
        dispatcher="two_hop",
    )  # fmt: skip


def test_a_batch_follows_from_a_layout_that_says_it() -> None:
    given = ("--pp", "2", "--dp", "4", "--microbatches", "6", "--sequences", "3")
    found = read(*given)
    assert (found.gpus, found.batch) == (8, 72)


def test_choices_are_the_layout_s() -> None:
    choices = {name: known for name, (known, _) in plan_options._CHOICES.items()}  # pyright: ignore[reportPrivateUsage]
    assert choices["dtype"] == get_args(DTypeName)
    assert choices["dispatcher"] == get_args(Dispatcher)
    assert choices["payload"] == get_args(Payload)
    assert set(plan_options._FIXABLE) <= {*Layout.__dataclass_fields__}  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpus", "0"), "--gpus must be a whole number from 1 up, got '0'"),
        (("--gpus", "many"), "got 'many'"),
        (("--gpus", "100", "--pp", "16"), "--pp 16 does not divide --gpus 100"),
        (("--gpus", "64", "--pp", "8", "--dp", "4"), "--pp 8 x --dp 4 are 32 GPUs"),
        (("--gpus", "64", "--pp", "8", "--ep", "3"), "--ep 3 does not divide the 8"),
        (("--gpus", "64", "--ep", "3"), "--ep 3 does not divide --gpus 64"),
        (("--pp", "2", "--dp", "2", "--batch", "7"), "--batch 7 is no multiple of 2"),
        (
            ("--dp", "2", "--pp", "2", "--microbatches", "4", "--sequences", "1", "--batch", "16"),
            "are 8 sequences, but --batch is 16",
        ),
        (("--schedule", "dualpip"), "did you mean dualpipe?"),
        (("--dispatcher", "deepep"), "did you mean deep_ep?"),
        (("--fp8", "yes"), "--fp8 must be one of on, off"),
        (("--layers", "4/x"), "--layers must be a whole number"),
        (("--zero", "2"), "--zero must be 0 or 1"),
        (("--jitter", "1"), "--jitter must be a number from 0 to below 1"),
        (("--stragglers", "7"), "--stragglers must be RANK:SLOWER"),
        (("--top", "0"), "--top must be a whole number from 1 up"),
        (("--cluster", " "), "--cluster: a name or a file is needed"),
        (("--model", "/nowhere/config.json"), "there is no such file"),
        (("--html", "plan.txt"), "must end in .html"),
        (("--json", "--simulated", "/nowhere/s.json"), "there is no directory"),
        (("--toml", ""), "ending in .toml"),
        (("--html", "a.html", "--toml", "b.toml", "--simulated", "-"), "--simulated '-'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as told:
        read(*arguments)
    assert "\n" not in str(told.value)


def test_speeds_are_taken_from_one_source(tmp_path: Path) -> None:
    one = str(tmp_path / "one.json")
    Path(one).write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="--trace and --measured"):
        read("--trace", one, "--measured", one)
    with pytest.raises(ValueError, match="--trace-config goes with --trace"):
        read("--trace-config", one)


def test_a_run_s_file_says_all_of_its_layout(tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text("", encoding="utf-8")
    found = read("--config", str(run), "--cluster", "h100")
    assert not found.search
    for more in (("--pp", "2"), ("--gpus", "8"), ("--toml", str(tmp_path / "x.toml"))):
        with pytest.raises(ValueError, match=f"{more[0]} and --config"):
            read("--config", str(run), *more)


def test_a_single_layout_needs_what_cannot_be_guessed() -> None:
    with pytest.raises(ValueError, match="--no-search needs --ep"):
        read("--pp", "16", "--no-search").given_layout()
    with pytest.raises(ValueError, match="--batch 100 is no multiple of 128"):
        read("--gpus", "512", "--pp", "4", "--ep", "8", "--batch", "100")


def test_a_file_that_a_person_wrote_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[run]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="was not written by this command"):
        read("--toml", str(path))
    path.write_text(f"{TOML_HEADER}: so and so.\n", encoding="utf-8")
    assert read("--toml", str(path)).outputs[0].path == path
