"""checkpoint.json: what a checkpoint holds and where, parsed strictly.

    {"sha256": "<of the next value's bytes>", "checkpoint": {
        "format": 1, "step": 100, "ranks": 2, "versions": {"counterflow": .., "torch": ..},
        "values": {..}, "own": [{..}, {..}],
        "files": {"rank00000.safetensors": [size in bytes, "<sha256>"], ..},
        "tensors": {NAME: {"dtype": "BF16", "shape": [512, 64], "chunks": [
            [first element, elements, "rank00000.safetensors", first byte in that file], ..]}, ..}}}

A chunk is the tensor NAME@FIRST of its file. Chunks are in the order of their elements and cover
the tensor, each element once. The first byte repeats what the file's own header says, so that a
reader opens only the files that it needs, at the place that it needs.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .errors import CheckpointError

FORMAT = 1
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Safetensors' names of what can be saved."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_HEAD, _MIDDLE, _TAIL = b'{"sha256": "', b'", "checkpoint": ', b"}\n"
_DIGEST = 64  # hexadecimal digits of a SHA-256
_FILE_NAME = re.compile(r"rank\d{5,}\.safetensors", re.ASCII)


class Chunk(NamedTuple):
    """Elements `offset` to `offset + length` of a flattened tensor, at byte `begin` of `file`."""

    offset: int
    length: int
    file: str
    begin: int


class FileRecord(NamedTuple):
    """A file's size in bytes, and the SHA-256 of its content in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorRecord:
    """A whole tensor, and where its chunks lie, in the order of their elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Content:
    """What a manifest says.

    Attributes:
        step: after which it was saved.
        values: plain JSON of the run.
        own: plain JSON of each rank that saved, by rank.
        versions: of counterflow and torch.
        files: by name.
        records: tensors by name.
    """

    step: int
    values: Mapping[str, Any]
    own: tuple[Mapping[str, Any], ...]
    versions: Mapping[str, str]
    files: Mapping[str, FileRecord]
    records: Mapping[str, TensorRecord]

    @property
    def num_bytes(self) -> int:
        """Of all its files."""
        return sum(file.size for file in self.files.values())


def written(content: Content) -> bytes:
    """The manifest's bytes."""
    plain = {
        "format": FORMAT,
        "step": content.step,
        "ranks": len(content.own),
        "versions": dict(content.versions),
        "values": dict(content.values),
        "own": list(content.own),
        "files": {name: list(file) for name, file in content.files.items()},
    }
    # One tensor at a time, so that a thread that trains gets the interpreter's lock in between.
    tensors = ",".join(
        f"{json.dumps(n)}:{_text(_plain_record(r))}" for n, r in content.records.items()
    )
    body = f'{_text(plain)[:-1]},"tensors":{{{tensors}}}}}'.encode()
    return _HEAD + hashlib.sha256(body).hexdigest().encode() + _MIDDLE + body + _TAIL


def _plain_record(record: TensorRecord) -> dict[str, Any]:
    return {
        "dtype": DTYPE_NAMES[record.dtype],
        "shape": list(record.shape),
        "chunks": [list(chunk) for chunk in record.chunks],
    }


def _text(plain: Any) -> str:
    return json.dumps(plain, separators=(",", ":"))


def parsed(data: bytes, path: object) -> Content:
    """The manifest in `data`.

    Args:
        data: the file's bytes.
        path: of the file, for errors.

    Raises:
        CheckpointError: it is damaged, of another version, or says what cannot be.
    """
    try:
        return _content(_plain(data))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{path}: is nested too deeply") from None


