"""A save that fails, or is killed, harms nothing that was there, and all ranks are told why."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch

from counterflow.launch.checkpoint.errors import CheckpointError
from counterflow.launch.checkpoint.pieces import State
from counterflow.launch.checkpoint.read import checkpoints_in, open_checkpoint, verify
from tests import cases_checkpoint as cases
from tests.ranks import RankError, RankPool

pytestmark = pytest.mark.alone

REMEDIES = {
    "copies": os.strerror(errno.ENOMEM),
    "making the folder": "Permission denied; make it writable",
    "a file": "Read-only file system; take a run.folder",
    "half a file": "rank00001.safetensors: cannot be written: No space left on device; free some",
    "the manifest": "checkpoint.json: cannot be written: No space left on device; free some",
    "the new name": "Input/output error; look at the disk",
}


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failure_at_any_stage_is_one_line_on_all_ranks_and_harms_nothing(
    ranks: RankPool, tmp_path: Path, asynchronous: bool
) -> None:
    folder = str(tmp_path / "c")
    by_rank = ranks.run(cases.fail_at, world=3, folder=folder, asynchronous=asynchronous)
    for found in by_rank:
        assert found["then"] == 2  # and saving works again
        assert len(found) == len(REMEDIES) - (not asynchronous) + 1
        assert found == by_rank[0]
        for stage in found.keys() - {"then"}:
            [error], left = found[stage]
            assert error.startswith(f"rank {cases.FAILURES[stage][0]}: ")
            assert REMEDIES[stage] in error
            assert "\n" not in error
            assert left == ["step-00000001"]


def test_a_limit_on_the_size_of_files_is_told_and_nothing_is_left(
    ranks: RankPool, tmp_path: Path
) -> None:
    for [error] in ranks.run(cases.file_too_large, world=2, folder=str(tmp_path)):
        assert "rank00001.safetensors: cannot be written: File too large; raise the limit" in error
    assert verify(tmp_path / "step-00000001") == []


def test_a_full_disk_is_told_before_writing_and_if_it_fills_midway(
    ranks: RankPool, tmp_path: Path
) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode()}")
    try:
        for early, midway in ranks.run(cases.disk_full, world=2, folder=str(tmp_path)):
            assert f"needs {2 << 20} bytes, and {1 << 20} are free" in early
            assert "No space left on device; free some space" in midway
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_save_killed_at_any_moment_leaves_a_whole_checkpoint(
    ranks: RankPool, tmp_path: Path
) -> None:
    [values] = ranks.run(cases.kill_everywhere, world=1, folder=str(tmp_path))
    assert set(values) == {2.0, 3.0}
    assert values == sorted(values)  # once the new one is there, it stays
    assert len(values) > 10


def test_what_is_saved_is_the_state_at_the_call(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(cases.change_after_save, world=2, folder=str(tmp_path))
    assert found == [(2.0, [1, 2])] * 2


def test_a_rank_that_does_not_come_is_told_within_the_limit(
    ranks: RankPool, tmp_path: Path
) -> None:
    found = ranks.run(cases.one_stays_away, world=2, folder=str(tmp_path))
    ([error], ends, seconds), ([then], ends_of_1, _) = found
    assert "rank 0: saving the checkpoint of step 3: waiting for the other ranks" in error
    assert "no answer within 8 s" in error
    assert seconds < 60
    assert len(ends) == 3  # of two saves and a look
    assert len(ends_of_1) == 2
    for text in (*ends, *ends_of_1):
        assert "nothing can be saved any more: the run must be started again" in text
    assert "rank 1: saving the checkpoint of step 4: " in then
    assert os.listdir(tmp_path) == []


def test_a_rank_that_dies_is_an_error_of_the_save(tmp_path: Path) -> None:
    told, folder = tmp_path / "told", tmp_path / "c"
    with RankPool() as pool, pytest.raises(RankError):
        pool.run(cases.one_dies, world=3, folder=str(folder), told=str(told))
    for rank in (0, 2):
        seconds, error, left = Path(f"{told}{rank}").read_text().splitlines()
        assert float(seconds) < 30  # of a limit of 60
        assert f"rank {rank}: saving the checkpoint of step 2: " in error
        assert "step-00000001" in left


def test_a_disk_that_hangs_ends_no_wait_later_than_the_limit(
    ranks: RankPool, tmp_path: Path
) -> None:
    [found] = ranks.run(cases.stuck_disk, world=1, folder=str(tmp_path))
    late, refused, then = found
    assert "rank 0: the checkpoint of step 1 is still writing " in late
    assert "rank00000.safetensors after 1 s" in late
    assert "rank 0: the checkpoint of step 1 is still writing" in refused
    assert then == ""


def test_the_newest_stay_and_damaged_ones_do_not_count(tmp_path: Path) -> None:
    def save(*steps: int) -> list[int]:
        cases.save_values(0, 1, str(tmp_path), list(steps), keep=2)
        return [open_checkpoint(path).step for path in checkpoints_in(tmp_path)]

    assert save(1, 2, 3) == [3, 2]
    (tmp_path / "step-00000003" / "rank00000.safetensors").write_bytes(b"short")
    assert save(4) == [4, 3, 2]
    assert save(5) == [5, 4]
    assert save(4) == [4]  # 5 is of a course that was left


def test_a_damage_that_only_reading_shows_does_not_count_once_seen(tmp_path: Path) -> None:
    cases.save_values(0, 1, str(tmp_path), [1, 2, 3], keep=3)
    file = tmp_path / "step-00000003" / "rank00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    store = cases.store(tmp_path, keep=2)
    found = store.newest()
    assert found is not None
    assert found.step == 2
    store.save(4, State(cases.value_pieces(0, 1, 4.0)))
    cases.saved_well(store)
    assert [path.name[-1] for path in checkpoints_in(tmp_path)] == ["4", "3", "2"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_line_of_a_rank_that_waits_changes_while_bytes_move(
    ranks: RankPool, tmp_path: Path, asynchronous: bool
) -> None:
    """So whoever ends ranks that do not move does not end one that saves or reads."""
    found = ranks.run(
        cases.lines_of_waits, world=2, folder=str(tmp_path), asynchronous=asynchronous
    )
    for rank, shown in enumerate(found):
        what = {
            "saving": "writing",
            "verifying": "verifying",
            "reading": "reading",
        }
        for doing, verb in what.items():
            moving = [line for line in shown[doing] if f"({verb} " in line]
            assert len(moving) >= 3, shown[doing]
            assert all(line.endswith(" from ranks 0, 1") for line in moving)
            assert any(f"rank0000{rank}.safetensors, 2 of 4 MiB" in line for line in moving)


def test_a_leftover_that_cannot_be_removed_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".step-00000007.old").mkdir()

    def refuse(path: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    cases.store(tmp_path)
    assert ".step-00000007.old: cannot be cleared away: Device or resource busy" in caplog.text


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/checkpoints: cannot be written: Not a dir"):
        cases.store(tmp_path / "file" / "checkpoints")


def test_only_our_leftovers_are_removed(tmp_path: Path) -> None:
    for name in (".step-00000007.part", ".step-00000007.old", ".step-7.part", "notes", "step-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    cases.store(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".step-7.part", "notes", "step-1"]


def test_a_new_save_takes_the_place_of_the_same_step(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        store = cases.store(tmp_path)
        store.save(3, State(cases.value_pieces(0, 1, value)))
        cases.saved_well(store)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    read = open_checkpoint(tmp_path / "step-00000003").read("value")
    assert torch.equal(read, torch.full((64,), 2.0))
