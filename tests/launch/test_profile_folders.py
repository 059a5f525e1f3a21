"""What the folders of runs stand for."""

from __future__ import annotations

from pathlib import Path

import pytest

from counterflow.launch.profile_folders import find_traces


def run_in(folder: Path, name: str, **stretches: str) -> Path:
    """A run's folder; a stretch of steps has one file, of the name given."""
    run = folder / name
    run.mkdir(parents=True)
    (run / "config.toml").touch()
    (run / "timeline.json").write_text("{}")  # no trace, whatever its name
    for stretch, file in stretches.items():
        (run / "traces" / stretch).mkdir(parents=True)
        (run / "traces" / stretch / file).touch()
    return run


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r"name one|train with") as caught:
        find_traces(path)
    return str(caught.value)


WHOLE, PART = "rank0.json.gz", ".rank0.json.4711.part.gz"


def test_a_run_without_traces_says_so(tmp_path: Path) -> None:
    run = run_in(tmp_path, "a")
    assert refusal(run) == f"{run} recorded no steps; train with --profile STEPS"
    (run / "traces").mkdir()
    assert "recorded no steps" in refusal(run)


def test_of_the_folder_of_all_runs_those_with_traces_are_named(tmp_path: Path) -> None:
    run_in(tmp_path, "none")
    assert refusal(tmp_path).startswith(f"none of the runs in {tmp_path} recorded any steps")
    run_in(tmp_path, "cut", step1=PART)
    runs = [run_in(tmp_path, name, step1=WHOLE) for name in ("b", "c")]
    assert refusal(tmp_path).endswith(f"name one that recorded steps: {runs[0]}, {runs[1]}")


def test_a_recording_that_was_cut_short_is_passed_over_and_told(tmp_path: Path) -> None:
    run = run_in(tmp_path, "a", step1=WHOLE, step3=PART)
    for path in (run, run / "traces"):
        found, note = find_traces(path)
        assert found == run / "traces" / "step1"
        assert note == f"{run}/traces holds no whole trace of step3: the recording was cut short"
    (run / "traces" / "step1" / WHOLE).unlink()
    assert "the recording of step1, step3 was cut short; train with --profile" in refusal(run)


def test_several_whole_stretches_are_named_and_nothing_else(tmp_path: Path) -> None:
    run = run_in(tmp_path, "a", step12=WHOLE, step3=PART, step5=WHOLE)
    assert refusal(run).endswith(f"name one of {run}/traces/step5, {run}/traces/step12")


def test_files_and_other_folders_stand_for_themselves(tmp_path: Path) -> None:
    assert find_traces(tmp_path) == (tmp_path, "")
    assert find_traces(tmp_path / "rank0.json") == (tmp_path / "rank0.json", "")
    (tmp_path / WHOLE).touch()
    run_in(tmp_path, "a", step1=WHOLE)
    assert find_traces(tmp_path) == (tmp_path, "")
