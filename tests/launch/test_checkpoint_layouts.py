"""What is saved by one layout is read by any other, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from counterflow.launch.checkpoint.pieces import Piece, State
from counterflow.launch.checkpoint.read import checkpoints_in, open_checkpoint
from tests import cases_checkpoint as cases
from tests.ranks import RankPool

SEEDS = list(range(6))


def test_stretches_of_any_ranks_load_into_stretches_of_any_other(
    ranks: RankPool, tmp_path: Path
) -> None:
    for world in (1, 2, 3, 4):
        ranks.run(cases.save_layouts, world=world, folder=str(tmp_path), seeds=SEEDS)
    for world in (1, 2, 3, 4):
        checked = ranks.run(cases.load_layouts, world=world, folder=str(tmp_path), seeds=[1, 2])
        assert sum(checked) > 500


def test_tools_read_whole_tensors(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(cases.save_layouts, world=3, folder=str(tmp_path), seeds=SEEDS[:4])
    for folder in tmp_path.iterdir():
        [path] = checkpoints_in(folder)
        manifest = open_checkpoint(path)
        assert manifest.values == {"seed": manifest.step}
        assert manifest.tensors == cases.TENSORS
        for name, (dtype, shape) in cases.TENSORS.items():
            read = manifest.read(name)
            assert (read.dtype, tuple(read.shape)) == (dtype, shape)
            assert cases.same_bits(read.view(-1), cases.whole(name))


def test_replicas_are_written_once_and_by_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    num_bytes = sum(cases.whole(name).nbytes for name in cases.TENSORS)
    for [saved] in ranks.run(cases.save_everything, world=4, folder=str(tmp_path)):
        assert saved.num_bytes == num_bytes
    written: dict[str, int] = {}
    files = list((tmp_path / "step-00000005").glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  not a dict
                name, offset = key.rsplit("@", 1)
                stored = opened.get_tensor(key)
                assert key not in written
                written[key] = stored.nbytes
                start = int(offset)
                wanted = cases.whole(name)[start : start + stored.numel()]
                assert cases.same_bits(stored, wanted)
    assert sum(written.values()) == num_bytes
    assert len(files) == 4


def test_a_piece_of_another_dtype_gets_converted_values(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(cases.load_other_dtype, world=1, folder=str(tmp_path))


def test_a_name_that_is_missing_or_of_another_shape_is_named_on_all_ranks(
    ranks: RankPool, tmp_path: Path
) -> None:
    ranks.run(cases.save_values, world=2, folder=str(tmp_path), steps=[1])
    for missing, shape in ranks.run(cases.load_misfit, world=2, folder=str(tmp_path)):
        assert "rank 1: " in missing
        assert f"{tmp_path / 'step-00000001'} does not fit" in missing
        assert "absent is missing" in missing
        assert "value is [64], not [65]" in shape


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        (
            [Piece("a", (4,), 0, torch.ones(2)), Piece("a", (4,), 3, torch.ones(1))],
            "elements 2 to 2",
        ),
        ([Piece("a", (4,), 0, torch.ones(3))], "elements 3 to 3 are on no rank"),
        ([Piece("a", (4,), 2, torch.ones(3))], "no stretch"),
        ([Piece("a", (4,), 0, torch.ones(2, 2))], "no stretch"),
        ([Piece("a", (4,), 0, torch.ones(8)[::2])], "no stretch"),
        ([Piece("a", (1,), 0, torch.ones(1, dtype=torch.complex64))], "complex64"),
        ([Piece("a", (2,), 0, torch.ones(2)), Piece("a", (2,), 0, torch.ones(2).int())], "int32"),
    ],
)
def test_pieces_that_are_no_whole_are_an_error_of_the_save(
    tmp_path: Path, pieces: list[Piece], said: str
) -> None:
    store = cases.store(tmp_path)
    store.save(1, State(pieces))
    store.wait()
    [saved] = store.poll()
    assert "a: " in saved.error
    assert said in saved.error
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_no_json_are_an_error_of_the_save(tmp_path: Path) -> None:
    store = cases.store(tmp_path)
    store.save(1, State([], {"when": object()}))
    store.wait()
    [saved] = store.poll()
    assert "TypeError" in saved.error
