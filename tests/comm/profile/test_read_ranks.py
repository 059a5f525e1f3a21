"""Folders with a trace a rank: sorted, with what is missing, twice there or no trace told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from counterflow.comm.profile.read import read_all
from counterflow.comm.profile.trace import TraceError

KERNEL = {"ph": "X", "cat": "kernel", "name": "k", "ts": 1, "dur": 1, "pid": 0, "tid": 7}


def write(path: Path, rank: int | None = None, world: int | None = None) -> Path:
    top: dict[str, Any] = {}
    if rank is not None:
        top["distributedInfo"] = {"rank": rank, "world_size": world}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**top, "traceEvents": [KERNEL]}))
    return path


def test_a_folder_is_read_by_rank_and_its_gaps_are_told(tmp_path: Path) -> None:
    for rank in (11, 2, 0, 1):
        write(tmp_path / f"part-{99 - rank}.json", rank, 12)
    found = read_all([tmp_path])
    assert [trace.rank for trace in found.traces] == [0, 1, 2, 11]
    assert found.missing == ("there is no trace of rank 3-10, of 12 ranks",)


def test_ranks_in_names_count_as_numbers(tmp_path: Path) -> None:
    for rank in range(11):
        write(tmp_path / f"rank{rank}.json")
    found = read_all([tmp_path])
    assert [trace.rank for trace in found.traces] == list(range(11))
    assert found.missing == ()


def test_a_rank_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.json", 0, 2), write(tmp_path / "b.json", 0, 2)
    other = write(tmp_path / "c.json", 1, 2)
    found = read_all([first, second, other])
    assert [trace.source for trace in found.traces] == [str(first), str(other)]
    assert found.missing == (f"rank 0 is there twice: {first} is used, {second} is not",)


def test_traces_that_do_not_tell_their_rank_come_last(tmp_path: Path) -> None:
    nameless, known = write(tmp_path / "a.json"), write(tmp_path / "b.json", 0, 1)
    found = read_all([nameless, known])
    assert [trace.rank for trace in found.traces] == [0, None]
    assert found.missing == (), "comparing ranks tells it"


def test_of_different_sizes_the_largest_tells_which_ranks_are_missing(tmp_path: Path) -> None:
    write(tmp_path / "a.json", 0, 2)
    write(tmp_path / "b.json", 1, 3)
    assert read_all([tmp_path]).missing == ("there is no trace of rank 2, of 3 ranks",)


def test_a_single_file_says_nothing_of_other_ranks(tmp_path: Path) -> None:
    assert read_all([write(tmp_path / "a.json", 0, 64)]).missing == ()


def test_other_files_of_a_folder_are_left_out_and_told_but_a_named_one_is_refused(
    tmp_path: Path,
) -> None:
    write(tmp_path / "rank0.json")
    (tmp_path / "notes.txt").write_text("no trace")
    result = tmp_path / "result.json"
    result.write_text('{"loss": 1}')
    found = read_all([tmp_path])
    assert [trace.rank for trace in found.traces] == [0]
    (told,) = found.missing
    assert "left out" in told
    assert "result.json" in told
    with pytest.raises(TraceError, match=r"result\.json has no list"):
        read_all([tmp_path / "rank0.json", result])


def test_folders_of_one_rank_each_are_found(tmp_path: Path) -> None:
    write(tmp_path / "rank_1" / "trace.json")
    write(tmp_path / "rank_0" / "trace.json")
    assert [trace.rank for trace in read_all([tmp_path]).traces] == [0, 1]


def test_a_folder_without_traces_and_no_path_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="holds no file that ends in"):
        read_all([tmp_path])
    with pytest.raises(TraceError, match="Name a file or a folder"):
        read_all([])
    (tmp_path / "only.json").write_text("{}")
    with pytest.raises(TraceError, match=r"no trace to read.*only\.json"):
        read_all([tmp_path])
