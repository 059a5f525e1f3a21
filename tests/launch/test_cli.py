"""The command line: help at once, errors in one line, exit statuses."""

import subprocess
import sys

import pytest

from counterflow.launch.cli import UsageError, main, split_arguments
from tests.clocks import least_seconds
from tests.launch.commands import processor_seconds


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("counterflow: error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("counterflow: error: ").rstrip()


@pytest.mark.alone
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["simulate", "--ranks", "8", "--microbatches", "20", "--json"],
        ["train", "--help"],
    ],
)
def test_help_and_simulation_start_without_torch_in_half_a_second_of_processor_time(
    arguments: list[str],
) -> None:
    def seconds() -> float:
        return processor_seconds(arguments, without=["torch"])

    assert least_seconds(seconds, enough_s=0.5, tries=3) < 0.5


def test_help_of_train_lists_every_key_with_its_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from counterflow.launch.config import rows

    assert main(["train", "x.toml", "--help"]) == 0
    shown = capsys.readouterr().out
    for row in rows():
        assert f"--{row.key}" in shown
    assert "--train.betas = [0.9, 0.95]" in shown


def test_arguments_of_train_are_a_file_and_pairs_in_any_order() -> None:
    assert split_arguments([]) == (None, [])
    assert split_arguments(["--train.lr", "-1", "run.toml", "--run.name=a=b"]) == (
        "run.toml",
        [("train.lr", "-1"), ("run.name", "a=b")],
    )
    assert split_arguments(["--profile", "5-7"]) == (None, [("profile.steps", "5-7")])
    for wrong in (["--train.lr"], ["--train.lr", "--x"], ["a.toml", "b.toml"], ["-x"]):
        with pytest.raises(UsageError):
            split_arguments(wrong)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["trane"], "trane"),
        (["simulate", "--rank", "4"], "--rank"),
        (["simulate", "--ranks", "four"], "four"),
        (["simulate"], "--ranks and --microbatches"),
        (["simulate", "--ranks", "4", "--microbatches", "7"], "dualpipe"),
        (["simulate", "--ranks", "4", "--microbatches", "8", "--costs", "G=1"], "G"),
        (["simulate", "--schedule", "nowhere.csv"], "nowhere.csv: no such schedule file"),
        (["train", "nowhere.toml"], "nowhere.toml: no such configuration file"),
        (["train", "--train.lrr", "1"], "did you mean train.lr?"),
        (["train", "--train.steps", "many"], "train.steps must be a whole number, got 'many'"),
        (["train", "--schedule.microbatches", "5"], "5"),
        (["train", "--run.nproc", "3"], "needs 4 processes"),
        (["train", "--data.kind", "text", "--data.path", "/nowhere"], "/nowhere: no such"),
        (["train", "--data.kind", "text", "--data.path", sys.executable], "is a binary file"),
        (["report", "/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert words in error_of(capsys, *arguments)


def test_a_reader_that_goes_away_is_no_error_message() -> None:
    command = [sys.executable, "-m", "counterflow", "train", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
