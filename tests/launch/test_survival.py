"""Runs that are lost or stopped and started again, with real processes; bench.survival has more."""

import json
import random
import signal
from pathlib import Path

import pytest

from bench.survivor import EVERY, SMALL, STEPS, Outcome, Survivor, damage
from counterflow.launch.checkpoint.read import open_checkpoint

GUARD = (*("--guard.window", "2", "--guard.spike_sigma", "0.65", "--guard.max_events", "100"),)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    run = Survivor(tmp_path_factory.mktemp("whole"))
    run.finish()
    return Outcome.of(run)


def resumed(run: Survivor) -> list[int]:
    result = json.loads((run.run / "result.json").read_text(encoding="utf-8"))
    return result["resumed"]


def test_a_run_lost_again_and_again_ends_like_one_that_was_not(
    tmp_path: Path, uninterrupted: Outcome
) -> None:
    run = Survivor(tmp_path)
    run.start()
    run.wait_for_step(1)
    run.kill_rank(1)  # before there is a checkpoint, or nearly so
    before = run.steps_saved()[:1]
    run.start()
    run.wait(lambda: run.steps_saved()[:1] > before, "a checkpoint")
    run.kill_all_ranks()
    first = run.steps_saved()[0]
    run.start()
    run.wait(lambda: run.steps_saved()[0] > first, "a second checkpoint")
    run.kill_launcher()
    second, kept = run.steps_saved()[:2]
    damage(run.newest() / "rank00000.safetensors", random.Random(0))
    run.finish()
    assert "rank00000.safetensors" in run.said[-1]  # the damaged file is named
    assert run.starts == 4
    # Of the course that led here: what was lost after `kept` was saved is no part of it.
    assert resumed(run) == before + ([first] if kept == first else [first, kept])
    assert second % EVERY == 0
    assert not uninterrupted.difference(Outcome.of(run))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_run_asked_to_stop_saves_ends_with_its_status_and_goes_on(
    tmp_path: Path, uninterrupted: Outcome, number: signal.Signals
) -> None:
    run = Survivor(tmp_path)
    run.start()
    run.wait_for_step(1)
    assert run.process is not None
    run.process.send_signal(number)
    assert run.end() == 75, run.said[-1]
    stopped = json.loads((run.run / "stopped.json").read_text(encoding="utf-8"))
    assert 1 < stopped["step"] < STEPS
    assert run.steps_saved()[0] == stopped["step"]
    run.finish()
    assert not (run.run / "stopped.json").exists()
    assert resumed(run) == [stopped["step"]]
    assert not uninterrupted.difference(Outcome.of(run))


def test_a_batch_that_makes_the_loss_jump_is_skipped_and_training_goes_on(tmp_path: Path) -> None:
    run = Survivor(tmp_path, (*SMALL, *GUARD, "--guard.on_spike", "skip"))
    run.finish()
    lines = run.lines()
    skipped = [line for line in lines if line["kind"] == "skip"]
    assert skipped
    assert all("standard deviations over the mean" in line["text"] for line in skipped)
    trained = [line["step"] for line in lines if line["kind"] == "train"]
    assert trained == list(range(1, STEPS + 1))
    updates = open_checkpoint(run.newest()).read("optimizer/step/model.norm.weight")
    assert int(updates) == STEPS - len(skipped)


def test_a_run_rolled_back_goes_on_from_its_checkpoint_with_later_batches(tmp_path: Path) -> None:
    run = Survivor(tmp_path, (*SMALL, *GUARD, "--guard.on_spike", "rollback"))
    run.finish()
    lines = run.lines()
    back = [line for line in lines if line["kind"] == "rollback"]
    assert back
    for line in back:
        assert line["step"] % EVERY == 0
        assert line["step"] < line["failed_step"]
    trained = [line["step"] for line in lines if line["kind"] == "train"]
    assert trained == list(range(1, STEPS + 1))  # what was trained twice stands there once
    evaluated = [line["step"] for line in lines if line["kind"] == "validation"]
    assert evaluated == [5, 10, STEPS]


def test_another_layout_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    """In float64, so that another order of summation cannot reach the sixth decimal."""
    double = (*SMALL, "--train.dtype", "float64")
    kept, changed = Survivor(tmp_path / "kept", double), Survivor(tmp_path / "changed", double)
    kept.finish()
    changed.start()
    changed.wait_for_step(1)
    assert changed.process is not None
    changed.process.send_signal(signal.SIGUSR1)
    assert changed.end() == 75, changed.said[-1]
    changed.arguments = (
        *double,
        *("--mesh.pp", "2", "--mesh.dp", "1", "--mesh.ep", "1", "--schedule.name", "zb-h1"),
        *("--schedule.microbatches", "8"),
    )
    changed.finish()
    curves = [
        {line["step"]: line["main_loss"] for line in run.lines() if line["kind"] == "train"}
        for run in (kept, changed)
    ]
    assert curves[0].keys() == curves[1].keys() == set(range(1, STEPS + 1))
    for step, loss in curves[0].items():
        assert abs(curves[1][step] - loss) < 1e-6
