"""Token files: documents as one flat array of token ids that is mapped, not read, into memory.

A corpus is two files, little-endian, written together by `write_tokens`:

    NAME.bin    the token ids of all documents, one after another, uint16 or uint32
    NAME.idx    a header of 32 bytes, then int64 offsets

    header      8 bytes   magic "CFTOKENS"
                uint32    version, 1
                uint32    bytes of a token: 2 or 4
                uint32    vocabulary size; every token id is below it
                uint32    separator: the id that the reader puts after each document
                int64     number of documents N
    offsets     N + 1     index in NAME.bin of each document's first token, then that of the end
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

_MAGIC, _VERSION = b"CFTOKENS", 1
_HEADER = struct.Struct("<8sIIIIq")
_DTYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


class DataError(ValueError):
    """Data that cannot be trained on: names the file, what is wrong, and what to do."""


class TokenFile(NamedTuple):
    """An opened token file.

    Attributes:
        tokens: [tokens] uint16 or uint32, mapped read-only.
        offsets: [documents + 1] int64.
        vocab_size: every id is below it.
        separator: id to put after each document.
    """

    tokens: NDArray[np.unsignedinteger]
    offsets: NDArray[np.int64]
    vocab_size: int
    separator: int


def write_tokens(
    path: str | Path,
    documents: Iterable[ArrayLike],
    dtype: DTypeLike = np.uint16,
    *,
    vocab_size: int,
    separator: int,
) -> int:
    """Write a token file; both parts appear under their names only when they are complete.

    Args:
        path: NAME.bin; NAME.idx is written beside it.
        documents: each one-dimensional, whole numbers in [0, vocab_size); taken one at a time.
        dtype: uint16 or uint32, how ids are stored.
        vocab_size: number of ids that the tokenizer has.
        separator: the id that ends a document, such as the tokenizer's end-of-text.

    Returns:
        The number of tokens written.

    Raises:
        DataError: an id or the separator is outside the vocabulary, or the vocabulary is too large
            for `dtype`, or a document is not a one-dimensional array of whole numbers.
    """
    stored = np.dtype(dtype).newbyteorder("<")
    path = Path(path)
    if stored not in _DTYPES.values():
        raise DataError(f"{path}: tokens are stored as uint16 or uint32, not {np.dtype(dtype)}")
    if not 0 < vocab_size <= 1 << 8 * stored.itemsize:
        raise DataError(f"{path}: a vocabulary of {vocab_size} does not fit in {np.dtype(dtype)}")
    if not 0 <= separator < vocab_size:
        raise DataError(f"{path}: separator {separator} is outside the vocabulary of {vocab_size}")
    index = _index_of(path)
    parts = [p.with_name(p.name + ".part") for p in (path, index)]
    offsets = [0]
    try:
        with parts[0].open("wb") as out:
            for number, document in enumerate(documents):
                ids = _ids(document, f"{path}: document {number}", vocab_size)
                out.write(ids.astype(stored).tobytes())
                offsets.append(offsets[-1] + ids.size)
        with parts[1].open("wb") as out:
            header = (_MAGIC, _VERSION, stored.itemsize, vocab_size, separator, len(offsets) - 1)
            out.write(_HEADER.pack(*header))
            out.write(np.asarray(offsets, dtype="<i8").tobytes())
        os.replace(parts[0], path)
        os.replace(parts[1], index)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return offsets[-1]


def read_tokens(path: str | Path) -> TokenFile:
    """Open a token file.

    Args:
        path: NAME.bin, with NAME.idx beside it.

    Raises:
        DataError: a part is missing, is not of this format, or the two do not belong together.
    """
    path = Path(path)
    index = _index_of(path)
    for part in (path, index):
        if not part.is_file():
            raise DataError(f"{part}: no such file; a token file is a .bin with its .idx beside it")
    raw = index.read_bytes()
    if len(raw) < _HEADER.size or raw[: len(_MAGIC)] != _MAGIC:
        raise DataError(f"{index}: is not the index of a token file")
    _, version, width, vocab_size, separator, count = _HEADER.unpack_from(raw)
    if version != _VERSION:
        raise DataError(f"{index}: is of version {version}, this program reads {_VERSION}")
    if width not in _DTYPES or separator >= vocab_size:
        raise DataError(f"{index}: is damaged (its header is impossible); write it again")
    if count < 0 or len(raw) != _HEADER.size + 8 * (count + 1):
        raise DataError(
            f"{index}: is damaged ({len(raw)} bytes do not hold {count} documents); write it again"
        )
    offsets = np.frombuffer(raw, dtype="<i8", offset=_HEADER.size)
    size = path.stat().st_size
    ordered = offsets[0] == 0 and bool(np.all(np.diff(offsets) >= 0))
    if not ordered or int(offsets[-1]) * width != size:
        raise DataError(
            f"{path}: has {size} bytes, its index tells of {int(offsets[-1])} tokens of {width} "
            "bytes; the two do not belong together or one is damaged"
        )
    if size == 0:
        raise DataError(f"{path}: is empty")
    tokens = np.memmap(path, dtype=_DTYPES[width], mode="r")
    return TokenFile(tokens, offsets, vocab_size, separator)


def require_ids(path: str | Path, limit: int = 1 << 31) -> None:
    """Raise unless every id of a token file is below its vocabulary size.

    Args:
        path: NAME.bin.
        limit: tokens to look at; of a longer file, whose training reads what it needs only, this is
            the beginning, and a wrong id further on is found when it is read.

    Raises:
        DataError: names the largest id and its place, or what `read_tokens` finds.
    """
    file = read_tokens(path)
    largest, place = -1, 0
    step = 1 << 24
    for start in range(0, min(len(file.tokens), limit), step):
        part = file.tokens[start : min(start + step, limit)]
        if int(part.max()) > largest:
            largest, place = int(part.max()), start + int(part.argmax())
    if largest >= file.vocab_size:
        raise wrong_id(str(path), largest, place, file.vocab_size)


def wrong_id(name: str, largest: int, place: int, vocab_size: int) -> DataError:
    """The error for a token file `name` whose token at `place` is outside its vocabulary."""
    return DataError(
        f"{name}: token {place} has the id {largest}, but the index beside it says that ids are "
        f"below {vocab_size}; write the file again with the tokenizer's vocab_size, or with the "
        "tokenizer that it is meant for"
    )


def _index_of(path: Path) -> Path:
    if path.suffix != ".bin":
        raise DataError(f"{path}: a token file's name ends in .bin")
    return path.with_suffix(".idx")


def _ids(document: ArrayLike, where: str, vocab_size: int) -> NDArray[np.integer]:
    ids = np.asarray(document)
    if ids.size == 0:
        return np.zeros(0, dtype=np.int64)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"{where} must be a one-dimensional array of whole numbers")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise DataError(
            f"{where} has ids from {ids.min()} to {ids.max()}, the vocabulary is {vocab_size}"
        )
    return ids
