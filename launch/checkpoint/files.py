"""One rank's file: safetensors, written as a stream in one pass, and verified in one.

The format is 8 bytes of length, that much JSON, then the tensors' bytes. Sizes are known before
values, so the header comes first and nothing but a slice is ever held. The checksum is SHA-256,
computed of each slice just before it is written, while it is in the processor's cache: OpenSSL's
uses the processor's own instructions and runs at the speed of a disk, anyone can repeat it with
sha256sum, and it leaves no accidental change unseen.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from .manifest import DTYPE_NAMES, FileRecord

# Small enough for a cache, large enough that taking the interpreter's lock again costs nothing.
SLICE = 4 << 20
_ALIGNMENT = 64
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)

Say = Callable[[str], object]
"""Is told what is being done, in other words whenever it has got on."""


def silent(doing: str) -> None:
    """Tells nobody."""


class Progress:
    """Says how far a file is, whenever some of it has moved."""

    def __init__(self, what: str, num_bytes: int, say: Say) -> None:
        self._what, self._num_bytes, self._say = what, num_bytes, say
        self._moved = 0

    def moved(self, num_bytes: int) -> None:
        """So many bytes more."""
        self._moved += num_bytes
        self._say(f"{self._what}, {self._moved >> 20} of {self._num_bytes >> 20} MiB")


class Entry(NamedTuple):
    """A tensor to write: its key, dtype, number of elements, and where its values come from.

    `values` gives [length], contiguous, on any device; it is called when its turn has come.
    """

    key: str
    dtype: torch.dtype
    length: int
    values: Callable[[], Tensor]


def header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    """The bytes before the tensors, and the first byte of each in the file."""
    told: dict[str, object] = {"__metadata__": dict(metadata)}
    begins: list[int] = []
    begin = 0
    for key, dtype, length, _ in entries:
        assert key not in told
        end = begin + length * dtype.itemsize
        told[key] = {"dtype": DTYPE_NAMES[dtype], "shape": [length], "data_offsets": [begin, end]}
        begins.append(begin)
        begin = end
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    size = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, [size + begin for begin in begins]


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """Wide dtypes first, so that each tensor begins at a multiple of its elements' size."""
    return sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.key))


def write_file(
    path: Path, entries: Sequence[Entry], metadata: Mapping[str, str], say: Say = silent
) -> tuple[FileRecord, list[int]]:
    """Write a file that is not there yet, and have it on disk.

    Args:
        path: of the file.
        entries: what it is to hold.
        metadata: of its header.
        say: is told how far it is.

    Returns:
        Its record, and the first byte of each entry.

    Raises:
        OSError: it cannot be written.
    """
    first, begins = header(entries, metadata)
    digest = hashlib.sha256(first)
    num_bytes = sum(entry.length * entry.dtype.itemsize for entry in entries)
    progress = Progress(f"writing {path}", num_bytes, say)
    with path.open("xb", buffering=SLICE) as file:
        file.write(first)
        for entry in entries:
            values = entry.values()
            assert (values.dtype, tuple(values.shape)) == (entry.dtype, (entry.length,))
            _write(file, values, digest, progress)
        size = file.tell()
        file.flush()
        say(f"waiting for {path} to be on disk")
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest()), begins


def _write(file: BinaryIO, values: Tensor, digest: hashlib._Hash, progress: Progress) -> None:
    if not values.numel():
        return
    view = values.detach().cpu().view(torch.uint8).numpy().data
    for start in range(0, len(view), SLICE):
        part = view[start : start + SLICE]
        digest.update(part)
        file.write(part)
        progress.moved(len(part))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that is not there yet, and have it on disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def problem_of(path: Path, record: FileRecord, say: Say = silent) -> str:
    """What is wrong with a file; "" if it is the one that was written.

    Raises:
        OSError: it is there and cannot be read now, which says nothing of what is in it.
    """
    progress = Progress(f"verifying {path}", record.size, say)
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.size:
                return f"{path}: has {size} bytes, not {record.size}"
            digest = hashlib.sha256()
            buffer = memoryview(bytearray(SLICE))
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                progress.moved(count)
    except OSError as error:
        if not is_absent(error):
            error.filename = error.filename or str(path)
            raise
        return f"{path}: cannot be read: {error.strerror or error}"
    if digest.hexdigest() != record.sha256:
        return f"{path}: is damaged: its content does not have the checksum in the manifest"
    return ""


def is_absent(error: OSError) -> bool:
    """Whether a file could not be read as there is none: not by a fault that may pass."""
    return error.errno in _ABSENT


def read_into(
    file: FileIO,
    begin: int,
    dtype: torch.dtype,
    target: Tensor,
    moved: Callable[[int], object] = lambda _: None,
) -> None:
    """Fill `target`, [n], on any device, with n elements of `dtype` from byte `begin` on.

    Values of another dtype are converted as Tensor.copy_ does. `moved` is told of bytes read.

    Raises:
        OSError: the file cannot be read, or ends before.
    """
    file.seek(begin)
    direct = target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous()
    step = max(1, SLICE // dtype.itemsize)
    for start in range(0, target.numel(), step):
        part = target[start : start + step]
        values = part if direct else torch.empty(part.numel(), dtype=dtype)
        view = values.view(torch.uint8).numpy().data
        while view:
            count = file.readinto(view)
            if not count:
                raise OSError(None, "ends before its last tensor does", file.name)
            view = view[count:]
            moved(count)
        if not direct:
            part.copy_(values)
    if direct:  # of what numpy writes, whoever keeps a weight's FP8 form would not learn
        torch.autograd.graph.increment_version(target)