def _plain(data: bytes) -> dict[str, Any]:
    start = len(_HEAD) + _DIGEST + len(_MIDDLE)
    digest, body = data[len(_HEAD) : len(_HEAD) + _DIGEST], data[start : -len(_TAIL)]
    frame = _HEAD + digest + _MIDDLE + body + _TAIL
    if data != frame or hashlib.sha256(body).hexdigest().encode() != digest:
        raise CheckpointError("is damaged: its content does not have the checksum that it names")
    try:
        plain = json.loads(body, object_pairs_hook=_without_duplicates)
    except ValueError as error:  # of JSON or of UTF-8
        raise CheckpointError(f"is no JSON: {error}") from None
    return _mapping(plain, "the whole")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _content(plain: Mapping[str, Any]) -> Content:
    version = plain.get("format")
    if version != FORMAT:
        raise CheckpointError(
            f"has format {version!r}, and this counterflow reads {FORMAT}; use the counterflow "
            "that wrote it"
        )
    keys = {"format", "step", "ranks", "versions", "values", "own", "files", "tensors"}
    _require(set(plain) == keys, f"its keys are {sorted(plain)}, not {sorted(keys)}")
    ranks, own = _count(plain["ranks"], "ranks"), _list(plain["own"], "own")
    _require(len(own) == ranks, f"it has values of {len(own)} ranks, not {ranks}")
    files: dict[str, FileRecord] = {}
    for name, told in _mapping(plain["files"], "files").items():
        _require(_FILE_NAME.fullmatch(name) is not None, f"{name!r} is no name of a file of it")
        size, digest = _several(told, 2, name)
        _require(
            isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None,
            f"{name}: {digest!r} is no SHA-256",
        )
        files[name] = FileRecord(_count(size, name), digest)
    return Content(
        step=_count(plain["step"], "step"),
        values=_mapping(plain["values"], "values"),
        own=tuple(_mapping(of, "own") for of in own),
        versions={k: str(v) for k, v in _mapping(plain["versions"], "versions").items()},
        files=files,
        records={
            name: _record(name, told, files)
            for name, told in _mapping(plain["tensors"], "tensors").items()
        },
    )


def _record(name: str, told: Any, files: Mapping[str, FileRecord]) -> TensorRecord:
    told = _mapping(told, name)
    _require(set(told) == {"dtype", "shape", "chunks"}, f"{name}: has keys {sorted(told)}")
    dtype = told["dtype"]
    _require(isinstance(dtype, str) and dtype in DTYPES, f"{name}: unknown dtype {dtype!r}")
    shape = tuple(_count(size, name) for size in _list(told["shape"], name))
    chunks: list[Chunk] = []
    end = 0
    for values in _list(told["chunks"], name):
        offset, length, file, begin = _several(values, 4, name)
        _require(isinstance(file, str) and file in files, f"{name}: there is no file {file!r}")
        chunk = Chunk(_count(offset, name), _count(length, name), file, _count(begin, name))
        _require(chunk.offset == end, f"{name}: elements from {end} on are missing or there twice")
        end += chunk.length
        last = chunk.begin + chunk.length * DTYPES[dtype].itemsize
        _require(last <= files[file].size, f"{name}: a chunk lies beyond the end of {file}")
        chunks.append(chunk)
    record = TensorRecord(DTYPES[dtype], shape, tuple(chunks))
    _require(end == record.numel, f"{name}: has {end} elements, not {record.numel}")
    return record


def _require(good: bool, problem: str) -> None:
    if not good:
        raise CheckpointError(f"is no manifest of a checkpoint: {problem}")


def _mapping(value: Any, what: str) -> dict[str, Any]:
    _require(isinstance(value, dict), f"{what}: {type(value).__name__} in place of an object")
    return value


def _list(value: Any, what: str) -> list[Any]:
    _require(isinstance(value, list), f"{what}: {type(value).__name__} in place of a list")
    return value


def _several(value: Any, count: int, what: str) -> list[Any]:
    _require(len(_list(value, what)) == count, f"{what}: {len(value)} values in place of {count}")
    return value


def _count(value: Any, what: str) -> int:
    _require(type(value) is int and value >= 0, f"{what}: {value!r} in place of a count")
    return value
