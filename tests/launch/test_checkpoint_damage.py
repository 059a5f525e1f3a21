"""Damage is seen wherever it is, an older checkpoint is used instead, and nothing is executed."""

from __future__ import annotations

import errno
import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from counterflow.launch.checkpoint.errors import CheckpointError
from counterflow.launch.checkpoint.manifest import parsed
from counterflow.launch.checkpoint.pieces import Piece, State
from counterflow.launch.checkpoint.read import open_checkpoint, verify
from tests import cases_checkpoint as cases
from tests.ranks import RankError, RankPool

FILE, MANIFEST = "rank00000.safetensors", "checkpoint.json"


def saved(folder: Path, step: int = 1) -> Path:
    store = cases.store(folder, asynchronous=False, keep=9)
    store.save(step, State([Piece("value", (6,), 0, torch.arange(6.0))], {"a": [1, "b"]}, {"c": 2}))
    cases.saved_well(store)
    return folder / f"step-{step:08}"


@pytest.mark.parametrize("name", [FILE, MANIFEST])
def test_a_flip_of_any_byte_and_any_truncation_are_seen(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path)
    assert verify(path) == []
    good = (path / name).read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        (path / name).write_bytes(bad)
        [problem] = verify(path)
        assert str(path / name) in problem
        (path / name).write_bytes(good[:position])
        assert len(verify(path)) == 1
    (path / name).write_bytes(good + b"\n")
    assert len(verify(path)) == 1
    (path / name).unlink()
    assert len(verify(path)) == 1
    (path / name).write_bytes(good)
    assert verify(path) == []


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "flipped": ("rank00001.safetensors", _flip, "checksum"),
    "truncated": (FILE, lambda file: file.write_bytes(file.read_bytes()[:-3]), "bytes, not"),
    "missing": (FILE, lambda file: file.unlink(), "No such file"),
    "manifest": (MANIFEST, _flip, "checksum"),
    "no manifest": (MANIFEST, lambda file: file.unlink(), "missing"),
    "of another step": (
        MANIFEST,
        lambda file: shutil.copy(file.parent.parent / "step-00000001" / MANIFEST, file),
        "of step 1",
    ),
}


def test_the_next_older_checkpoint_is_taken_with_one_warning(
    ranks: RankPool, tmp_path: Path
) -> None:
    steps = list(range(1, len(DAMAGE) + 3))
    ranks.run(cases.save_values, world=2, folder=str(tmp_path), steps=steps)
    said: list[tuple[Path, str]] = []
    for step, (name, damage, reason) in zip(steps[2:], DAMAGE.values(), strict=True):
        file = tmp_path / f"step-{step:08}" / name
        damage(file)
        said.append((file, reason))
    found = ranks.run(cases.newest_and_warnings, world=2, folder=str(tmp_path))
    assert [step for step, _, _, _ in found] == [2, 2]
    assert [value for *_, value in found] == [2.0, 2.0]
    (_, _, [warning], _), (_, _, silent, _) = found
    assert silent == []
    for file, reason in said:
        assert str(file) in warning
        assert reason in warning
    assert "the older" in warning
    assert warning.count("\n") == 0


