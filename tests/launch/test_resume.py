"""What a start of a run makes of what an earlier one has left."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from counterflow.launch.checkpoint.errors import CheckpointError
from counterflow.launch.config import Config, load
from counterflow.launch.engine import StepResult
from counterflow.launch.history import LAST, History
from counterflow.launch.resume import (
    as_values,
    decide,
    differences,
    has_begun,
    launch_name,
    leave_begun,
    saved_config,
    set_aside,
    started_again,
)
from counterflow.launch.settings import ConfigError


def config_of(*overrides: tuple[str, str]) -> Config:
    return load(None, overrides)


def decision(*, saved: Any, config: Config | None = None, **given: Any) -> str:
    defaults: dict[str, Any] = {"resume": "auto", "finished": False, "again": False}
    return decide(
        **(defaults | given), saved=saved, config=config if config is not None else config_of()
    )


SAVED = as_values(config_of())


@pytest.mark.parametrize("resume", ["auto", "latest", "never"])
def test_without_a_checkpoint_a_run_begins(resume: str) -> None:
    assert decision(saved=None, resume=resume) == "begin"


def test_an_unfinished_run_goes_on_and_a_finished_one_begins_anew() -> None:
    assert decision(saved=SAVED) == "go on"
    assert decision(saved=SAVED, finished=True) == "begin"
    assert decision(saved=SAVED, finished=True, resume="latest") == "go on"
    assert decision(saved=SAVED, resume="never") == "begin"


@pytest.mark.parametrize("resume", ["auto", "latest", "never"])
def test_a_launcher_that_starts_a_run_again_has_it_go_on_whatever_was_asked(resume: str) -> None:
    assert decision(saved=SAVED, resume=resume, again=True) == "go on"
    assert decision(saved=SAVED, resume=resume, again=True, finished=True) == "done"
    assert decision(saved=None, resume=resume, again=True) == "begin"


def test_what_changes_the_training_is_named_with_both_values_and_every_way_out() -> None:
    other = config_of(("train.lr", "0.001"), ("run.seed", "7"))
    with pytest.raises(ConfigError) as raised:
        decision(saved=SAVED, config=other)
    message = str(raised.value)
    for part in (
        "runs/small",
        "run.seed was 0, is 7",
        "train.lr was 0.003, is 0.001",
        "--checkpoint.resume latest",
        "--checkpoint.resume never",
        "run.name",
    ):
        assert part in message
    assert decision(saved=SAVED, config=other, resume="latest") == "go on"


def test_layout_and_what_only_watches_may_change() -> None:
    same = config_of(
        ("mesh.pp", "4"),
        ("mesh.dp", "1"),
        ("mesh.ep", "1"),
        ("schedule.name", "1f1b"),
        ("schedule.microbatches", "8"),
        ("run.timeout_s", "60"),
        ("train.log_every", "1"),
        ("checkpoint.every", "7"),
    )
    assert not list(differences(SAVED, same))


def test_another_batch_is_another_training() -> None:
    other = config_of(("mesh.dp", "4"))
    (difference,) = differences(SAVED, other)
    assert difference.startswith("the batch of step 1 (train.sequences x schedule.microbatches")
    assert difference.endswith("was 16 sequences, is 32")


def test_a_ramp_that_another_layout_would_climb_otherwise_is_another_training() -> None:
    ramp = (("train.ramp_start", "2"), ("train.ramp_steps", "10"), ("mesh.ep", "1"))
    saved = as_values(config_of(*ramp, ("mesh.dp", "2")))
    other = config_of(*ramp, ("mesh.dp", "1"), ("schedule.microbatches", "8"))
    (difference,) = differences(saved, other)
    assert difference.startswith("the batch of step 1 ")
    assert not list(differences(saved, other, step=10))  # what is left has the full batch


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_is_known_by_its_count(name: str) -> None:
    assert started_again({name: "2"})
    assert not started_again({name: "0"})
    assert not started_again({name: "-1"})
    assert not started_again({})


def test_a_run_is_of_a_launch_only_once_that_has_begun_it(tmp_path: Path) -> None:
    assert not has_begun(tmp_path, "Slurm job 7")
    leave_begun(tmp_path, "Slurm job 7")
    assert has_begun(tmp_path, "Slurm job 7")
    assert not has_begun(tmp_path, "Slurm job 8")
    (tmp_path / "begun.json").write_text("{")
    assert not has_begun(tmp_path, "Slurm job 7")


def test_all_starts_of_a_job_are_one_launch_and_those_of_two_jobs_are_not() -> None:
    assert launch_name({"SLURM_JOB_ID": "7"}) == launch_name(
        {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}
    )
    assert launch_name({"SLURM_JOB_ID": "7"}) != launch_name({"SLURM_JOB_ID": "8"})
    assert launch_name({}) == launch_name({})


def test_the_last_runs_checkpoints_stay_until_there_are_others_to_take_their_place(
    tmp_path: Path,
) -> None:
    saved = tmp_path / "checkpoints" / "step-00000100"
    saved.mkdir(parents=True)
    assert set_aside(tmp_path) == ""
    assert (tmp_path / "checkpoints.previous" / "step-00000100").is_dir()
    (tmp_path / "checkpoints").mkdir()  # of a start that was lost before it saved anything
    assert set_aside(tmp_path) == ""
    assert (tmp_path / "checkpoints.previous" / "step-00000100").is_dir()


def test_a_folder_that_cannot_be_moved_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000100").mkdir(parents=True)
    (tmp_path / "checkpoints.previous").write_text("a file")
    assert "cannot be moved" in set_aside(tmp_path)


def test_a_checkpoint_of_weights_alone_is_no_run_to_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.weights"):
        saved_config({"config": {"model": {}}}, tmp_path)


def test_a_history_comes_back_from_plain_json() -> None:
    history = History()
    for step in range(LAST + 3):
        result = StepResult({"main": 1.5 + step}, 0.25, {"model.layers.1.mlp.gate": [step, 2]})
        history.add(replace(result, updated=step % 2 == 0), seconds=0.5, tokens=64)
    history.resumed.append(4)
    import json

    again = History()
    again.restore(json.loads(json.dumps(history.state())))
    assert again.state() == history.state()
    assert (again.step, again.tokens, len(again.recent)) == (LAST + 3, 64 * (LAST + 3), LAST)
    assert again.loads() == {"1": [sum(range(3, LAST + 3)), 2 * LAST]}
