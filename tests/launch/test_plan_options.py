"""What `counterflow plan` can be asked for, and what it refuses before any work."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from counterflow.launch import plan_options
from counterflow.launch.plan_options import (
    TOML_HEADER,
    PlanOptions,
    Sized,
    add_arguments,
    read_options,
)
from counterflow.predict.cluster import load_cluster
from counterflow.predict.layout import Dispatcher, DTypeName, Layout, Payload


def read(*arguments: str) -> PlanOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_options(parser.parse_args(arguments))


def sized(*arguments: str, **cluster: Any) -> Sized:
    """What is asked for on H800s, but for what `cluster` changes."""
    return read(*arguments).on(replace(load_cluster("h800"), **cluster))


def test_the_defaults_are_those_of_deepseek_v3_s_run() -> None:
    found = read()
    assert (found.length, found.cluster, found.search, found.fixed) == (4096, None, True, {})
    on = sized()
    assert (on.gpus, on.batch) == (2048, 15360)


def test_gpus_are_those_of_a_given_mesh_or_else_of_the_cluster() -> None:
    assert sized(num_gpus=16).gpus == 16
    assert sized("--gpus", "8", num_gpus=16).gpus == 8
    assert sized("--pp", "2", "--dp", "4", num_gpus=16).gpus == 8
    for asked in (("--gpus", "32"), ("--pp", "4", "--dp", "8")):
        with pytest.raises(ValueError, match="--gpus: 32 GPUs are more than the 16"):
            sized(*asked, num_gpus=16)
    with pytest.raises(ValueError, match="--pp 3 does not divide --gpus 16"):
        sized("--pp", "3", num_gpus=16)


@pytest.mark.parametrize("gpus", [1, 2, 16, 24, 256, 4096])
def test_the_default_batch_is_whole_for_every_number_of_pipeline_ranks(gpus: int) -> None:
    batch = sized("--gpus", str(gpus)).batch
    for pp in (pp for pp in range(1, gpus + 1) if gpus % pp == 0):
        assert batch % (gpus // pp) == 0
    assert batch == 8 * gpus


def test_the_default_batch_is_whole_for_given_sequences() -> None:
    assert sized("--gpus", "8", "--pp", "1", "--sequences", "3").batch == 72
    with pytest.raises(ValueError, match="--batch 64 is no multiple of 24"):
        sized("--gpus", "8", "--pp", "1", "--sequences", "3", "--batch", "64")


def test_a_machine_without_sms_keeps_none_unless_asked_to() -> None:
    cpu = replace(load_cluster("h800").gpu, num_sms=0)
    asked = ("--gpus", "8", "--pp", "2", "--ep", "2", "--no-search")
    assert sized(*asked, gpu=cpu).layout().comm_sms is None
    assert sized(*asked, "--comm-sms", "12", gpu=cpu).layout().comm_sms == 12
    assert sized(*asked).layout().comm_sms == Layout().comm_sms == 20


def test_what_is_given_fixes_fields_of_a_layout() -> None:
    found = sized(
        *("--gpus", "64", "--pp", "8", "--ep", "4", "--batch", "32", "--comm-sms", "0"),
        *("--fp8", "off", "--layers", "4/4/3", "--dispatcher", "two_hop", "--no-search"),
    )
    assert found.layout() == Layout(
        pp=8, dp=8, ep=4, microbatches=4, comm_sms=None, fp8=False, layers=(4, 4, 3),
        dispatcher="two_hop",
    )  # fmt: skip


def test_a_batch_follows_from_a_layout_that_says_it() -> None:
    given = ("--pp", "2", "--dp", "4", "--microbatches", "6", "--sequences", "3")
    found = sized(*given)
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
        (("--html", "/proc/x.html"), "--html /proc/x.html: no file can be made in /proc"),
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
        sized("--pp", "16", "--no-search").layout()
    with pytest.raises(ValueError, match="--batch 100 is no multiple of 128"):
        read("--gpus", "512", "--pp", "4", "--ep", "8", "--batch", "100")


@pytest.mark.parametrize("first", ["[run]", f"{TOML_HEADER}: so and so."])
def test_a_run_s_file_is_not_written_over(tmp_path: Path, first: str) -> None:
    path = tmp_path / "run.toml"
    assert read("--toml", str(path)).outputs[0].path == path
    path.write_text(f"{first}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"is there already.* name another one, or remove it"):
        read("--toml", str(path))