def test_each_file_is_verified_once(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(cases.save_values, world=4, folder=str(tmp_path), steps=[1, 2])
    found = ranks.run(cases.newest_and_warnings, world=3, folder=str(tmp_path))
    assert sorted(opened for _, opened, _, _ in found) == [1, 1, 2]
    assert {step for step, *_ in found} == {2}


def test_if_all_are_damaged_it_is_an_error_that_names_each_and_no_new_run(
    ranks: RankPool, tmp_path: Path
) -> None:
    ranks.run(cases.save_values, world=2, folder=str(tmp_path), steps=[1, 2])
    for step in (1, 2):
        _flip(tmp_path / f"step-{step:08}" / "rank00001.safetensors")
    with pytest.raises(RankError) as raised:
        ranks.run(cases.newest_and_warnings, world=2, folder=str(tmp_path))
    for text in raised.value.errors.values():
        assert text.startswith("CheckpointError: ")
        assert "step-00000001" in text
        assert "step-00000002" in text


def test_what_cannot_be_read_now_is_no_damage_and_ends_all_ranks(
    ranks: RankPool, tmp_path: Path
) -> None:
    ranks.run(cases.save_values, world=2, folder=str(tmp_path), steps=[1, 2])
    for newest, load, then in ranks.run(cases.unreadable, world=2, folder=str(tmp_path)):
        for kind, said in (newest, load):
            assert kind == "ReadError"
            assert said.startswith("rank 1: ")
            assert "step-00000002" in said
            assert ": cannot be read: Input/output error; look at the disk" in said
        assert then == ("found", "2")


@pytest.mark.parametrize("name", [FILE, MANIFEST])
def test_a_tool_does_not_take_what_it_cannot_read_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path, real = saved(tmp_path), Path.open

    def refuse(file: Path, *rest: Any, **options: Any) -> Any:
        if file.name == name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(file, *rest, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError) as raised:
        verify(path)
    assert raised.value.filename == str(path / name)


def test_an_empty_folder_has_no_newest(tmp_path: Path) -> None:
    assert cases.store(tmp_path / "new").newest() is None


def _signed(plain: Any) -> bytes:
    body = json.dumps(plain).encode() if not isinstance(plain, bytes) else plain
    digest = hashlib.sha256(body).hexdigest().encode()
    return b'{"sha256": "' + digest + b'", "checkpoint": ' + body + b"}\n"


def _changed(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    plain = json.loads(data)["checkpoint"]
    change(plain)
    return _signed(plain)


def _chunk(position: int, value: Any) -> Callable[[dict[str, Any]], object]:
    def change(plain: dict[str, Any]) -> None:
        plain["tensors"]["value"]["chunks"][0][position] = value

    return change


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "path upwards": lambda p: p["files"].update({"../rank00000.safetensors": p["files"][FILE]}),
    "absolute path": lambda p: p["files"].update({"/etc/passwd": p["files"][FILE]}),
    "a line more": lambda p: p["files"].update({FILE + "\n": p["files"][FILE]}),
    "no such file": _chunk(2, "rank00009.safetensors"),
    "beyond the end": _chunk(3, 10**6),
    "negative": _chunk(3, -1),
    "true": _chunk(0, True),
    "a float": _chunk(1, 6.0),
    "too short": _chunk(1, 5),
    "a hole": _chunk(0, 1),
    "huge": lambda p: p["tensors"]["value"].update(shape=[2**60, 2**60]),
    "dtype": lambda p: p["tensors"]["value"].update(dtype="pickle"),
    "dtype of no name": lambda p: p["tensors"]["value"].update(dtype=["F32"]),
    "more keys": lambda p: p.update(run="rm -rf"),
    "fewer keys": lambda p: p.pop("values"),
    "no object": lambda p: p.update(tensors=[]),
    "ranks": lambda p: p.update(ranks=7),
    "own": lambda p: p.update(own=[3]),
    "size": lambda p: p["files"].update({FILE: ["1", "0" * 64]}),
    "checksum": lambda p: p["files"].update({FILE: [1, "zz"]}),
    "step": lambda p: p.update(step=-1),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_says_what_cannot_be_is_refused(tmp_path: Path, lie: str) -> None:
    path = saved(tmp_path) / MANIFEST
    data = _changed(path.read_bytes(), LIES[lie])
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: is no manifest"):
        parsed(data, path)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"format": 1, "format": 1}', "twice"),
        (b"\xff", "no JSON"),
        (b"3", "in place of an object"),
        (b'{"format": 2}', "has format 2, and this counterflow reads 1"),
    ],
)
def test_what_is_no_manifest_is_one_line(body: bytes, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as raised:
        parsed(_signed(body), "checkpoint.json")
    assert "\n" not in str(raised.value)


class _Shout:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (Path("executed"), "code ran")


def test_reading_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    record = open_checkpoint(path).content.files[FILE]
    trap = pickle.dumps(_Shout()).ljust(record.size, b"\0")
    (path / FILE).write_bytes(trap)

    def signed(plain: dict[str, Any]) -> None:
        plain["files"][FILE] = [len(trap), hashlib.sha256(trap).hexdigest()]

    manifest = path / MANIFEST
    manifest.write_bytes(_changed(manifest.read_bytes(), signed))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, never)
    monkeypatch.setattr(torch, "load", never)
    store = cases.store(tmp_path / "checkpoints")
    found = store.newest()  # its checksums are right, so it is good: it is just numbers
    assert found is not None
    store.load(found, [Piece("value", (6,), 0, torch.zeros(6))])
    open_checkpoint(path).read("value")
    assert not (tmp_path / "executed").exists()
